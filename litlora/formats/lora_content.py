"""What a LoRA file holds, key by key: the tensors of each layer together, and the update that they
form. lora_keys.py says what a key means, lora_files.py what a file is."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats import PEFT_CONFIG_FILE, lora_keys, lycoris, peft
from litlora.formats.lora_header import ADAPTERS, Header, check_understood
from litlora.formats.peft_config import EXPERTS, is_parameter, tokens_of
from litlora.lora.dense import DenseUpdate, ExpertsUpdate, ReplacedRows
from litlora.lora.update import Update, scale_of
from litlora.storage.tensors import at_least_16_bits

PARTS = ("lora_down", "lora_up")
"""What most tools call A and B."""
PEFT_PARTS = ("lora_A", "lora_B")
END_OF = {
    ".diff": ".weight",
    ".diff_b": ".bias",
    ".diff_m": ".modulation",
    ".w_norm": ".weight",
    ".b_norm": ".bias",
}
"""The keys of the differences of whole tensors end so, and what they are differences of: of two for
one end, the first is written."""


def diff_of(name: str) -> tuple[str, str]:
    """(the end of a tensor's name, the end of its difference's key instead); of any other tensor,
    nothing is replaced and .diff added."""
    return next(((end, diff) for diff, end in END_OF.items() if name.endswith(end)), ("", ".diff"))


@dataclass
class _Layer:
    """The tensors of one module, as they are found."""

    spelling: str | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    is_embedding: bool = False
    product: dict[str, Tensor] = field(default_factory=dict)
    magnitude: Tensor | None = None
    magnitude_key: str = ""
    bias: Tensor | None = None
    """Of B."""
    rows: Tensor | None = None
    """Those that replace some tokens' rows."""


@dataclass
class Content:
    """What a file or PEFT folder holds, key by key."""

    file: Path
    config: dict[str, Any] | None
    header: Header
    layers: dict[str, _Layer] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    diffs: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    """A key of each adapter that the keys name."""
    unknown: list[str] = field(default_factory=list)

    def add(self, key: str, tensor: Tensor) -> None:
        """Sort out one tensor by its key."""
        if factor := lora_keys.factor(key):
            self._add_factor(key, factor, tensor)
        elif found := lora_keys.product_part(key):
            self._layer(found[0]).product[found[1]] = tensor
        elif module := lora_keys.magnitude(key):
            layer = self._layer(module)
            if layer.magnitude is not None:
                first = layer.magnitude_key
                raise CheckpointError(f"{self.file}: {first} and {key} are magnitudes of one layer; keep one")
            layer.magnitude, layer.magnitude_key = tensor, key
        elif (module := lora_keys.bias(key)) and self._layer(module).bias is None:
            self._layer(module).bias = tensor
        elif self.config is not None and (module := lora_keys.token_rows(key)):
            self._layer(module).rows = tensor
        elif key.endswith(".alpha"):
            if tensor.numel() != 1 or not math.isfinite(value := tensor.item()) or value == 0:
                raise CheckpointError(f"{self.file}: {key} must be one finite number other than 0")
            self.alphas[key.removesuffix(".alpha")] = float(value)
        elif key.endswith(tuple(END_OF)):
            self.diffs[key] = at_least_16_bits(tensor)
        elif self.config is not None and not re.search(r"\.lora_|\.token_adapter\.", key):
            if ".original_module." not in key:  # what a module was before training, which has no effect
                name = key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                self.whole[name] = tensor
        else:
            self.unknown.append(key)

    def _layer(self, module: str) -> _Layer:
        return self.layers.setdefault(module, _Layer())

    def _add_factor(self, key: str, factor: lora_keys.Factor, tensor: Tensor) -> None:
        if factor.is_bare and self.file.suffix != ".safetensors":
            raise CheckpointError(
                f"{self.file}: {key} is spelled as litlora and litgpt do, which store the scale elsewhere; "
                "name the adapter's directory"
            )
        layer = self._layer(factor.layer)
        if layer.spelling not in (None, factor.spelling) or factor.part in layer.factors:
            first = next(iter(layer.keys.values()))
            raise CheckpointError(
                f"{self.file}: {factor.layer} has factors of two kinds, {first} and {key}; keep one"
            )
        layer.spelling, layer.is_embedding = factor.spelling, factor.is_embedding
        layer.factors[factor.part], layer.keys[factor.part] = tensor, key
        if factor.adapter is not None:
            self.adapters.setdefault(factor.adapter, key)

    def checked(self, *, allow_unknown: bool) -> list[str]:
        """The unrecognised keys. Raises CheckpointError for one unless `allow_unknown`, for two
        adapters in one file, and for a file without a LoRA."""
        if len(self.adapters) > 1:
            raise CheckpointError(
                f"{self.file}: holds {len(self.adapters)} adapters ({', '.join(sorted(self.adapters)[:6])}); "
                "save each to a file of its own"
            )
        alone = [f"{module}.alpha" for module in self.alphas if module not in self.layers]
        unknown = [*self.unknown, *alone]
        if unknown and not allow_unknown:
            raise CheckpointError(
                f"{self.file}: {unknown[0]}: unrecognised key; the keys of factors, of LoHa and LoKr, "
                f".alpha, DoRA's magnitudes, {', '.join(END_OF)} are supported"
            )
        if not (self.layers or self.diffs or self.whole):
            first = f"; {unknown[0]}: unrecognised key" if unknown else ""
            raise CheckpointError(
                f"{self.file}: holds no LoRA: no lora_down and lora_up, no lora_A and lora_B, no .diff{first}"
            )
        return unknown

    def parts(self) -> tuple[str, str]:
        """What the first layer calls A and B, or what is nearest to it."""
        spelling = next((layer.spelling for layer in self.layers.values() if layer.factors), PARTS[0])
        if spelling.startswith(PEFT_PARTS[0]):
            return spelling, spelling.replace(*PEFT_PARTS)
        return PARTS if spelling == PARTS[0] else ("lora.down", "lora.up")

    def keys_of(self, module: str) -> tuple[str, str]:
        """The keys of A and B of a module."""
        keys = self.layers[module].keys
        return keys["A"], keys["B"]

    @property
    def is_8_bit(self) -> bool:
        """Whether factors are stored in 8 bits."""
        factors = (factor for layer in self.layers.values() for factor in layer.factors.values())
        return any(factor.itemsize == 1 for factor in factors)

    def notices(self, updates: Mapping[str, Update | DenseUpdate]) -> list[str]:
        """What the header says besides. Raises CheckpointError if that contradicts scale 1, which a
        layer has without `.alpha`."""
        if self.config is not None or self.header.adapters or self.alphas:
            return []
        ranks = {module: update.rank for module, update in updates.items() if update.rank is not None}
        said = check_understood(self.file, self.header, ranks)
        if any(module.startswith(peft.PREFIX) for module in self.layers):
            said.append(
                f"{self.file}: its names are PEFT's, which keeps alpha in {PEFT_CONFIG_FILE}, and none lies "
                "beside it; its scale is taken to be 1"
            )
        return said

    def update(self, module: str) -> Update | DenseUpdate:
        """What one module's tensors add to its weight. Raises CheckpointError if they do not form an
        update."""
        layer, where = self.layers[module], f"{self.file}: {module}"
        if layer.rows is not None:
            return self._rows(module, layer)
        if layer.product:
            update = self._product(module, layer)
        elif layer.factors:
            update = self._experts(module, layer) or self._plain(module, layer)
        else:
            lone = layer.magnitude_key or f"{module}.lora_B.bias"
            raise CheckpointError(f"{self.file}: {lone}: has no factors beside it")
        if layer.magnitude is None:
            stated = self.config["use_dora"] if self.config else self.header.uses_dora(self.file, module)
            if stated:
                raise CheckpointError(f"{where} has no lora_magnitude_vector, though use_dora is set")
            return update
        of_outputs = "lora_magnitude" in layer.magnitude_key
        return lycoris.decomposed(where, update, layer.magnitude, of_outputs=of_outputs)

    def bias(self, module: str, update: Update | DenseUpdate) -> Tensor | None:
        """What the bias of B adds to the layer's own; None if it has none. Raises CheckpointError for
        one that is missing or does not fit."""
        bias, where = self.layers[module].bias, f"{self.file}: {module}"
        stated = self.config["lora_bias"] if self.config else self.header.has_bias(self.file, module)
        if bias is None:
            if stated and isinstance(update, Update) and update.kind != "embedding":
                raise CheckpointError(f"{where} has no lora_B.bias, though lora_bias is set")
            return None
        if self.config is not None and not stated:
            raise CheckpointError(f"{where} has lora_B.bias, but {PEFT_CONFIG_FILE} no lora_bias")
        if not isinstance(update, Update) or bias.shape != (len(update.B),) or not bias.is_floating_point():
            raise CheckpointError(f"{where}: lora_B.bias {tuple(bias.shape)} does not belong to its factors")
        return update.scale * at_least_16_bits(bias).to(torch.float32)

    def _rows(self, module: str, layer: _Layer) -> ReplacedRows:
        """Rows that replace those of some tokens."""
        tokens, where = tokens_of(module, self.config), f"{self.file}: {module}"
        if layer.factors or layer.magnitude is not None:
            raise CheckpointError(
                f"{where} has factors and rows of tokens; merge it with PEFT's merge_and_unload"
            )
        rows = at_least_16_bits(layer.rows)
        if rows.ndim != 2 or len(rows) != len(tokens) or not tokens or not rows.is_floating_point():
            raise CheckpointError(
                f"{where}: its rows {tuple(rows.shape)} do not fit trainable_token_indices of "
                f"{PEFT_CONFIG_FILE}, which names {len(tokens)}"
            )
        return ReplacedRows(rows, tuple(tokens))

    def _experts(self, module: str, layer: _Layer) -> ExpertsUpdate | None:
        """The update of a parameter of a layer's experts; None for a layer of any other kind."""
        experts, depth = re.subn(r"\.base_layer(?=\.|$)", "", module)
        adapted = [name for name in EXPERTS if self._is_parameter(f"{experts}.{name}")]
        if not adapted or module != experts + ".base_layer" * depth:
            return None
        where = f"{self.file}: {module}"
        if depth >= len(adapted):
            raise CheckpointError(f"{where}: {PEFT_CONFIG_FILE} names no target_parameters for it")
        parameter = adapted[-1 - depth]  # PEFT wraps the first in the second
        rank, scale = self._peft_strength(f"{experts}.{parameter}")
        A, B = (layer.factors.get(part) for part in "AB")
        sound = A is not None and B is not None and A.ndim == B.ndim == 2 and len(A) == B.size(1)
        if not sound or len(A) % rank or not (A.numel() and A.is_floating_point() and B.is_floating_point()):
            raise CheckpointError(f"{where}: its factors do not form an update of experts of rank {rank}")
        A = at_least_16_bits(A).unflatten(0, (-1, rank))  # (E, r, in)
        B = at_least_16_bits(B).unflatten(1, (rank, -1)).permute(2, 0, 1)  # (out, r, E) -> (E, out, r)
        return ExpertsUpdate(A, B, scale, experts, parameter)

    def _is_parameter(self, name: str) -> bool:
        return self.config is not None and is_parameter(name, self.config)

    def _product(self, module: str, layer: _Layer) -> DenseUpdate:
        if layer.factors:
            name = next(iter(layer.product))
            raise CheckpointError(f"{self.file}: {module}: has both LoRA's factors and {name}; keep one")
        update = lycoris.product(f"{self.file}: {module}", layer.product, self.alphas.get(module))
        if self.config is not None or update.rank is None:
            return update
        return replace(update, scale=self._scale(module, update.rank))

    def _plain(self, module: str, layer: _Layer) -> Update:
        if not layer.factors.keys() >= {"A", "B"}:
            raise CheckpointError(f"{self.file}: {module} has only one of its two factors")
        A, B, mid = (layer.factors.get(part) for part in ("A", "B", "mid"))
        if not _form_an_update(A, B, mid):
            shapes = " and ".join(str(tuple(factor.shape)) for factor in layer.factors.values())
            raise CheckpointError(f"{self.file}: {module}: {shapes} do not form an update")
        A, B, rank = at_least_16_bits(A), at_least_16_bits(B), A.size(0)
        if mid is not None:  # Tucker's decomposition of a convolution: down, mid and up, one after another
            A = lycoris.tucker(at_least_16_bits(mid), A.flatten(1))
        kind = "embedding" if layer.is_embedding else "linear"
        if self.config is None:
            return Update(A, B, self._scale(module, rank), kind)
        as_parameter = self._is_parameter(f"{module}.weight")
        if kind == "linear" and self.config.get("fan_in_fan_out") and not as_parameter:
            kind = "conv1d"
        stated, scale = self._peft_strength(f"{module}.weight" if as_parameter else module)
        if rank != stated:
            raise CheckpointError(f"{self.file}: {module} has rank {rank}; {PEFT_CONFIG_FILE} says {stated}")
        return Update(A, B, scale, kind)

    def _scale(self, module: str, rank: int) -> float:
        """What `.alpha`, or else the header, says about a module; 1 if neither does. Raises
        CheckpointError if they contradict each other."""
        stored = self.alphas[module] / rank if module in self.alphas else None
        stated = self.header.scale(self.file, module, rank)
        if stored is not None and stated is not None and not math.isclose(stored, stated, rel_tol=1e-3):
            raise CheckpointError(
                f"{self.file}: {module}.alpha is {self.alphas[module]:g}, but {ADAPTERS} in the header says "
                f"{stated * rank:g}; keep the one that is right"
            )
        return next((scale for scale in (stored, stated) if scale is not None), 1.0)

    def _peft_strength(self, name: str) -> tuple[int, float]:
        """(rank, scale) that adapter_config.json states for a module or parameter."""
        config, name = self.config, name.removeprefix(peft.PREFIX)
        rank = peft.by_pattern(config["rank_pattern"], name, config["r"])
        alpha = float(peft.by_pattern(config["alpha_pattern"], name, config["lora_alpha"]))
        return rank, scale_of(alpha, rank, rslora=config["use_rslora"])


def _form_an_update(A: Tensor, B: Tensor, mid: Tensor | None) -> bool:
    """Whether A (r, in, *kernel) and B (out, r, 1, ...), or A (r, in, 1, ...), mid (p, r, *kernel)
    and B (out, p, 1, ...), fit each other."""
    found = [A, B] if mid is None else [A, B, mid]
    if not all(tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point() for tensor in found):
        return False
    if B[0, 0].numel() != 1 or (A.ndim > 2 and B.ndim not in (2, A.ndim)):
        return False
    if mid is None:
        return A.size(0) == B.size(1)
    return A[0, 0].numel() == 1 and mid.size(1) == A.size(0) and mid.size(0) == B.size(1)
