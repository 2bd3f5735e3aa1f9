"""Weights in 8-bit floating point with a scale: W = q · scale.

    X.weight               float8_e4m3fn or float8_e5m2
    X.weight_scale         one value, one for each row, or one for each block of a matrix
    X.scale_weight         the same (ComfyUI until 2025)
    X.weight_scale_inv     the same (DeepSeek); in spite of its name q is multiplied by it
    X.input_scale, X.scale_input, X.output_scale
                           of activations, without effect on W
    X.comfy_quant          JSON as bytes: how W is stored (ComfyUI)
    scaled_fp8             an empty tensor that marks a file (ComfyUI)

Products are computed in fp32. A float8 tensor without any of these holds its values as they are.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.storage.dtypes import dtype_name
from litlora.storage.untrusted import parse_json

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MULTIPLIERS = ("weight_scale", "scale_weight", "weight_scale_inv")
OF_ACTIVATIONS = ("input_scale", "scale_input", "output_scale")
COMFY_QUANT, MARKER = "comfy_quant", "scaled_fp8"
QUANTIZATION_METADATA = "_quantization_metadata"
"""In a file's header: the same as comfy_quant, for all layers."""
BLOCK = 128
"""Rows and columns of a block, where nothing else tells them: DeepSeek's."""
_COMPANION = re.compile(r"weight_.*|.*(scale|quant|zero_point|absmax|amax|codebook|g_idx).*")
_WITHOUT_EFFECT = ("full_precision_matrix_mult", "orig_dtype", "orig_shape")


@dataclass(frozen=True)
class Scale:
    """What a tensor in 8 bits is multiplied by."""

    name: str
    stored: Tensor
    block: tuple[int, int] | None
    """Rows and columns that share a value; None: the values are broadcast."""

    def times(self, q: Tensor) -> Tensor:
        """The weight in fp32."""
        W = q.to(torch.float32)
        if self.block is None:
            return W.mul_(self._broadcast(q, self.stored.float()))
        rows, columns = self.block
        for part, values in zip(W.split(rows), self.stored.float(), strict=True):
            part.mul_(values.repeat_interleave(columns)[: W.size(1)])
        return W

    def renewed(self, W: Tensor, dtype: torch.dtype) -> "Scale":
        """A scale of the same kind for another weight: its largest value becomes the largest of
        `dtype`."""
        size = W.abs()
        if self.block is not None:
            rows, columns = self.block
            blocks = [[part.max() for part in row.split(columns, dim=1)] for row in size.split(rows)]
            largest = torch.stack([torch.stack(row) for row in blocks])
        elif self.stored.numel() == 1:
            largest = size.max()
        else:
            largest = size.reshape(len(size), -1).max(1).values
        values = torch.where(largest > 0, largest / torch.finfo(dtype).max, torch.ones_like(largest))
        stored = values.reshape(self.stored.shape).to(self.stored.dtype)
        stored = stored.clamp_min(torch.finfo(stored.dtype).tiny)
        return Scale(self.name, stored, self.block)

    def divided(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """q of a weight in fp32, rounded to the nearest."""
        whole = Scale(self.name, self.stored.float().reciprocal(), self.block).times(W)
        largest = torch.finfo(dtype).max  # a scale that is stored in 16 bits may be rounded down
        return whole.clamp_(-largest, largest).to(dtype)

    @staticmethod
    def _broadcast(q: Tensor, values: Tensor) -> Tensor:
        return values.reshape(()) if values.numel() == 1 else values.reshape(-1, *(1 for _ in q.shape[1:]))


class ScaledModel(Mapping[str, Tensor]):
    """A model's tensors by name; those with a scale are multiplied by it whenever they are read, so
    that one of them is in memory at a time."""

    def __init__(self, stored: dict[str, Tensor], scales: dict[str, Scale], parts: set[str]) -> None:
        self.stored = stored
        """As the files have them, with scales and all."""
        self.scales = scales
        """By the name of the weight."""
        self.names = [name for name in stored if name not in parts]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.scales:
            return self.stored[name]
        return self.scales[name].times(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def shapes(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without their values: shapes, and the dtypes that they are read in."""
    if not isinstance(model, ScaledModel):
        return dict(model)
    return {
        name: torch.empty(model.stored[name].shape, dtype=torch.float32, device="meta")
        if name in model.scales
        else model.stored[name]
        for name in model.names
    }


def with_scales(tensors: dict[str, Tensor], where: Mapping[str, Path]) -> Mapping[str, Tensor]:
    """The tensors, with each scale applied to its weight; `where` is the file of each.

    Raises CheckpointError for a scale, or another part of a tensor in 8 bits, whose meaning is not
    known here.
    """
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        leaves[module].append(leaf)
    scales: dict[str, Scale] = {}
    parts = {name for name in tensors if name.rpartition(".")[2] == MARKER}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT8:
            _check_plain(name, tensors, where)
            continue
        try:
            scale, taken = _scale(name, tensors, leaves)
        except ValueError as error:
            raise CheckpointError(
                f"{where[name]}: {name} is {dtype_name(tensor.dtype)}, and {error}; use the model in 16 bits"
            ) from None
        parts |= taken
        if scale is not None:
            scales[name] = scale
    return ScaledModel(tensors, scales, parts) if scales or parts else tensors


def _check_plain(name: str, tensors: Mapping[str, Tensor], where: Mapping[str, Path]) -> None:
    """Raise CheckpointError for a scale that belongs to a weight in another format than float8."""
    module, _, leaf = name.rpartition(".")
    if leaf not in (*MULTIPLIERS, COMFY_QUANT):
        return
    weight = tensors.get(f"{module}.weight" if module else "weight")
    if weight is not None and weight.dtype in FLOAT8:
        return
    is_one = tensors[name].is_floating_point() and bool((tensors[name].float() == 1).all())
    if weight is not None and weight.is_floating_point() and is_one:
        return
    kind = "missing" if weight is None else dtype_name(weight.dtype)
    raise CheckpointError(
        f"{where[name]}: {name} belongs to {module}.weight, which is {kind}; scales are supported for "
        "float8 weights only; use the model in 16 bits"
    )


def _scale(
    name: str, tensors: Mapping[str, Tensor], leaves: Mapping[str, list[str]]
) -> tuple[Scale | None, set[str]]:
    """The scale of a tensor in float8, and the names of all parts that belong to it. Raises
    ValueError."""
    module, _, own = name.rpartition(".")
    inside = f"{module}." if module else ""
    if own == "weight":
        found = {leaf: inside + leaf for leaf in leaves[module] if _COMPANION.fullmatch(leaf)}
    else:
        ends = [leaf.removeprefix(f"{own}_") for leaf in leaves[module] if leaf.startswith(f"{own}_")]
        found = {f"weight_{end}": f"{name}_{end}" for end in ends}
    found |= {f"weight.{leaf}": f"{name}.{leaf}" for leaf in leaves.get(name, [])}
    known = (*MULTIPLIERS, *OF_ACTIVATIONS, COMFY_QUANT)
    if odd := [part for leaf, part in found.items() if leaf not in known]:
        raise ValueError(f"{odd[0]} beside it is not a scale of a kind that is supported")
    settings = _comfy(tensors[found[COMFY_QUANT]]) if COMFY_QUANT in found else {}
    scales = [found[leaf] for leaf in MULTIPLIERS if leaf in found]
    if len(scales) > 1:
        raise ValueError(f"it has two scales, {scales[0]} and {scales[1]}")
    if not scales:
        return None, set(found.values())
    scale = tensors[scales[0]]
    if not scale.is_floating_point() or scale.dtype in FLOAT8 or not torch.isfinite(scale).all():
        raise ValueError(f"{scales[0]} ({dtype_name(scale.dtype)}) is not a finite scale")
    return Scale(scales[0], scale, _block(scales[0], tensors[name], scale, settings)), set(found.values())


def _comfy(tensor: Tensor) -> dict[str, Any]:
    """The settings in a comfy_quant tensor. Raises ValueError for a kind that is not supported."""
    try:
        settings = parse_json(bytes(tensor.to(torch.uint8).flatten()[:4096].tolist()).decode())
    except (ValueError, RecursionError, RuntimeError):
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("format"), str):
        raise ValueError(f"its {COMFY_QUANT} cannot be read")
    odd = [
        key
        for key, value in settings.items()
        if value and key not in ("format", "group_size", "block_size", *_WITHOUT_EFFECT)
    ]
    if odd or not settings["format"].startswith(("float8_e4m3fn", "float8_e5m2")):
        what = f"{odd[0]} {settings[odd[0]]!r}" if odd else f"format {settings['format']!r}"
        raise ValueError(f"its {COMFY_QUANT} has the {what}, which is not supported")
    return settings


def _block(name: str, q: Tensor, scale: Tensor, settings: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a value of a scale; None for one value, and for one a row. Raises
    ValueError for a scale of another shape."""
    shape, wanted = tuple(scale.shape), tuple(q.shape)
    if scale.numel() == 1:
        return None
    if wanted and shape in {wanted[:1], (*wanted[:1], *(1 for _ in wanted[1:]))}:
        return None
    if len(shape) == len(wanted) == 2:
        stated = settings.get("group_size") or settings.get("block_size")
        candidates = [stated] if type(stated) is int and stated > 0 else [BLOCK]
        rows, odd_rows = divmod(wanted[0], shape[0]) if shape[0] else (0, 1)
        columns, odd_columns = divmod(wanted[1], shape[1]) if shape[1] else (0, 1)
        if not stated and not odd_rows and not odd_columns and rows == columns:
            candidates.append(rows)
        for size in candidates:
            if shape == (-(-wanted[0] // size), -(-wanted[1] // size)):
                return size, size
    raise ValueError(f"{name} {shape} is not a scale of a kind that is supported for {wanted}")
