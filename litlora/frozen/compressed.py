"""Weights that compressed-tensors stored (llm-compressor, vLLM): whole numbers in 4 or 8 bits, or
float8.

    pack-quantized   X.weight_packed      int32 (out, ⌈in · bits / 32⌉): q + 2^(bits - 1), the first in
                                          the lowest bits
                     X.weight_shape       (out, in)
                     X.weight_zero_point  int32 (⌈out · bits / 32⌉, groups), packed along the rows; not
                                          if the numbers are symmetric
                     X.weight_g_idx       the group of each column, if they are not in order
    int-quantized    X.weight             int8 (out, in); X.weight_zero_point int8 (out, groups)
    both             X.weight_scale       (out, groups), or one value
    float-quantized  see float8.py

W = (q - zero) · scale, in the dtype of the scales.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litlora.frozen.bitsandbytes import DTYPES
from litlora.frozen.float8 import OF_ACTIVATIONS, find_float8, is_float8
from litlora.frozen.grouped import Grouped, PackedRows, checked_groups, group_numbers
from litlora.frozen.methods import Storage
from litlora.frozen.stored_tensors import StoredTensors, floating, integers, unpacked
from litlora.kernels.cpu import Layout

ACTIVATION_ZEROS = ("input_zero_point", "output_zero_point", "k_zero_point", "v_zero_point")


@dataclass(frozen=True)
class Packed(PackedRows):
    tool = "compressed-tensors"


@dataclass(frozen=True)
class Int8(Grouped):
    """Signed numbers, a byte each."""

    tool = "compressed-tensors"

    def layout(self) -> Layout:
        return self._layout("signed8")

    def _entries(self, first: int, last: int) -> Tensor:
        return self.packed[first:last]


def find_compressed(parts: StoredTensors, storage: Storage) -> None:
    """Put a matrix in the place of each weight's tensors. Raises CheckpointError."""
    for name in list(parts.tensors):
        if name.endswith(tuple(f".{end}" for end in (*OF_ACTIVATIONS, *ACTIVATION_ZEROS))):
            parts.drop(name)
    for module in parts.ending(".weight_packed"):
        parts.put(f"{module}.weight_packed", partial(_packed, parts, module, storage))
    for module in parts.ending(".weight"):
        name = f"{module}.weight"
        if is_float8(parts.tensors[name]):
            parts.put(name, partial(find_float8, parts, name, storage.block))
        elif f"{module}.weight_scale" in parts.tensors:
            parts.put(name, partial(_int8, parts, module))


def _packed(parts: StoredTensors, module: str, storage: Storage) -> Packed:
    name = f"{module}.weight_packed"
    packed, shape = parts.pop(name), parts.pop(f"{module}.weight_shape")
    if shape.shape != (2,) or shape.is_floating_point() or not all(0 < n < 2**31 for n in shape.tolist()):
        raise ValueError("has a weight_shape that is not that of a matrix")
    rows, columns = map(int, shape)
    widths = [bits for bits in storage.bits if tuple(packed.shape) == (rows, -(-columns * bits // 32))]
    if len(widths) != 1:
        known = " or ".join(map(str, storage.bits))
        raise ValueError(f"{tuple(packed.shape)} does not hold {rows} x {columns} numbers of {known} bits")
    [bits] = widths
    integers(packed, "it", tuple(packed.shape))
    scales = _scales(parts, module, rows)
    count = scales.size(1)
    zeros, stored = 2 ** (bits - 1), parts.tensors.pop(f"{module}.weight_zero_point", None)
    if isinstance(stored, Tensor):
        stored = integers(stored, "weight_zero_point", (-(-rows * bits // 32), count))
        zeros = unpacked(stored, bits, rows)
    groups = _groups(parts, module, columns, count)
    facts = (f"{module}.weight", parts.file(name), _dtype(parts, scales), columns, range(rows))
    return Packed(*facts, packed, scales, zeros, groups, bits)


def _int8(parts: StoredTensors, module: str) -> Int8:
    name = f"{module}.weight"
    entries = parts.pop(name)
    if entries.dtype != torch.int8 or entries.ndim != 2 or not entries.numel():
        raise ValueError("has a weight_scale and is not a matrix in int8")
    rows, columns = entries.shape
    scales = _scales(parts, module, rows)
    zeros, stored = 0, parts.tensors.pop(f"{module}.weight_zero_point", None)
    if isinstance(stored, Tensor):
        if stored.dtype != torch.int8 or stored.numel() not in (1, scales.numel()):
            raise ValueError(f"has a weight_zero_point {tuple(stored.shape)} that does not fit its scales")
        zeros = stored.reshape(-1, scales.size(1) if stored.numel() > 1 else 1).expand(scales.shape)
    groups = _groups(parts, module, columns, scales.size(1))
    facts = (name, parts.file(name), _dtype(parts, scales), columns, range(rows))
    return Int8(*facts, entries, scales, zeros, groups, 8)


def _scales(parts: StoredTensors, module: str, rows: int) -> Tensor:
    """(out, groups). Raises ValueError."""
    scales = parts.pop(f"{module}.weight_scale")
    floating(scales, "weight_scale")
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows, 1)
    if scales.ndim == 1:
        scales = scales[:, None]
    if scales.ndim != 2 or scales.size(0) != rows or not scales.numel():
        raise ValueError(f"has a weight_scale {tuple(scales.shape)}; the weight has {rows} rows")
    return scales


def _groups(parts: StoredTensors, module: str, columns: int, count: int) -> Tensor | int:
    """The groups of columns, of equal sizes unless the file stores them. Raises ValueError."""
    index = parts.tensors.pop(f"{module}.weight_g_idx", None)
    if columns % count:
        raise ValueError(f"has {count} groups, which do not divide {columns} columns")
    size = columns // count
    if isinstance(index, Tensor) and not bool((index == -1).all()):  # -1: not in use
        return checked_groups(index, columns, count, size, "weight_g_idx")
    return group_numbers(columns, size)


def _dtype(parts: StoredTensors, scales: Tensor) -> torch.dtype:
    return scales.dtype if scales.dtype in DTYPES.values() else parts.dtype
