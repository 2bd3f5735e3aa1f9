"""Weights that a folder stores in 8-bit floating point with scales: W = q · scale.

    X.weight             float8_e4m3fn or float8_e5m2 (out, in)
    X.weight_scale_inv   transformers' "fp8" (DeepSeek): a value for each block of rows and columns,
                         the last of which may be smaller, or one for the matrix; q is multiplied
                         by it in spite of its name
    X.weight_scale       "fbgemm_fp8" and compressed-tensors: one value, or one for each row or block

Scales of activations have no effect on W. Sources: Micikevicius et al. 2022, arXiv:2209.05433;
DeepSeek-V3, arXiv:2412.19437.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.frozen.quantize import Float8, float8_values
from litlora.frozen.stored_tensors import StoredTensors, floating
from litlora.kernels.cpu import BY_ROW, STEP, Layout, power_of_two
from litlora.storage.dtypes import dtype_name

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "output_scale", "activation_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class BlockFloat8(Float8):
    """float8 with a scale for each block of rows and columns: scales (⌈out / rows⌉, ⌈in / columns⌉)
    of the block, fp32."""

    tool = "fp8"
    block: tuple[int, int]

    def layout(self) -> Layout | None:
        rows, columns = self.block
        shift = BY_ROW if columns >= self.columns else power_of_two(columns)
        if shift is None or 2**shift < STEP:
            return None
        return Layout(
            format="e4m3" if self.entries.dtype == torch.float8_e4m3fn else "e5m2",
            columns=self.columns,
            entries=self.entries,
            row_bytes=self.columns,
            scales=self.scales.float().contiguous(),
            shift=shift,
            rows_per_scale=rows,
            scales_per_row=self.scales.size(1),
        )

    @property
    def scales_rows(self) -> bool:
        return self.block[1] >= self.columns

    def row_scales(self) -> Tensor:
        return self.scales.expand(-1, self.block[0]).flatten()[: len(self.entries)].contiguous()

    def _largest(self) -> Tensor:
        largest = self.scales.abs() * torch.finfo(self.entries.dtype).max
        # Piece by piece: the entries may be mapped.
        bad = any(not _is_finite(piece) for piece in self.entries.split(1024))
        return largest.flatten() if not bad else largest.flatten().fill_(torch.nan)

    def _dequantised(self, first: int, last: int) -> Tensor:
        entries = self.entries[first:last]
        is_fast = entries.dtype == torch.float8_e4m3fn and _is_finite(entries)
        values = float8_values(entries) if is_fast else entries.float()
        rows, columns = self.block
        if columns >= self.columns:
            numbers = torch.arange(first, last, device=self.device) // rows
            return values.mul_(self.scales[numbers])
        for start in range(first - first % rows, last, rows):
            part = values[max(start, first) - first : start + rows - first]
            part.mul_(self.scales[start // rows].repeat_interleave(columns)[: self.columns])
        return values


def _is_finite(entries: Tensor) -> bool:
    """Whether no entry is NaN or infinite, by its bits."""
    bits, smallest = entries.view(torch.uint8) & 0x7F, 0x7F if entries.dtype == FLOAT8[0] else 0x7C
    return bits.numel() == 0 or bool(bits.max() < smallest)


def find_float8(parts: StoredTensors, name: str, block: tuple[int, int] | None) -> BlockFloat8:
    """Take the weight X.weight in float8 and its scale. Raises ValueError."""
    module = name.removesuffix(".weight")
    scales = [end for end in ("weight_scale_inv", "weight_scale") if f"{module}.{end}" in parts.tensors]
    if len(scales) != 1:
        what = "two scales" if scales else "no weight_scale and no weight_scale_inv"
        raise ValueError(f"is {dtype_name(parts.tensors[name].dtype)} and has {what}")
    entries, scale = parts.pop(name), parts.pop(f"{module}.{scales[0]}")
    for end in OF_ACTIVATIONS:
        parts.drop(f"{module}.{end}")
    if entries.ndim != 2 or not entries.numel():
        raise ValueError(f"{tuple(entries.shape)} is not a matrix")
    zero = parts.tensors.get(f"{module}.weight_zero_point")
    if zero is not None and bool((zero.float() != 0).any()):
        raise ValueError("weight_zero_point is not 0")
    parts.drop(f"{module}.weight_zero_point")
    size = _block_of(scale, entries, block, scales[0])
    rows, columns = entries.shape
    scale = floating(scale, scales[0]).reshape(-(-rows // size[0]), -(-columns // size[1]))
    facts = (name, parts.file(name), parts.dtype, columns, range(rows))
    return BlockFloat8(*facts, entries, scale, size)


def _block_of(scale: Tensor, entries: Tensor, block: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns that share a value. Raises ValueError for a scale of another shape."""
    rows, columns = entries.shape
    if block is not None and scale.ndim == 2:
        if tuple(scale.shape) == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    elif scale.numel() == 1:
        return rows, columns
    elif tuple(scale.shape) in {(rows,), (rows, 1)}:
        return 1, columns
    blocks = f", in blocks of {block[0]} x {block[1]}" if block else ""
    raise ValueError(f"{name} {tuple(scale.shape)} does not fit a weight of {rows} x {columns}{blocks}")


def is_float8(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in FLOAT8
