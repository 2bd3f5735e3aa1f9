"""Starts: the values of A and B before the first step, by the setting `init`.

    kaiming          A uniform as `nn.Linear` has it, B zero (Hu et al. 2021, arXiv:2106.09685)
    gaussian         A normal with the deviation 1 / r, B zero
    pissa            the r largest singular values and vectors of W (Meng et al. 2024,
                     arXiv:2404.02948); pissa_niter_N finds them by N subspace iterations
    olora            the first r columns of Q and rows of R of W = Q R (Büyükakyüz 2024,
                     arXiv:2406.01775)
    loftq            the r largest ones of W - Q, where Q is W in few bits (Li et al. 2023,
                     arXiv:2310.08659, one iteration)
    loftq_iter_N     N iterations: Q is W - s · B A in few bits, with A and B of the one before
    eva              A by the inputs of the layer, and the rank too; B zero: see eva.py

pissa and olora train on W - s · B0 A0, so that the model is the base at first. What is saved is
s · (B A - B0 A0) for the base as it is. After loftq, Q + s · B A is near W at first; what was taken
out of W before it became the last Q is saved, too, as that Q is not found again without it. The values
are those of PEFT, which names its `init_lora_weights` so; it leaves the scale out of loftq.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.frozen.later import LateWeight
from litlora.frozen.low_rank import LowRank
from litlora.frozen.quantize import Quantizer
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


def loftq(W: Tensor, quantised: Tensor, rank: int, scale: float, *, fast: bool = False) -> Factors:
    """The best A and B of s · B A = W - Q, both (out, in); or, `fast`, nearly the best."""
    lost = W.float() - quantised.float()
    if not fast:
        return pissa(lost, rank, scale)
    # With as many vectors again: those that are kept are then found in few subspace iterations.
    A, B = pissa(lost, min(2 * rank, *lost.shape), scale, FAST_NITER)
    return A[:rank], B[:, :rank]


FAST_NITER = 8
"""Subspace iterations: 0.15 s of the processor for a matrix of 2048 x 2048, whose whole decomposition takes
4.1 s. Five iterations of LoftQ then lose 0.0 to 0.1% more of W - (Q + s · B A)."""


@dataclass(frozen=True)
class Unquantised:
    """The weights of a model that was quantised, as they were before."""

    weight: Callable[[str], Tensor]
    """Gives W (out, in) of a layer, by its name."""
    quantizer: Quantizer


@torch.no_grad()
def start_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    original: Unquantised | None = None,
    computes_in: torch.dtype | None = None,
) -> dict[str, LowRank]:
    """Give the fresh adapter of a model the start that `config.init` names; eva has a function of
    its own. `original` is needed for loftq; `computes_in` is the dtype to which weights will be converted
    later, if they will be.

    Returns what was taken out of layers before they were quantised anew, by their names. Raises
    UserError for a negative scale, and for loftq if no layer is quantised.
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
    return _start_loftq(layers, config, original) if kind == "loftq" else {}


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


def _start_loftq(
    layers: dict[str, LoRALinear], config: LoRAConfig, original: Unquantised | None
) -> dict[str, LowRank]:
    """A layer that is not quantised keeps its start: there is nothing to make up for."""
    iterations, taken_out = config.loftq_iterations, {}
    found = {name: one for name, one in layers.items() if original is not None and is_quantised(one.frozen)}
    fast = iterations > 1
    for name, layer in found.items():
        W, rank, scale = original.weight(name), layer.rank, layer.scale
        A, B = loftq(W.to(layer.frozen.device), layer.frozen.rows(), rank, scale, fast=fast)
        for _ in range(iterations - 1):
            taken_out[name] = LowRank.near(A, B, scale)
            _requantise(layer, W, original.quantizer, taken_out[name])
            A, B = loftq(W.to(layer.frozen.device), layer.frozen.rows(), rank, scale, fast=fast)
        layer.start_at(A, B, is_residual=False)
    if not found:
        raise UserError(
            f"{setting('init')} {config.init} makes up for what quantising loses, and none of the adapted "
            f"layers was quantised; set {setting('quantize')}, or choose another start"
        )
    return taken_out


def _requantise(layer: LoRALinear, W: Tensor, quantizer: Quantizer, taken_out: LowRank) -> None:
    """Quantise the weight W of a layer anew, less what is taken out of it."""
    storage = layer.linear.storage
    if isinstance(storage, LateWeight):
        layer.linear.storage = LateWeight(replace(storage.source, taken_out=taken_out))
        return
    stored = storage.matrix
    matrix = quantizer.quantised(W, stored.name, stored.file, taken_out)
    layer.linear.storage = QuantizedWeight(matrix).to(storage.device)


# ---- what resuming needs


def requantise(
    model: nn.Module, taken_out: Mapping[str, LowRank], config: LoRAConfig, original: Unquantised | None
) -> None:
    """Quantise the layers of a fresh adapter anew, as `start_lora` did, less what it returned. Raises
    ValueError for anything but one product for each quantised layer."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoRALinear)}
    wanted = {name for name, one in layers.items() if is_quantised(one.frozen)}
    wanted = wanted if config.loftq_iterations > 1 else set()
    if odd := sorted(taken_out.keys() ^ wanted):
        what = "holds" if odd[0] in taken_out else "does not hold"
        raise ValueError(f"it {what} what was taken out of {odd[0]}")
    for name, product in taken_out.items():
        layer = layers[name]
        if product.shape != layer.frozen.shape:
            raise ValueError(f"what was taken out of {name} is {tuple(product.shape)}, not its shape")
        _requantise(layer, original.weight(name), original.quantizer, product)


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
