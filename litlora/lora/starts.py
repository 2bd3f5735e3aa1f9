"""Starts: the values of A and B before the first step, by the setting `init`.

    kaiming          A uniform as `nn.Linear` has it, B zero (Hu et al. 2021, arXiv:2106.09685)
    gaussian         A normal with the deviation 1 / r, B zero
    pissa            the r largest singular values and vectors of W (Meng et al. 2024,
                     arXiv:2404.02948); pissa_niter_N finds them by N subspace iterations
    olora            the first r columns of Q and rows of R of W = Q R (Büyükakyüz 2024,
                     arXiv:2406.01775)
    loftq            the r largest ones of W - Q, where Q is W in few bits (Li et al. 2023,
                     arXiv:2310.08659, one iteration)
    eva              A by the inputs of the layer, and the rank too; B zero: see eva.py

pissa and olora train on W - s · B0 A0, so that the model is the base at first. What is saved is
s · (B A - B0 A0) for the base as it is. After loftq, Q + s · B A is near W at first. The values are
those of PEFT, which names its `init_lora_weights` so; it leaves the scale out of loftq.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.frozen.later import LateWeight
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.weight import FrozenWeight
from litlora.lora.layer import LoRAEmbedding, LoRALinear
from litlora.settings import LoRAConfig

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r), in fp32."""
START_A, START_B = "start_A", "start_B"
"""What a layer calls the factors that it started with, if these are kept."""


def pissa(W: Tensor, rank: int, scale: float, niter: int | None = None) -> Factors:
    """√(S / s) Vᵀ and U √(S / s) of the `rank` largest singular values of W (out, in); with `niter`,
    by that many subspace iterations from random values (Halko et al. 2011)."""
    if niter is None:
        U, S, Vt = torch.linalg.svd(W.float(), full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W.float(), rank, niter=niter)
        Vt = V.T
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * Vt[:rank], U[:, :rank] * root


def olora(W: Tensor, rank: int) -> Factors:
    """The first rows of R and columns of Q of W = Q R (out, in)."""
    Q, R = torch.linalg.qr(W.float())
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def loftq(W: Tensor, quantised: Tensor, rank: int, scale: float) -> Factors:
    """The best A and B of s · B A = W - Q, both (out, in)."""
    return pissa(W.float() - quantised.float(), rank, scale)


@torch.no_grad()
def start_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    original: Callable[[str], Tensor] | None = None,
    computes_in: torch.dtype | None = None,
) -> None:
    """Give the fresh adapter of a model the start that `config.init` names; eva has a function of
    its own. `original` gives W (out, in) of a layer as it was before it was quantised; `computes_in` is
    the dtype to which weights will be converted later, if they will be.

    Raises UserError for a negative scale, and for loftq if no layer is quantised.
    """
    kind = family(config.init)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoRALinear)}
    if kind == "eva":
        raise UserError(
            f"{setting('init')} eva starts by data: add the adapter with start=False, and call start_eva"
        )
    for name, layer in layers.items():
        check_start(config.init, name, layer)
        if kind == "gaussian":
            nn.init.normal_(layer.lora_A, std=1 / layer.rank)
        elif kind in RESIDUAL:
            W, rank = layer.frozen.rows(), layer.rank
            W = W.to(computes_in) if computes_in is not None and not is_quantised(layer.frozen) else W
            A, B = olora(W, rank) if kind == "olora" else pissa(W, rank, layer.scale, _niter(config))
            layer.start_at(A, B, is_residual=True)
    if kind == "loftq":
        _start_loftq(layers, original)


RESIDUAL = ("pissa", "olora")
"""The starts that take a part out of W."""
KEPT = (*RESIDUAL, "loftq")
"""The starts that cannot be told from the settings: their factors are kept, as no two machines find
the same last bits."""


def is_quantised(weight: FrozenWeight) -> bool:
    """Whether it is in few bits, or will be."""
    return isinstance(weight, QuantizedWeight) or (isinstance(weight, LateWeight) and weight.is_quantised)


def family(init: str) -> str:
    """pissa_niter_16 -> pissa."""
    return init.partition("_")[0]


def _niter(config: LoRAConfig) -> int | None:
    found = re.fullmatch(r"pissa_niter_(\d+)", config.init)
    return int(found[1]) if found else None


def check_start(init: str, name: str, layer: LoRALinear) -> None:
    """Raise UserError if A and B of this layer cannot start so."""
    if init != "kaiming" and not layer.variant.takes_starts:
        raise UserError(
            f"{setting('init')} {init}: {setting('variant')} {layer.variant.name} has a start of its own; "
            f"leave {setting('init')} out"
        )
    if init != "kaiming" and isinstance(layer, LoRAEmbedding):
        raise UserError(
            f"{setting('init')} {init} and {setting('targets')} {name}: an embedding has a start of its own; "
            f"leave one of the two out"
        )
    if family(init) in ("pissa", "loftq") and layer.scale < 0:
        raise UserError(
            f"{setting('init')} {init}: {setting('alpha')} {layer.alpha:g} of {name} is negative, and the "
            "factors of a weight need a positive scale"
        )


def _start_loftq(layers: dict[str, LoRALinear], original: Callable[[str], Tensor] | None) -> None:
    """A layer that is not quantised keeps its start: there is nothing to make up for."""
    started = 0
    for name, layer in layers.items():
        if original is None or not is_quantised(layer.frozen):
            continue
        W, Q = original(name), layer.frozen.rows()
        layer.start_at(*loftq(W.to(Q.device), Q, layer.rank, layer.scale), is_residual=False)
        started += 1
    if not started:
        raise UserError(
            f"{setting('init')} loftq makes up for what quantising loses, and none of the adapted layers was "
            f"quantised; set {setting('quantize')}, or choose another start"
        )


# ---- what resuming needs


def start_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors that layers started with, by name, where these are kept."""
    return {
        f"{name}.{leaf}": getattr(layer, leaf)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
        for leaf in (START_A, START_B)
        if getattr(layer, leaf) is not None
    }


def restart(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> None:
    """Start a fresh adapter at the factors that `start_tensors` gave. Raises ValueError if they are
    not those of this model and these settings."""
    left, kind = dict(tensors), family(config.init)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        A, B = (left.pop(f"{name}.{leaf}", None) for leaf in (START_A, START_B))
        if A is None and B is None and kind not in RESIDUAL:
            continue
        for found, own in ((A, layer.lora_A), (B, layer.lora_B)):
            if found is None or found.shape != own.shape or found.dtype != own.dtype:
                raise ValueError(f"it does not hold the start of {name}")
            if not bool(found.isfinite().all()):
                raise ValueError(f"the start of {name} holds values that are not finite")
        layer.start_at(A, B, is_residual=kind in RESIDUAL)
    if left:
        raise ValueError(f"it holds {min(left)}, which is not the start of any layer")
