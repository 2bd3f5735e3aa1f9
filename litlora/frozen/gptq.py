"""Weights that GPTQ stored in 2, 3, 4 or 8 bits (Frantar et al. 2022, arXiv:2210.17323).

    X.qweight  int32 (in · bits / 32, out): the entries of a row of W one below the other, the
               first in the lowest bits
    X.qzeros   int32 (groups, out · bits / 32): zero points, along the rows of W; the files of the
               first version store them less 1 ("gptq", not "gptq_v2")
    X.scales   (groups, out)
    X.g_idx    int32 (in,): the group of each column of W. With act-order they are not in order

W is (out, in), in the dtype of the scales: W = (q - zero) · scale, as GPTQModel and AutoGPTQ have it.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from litlora.frozen.bitsandbytes import DTYPES
from litlora.frozen.grouped import PackedRows, checked_groups, checked_scales, group_numbers
from litlora.frozen.methods import Storage
from litlora.frozen.stored_tensors import StoredTensors, integers, unpacked


@dataclass(frozen=True)
class GPTQ(PackedRows):
    """A file has the transpose of `packed`."""

    tool = "gptq"


def find_gptq(parts: StoredTensors, storage: Storage) -> None:
    """Put a GPTQ in the place of each weight's tensors. Raises CheckpointError."""
    for module in parts.ending(".qweight"):
        parts.put(f"{module}.qweight", partial(_gptq, parts, module, storage))


def _gptq(parts: StoredTensors, module: str, storage: Storage) -> GPTQ:
    (bits,), size, name = storage.bits, storage.group_size, f"{module}.qweight"
    packed, scales = parts.pop(name), parts.pop(f"{module}.scales")
    if packed.ndim != 2 or not packed.numel() or packed.size(0) * 32 % bits:
        raise ValueError(f"{tuple(packed.shape)} does not hold whole numbers of {bits} bits")
    columns, rows = packed.size(0) * 32 // bits, packed.size(1)
    integers(packed, "it", tuple(packed.shape))
    count = checked_scales(scales, rows, columns, size)
    words = (count, -(-rows * bits // 32))
    zeros = _zeros(integers(parts.pop(f"{module}.qzeros"), "qzeros", words).t(), storage, rows)
    index = parts.tensors.pop(f"{module}.g_idx", None)
    groups = group_numbers(columns, size)
    if isinstance(index, Tensor):
        groups = checked_groups(index, columns, count, size, "g_idx")
    dtype = scales.dtype if scales.dtype in DTYPES.values() else parts.dtype
    facts = (f"{module}.weight", parts.file(name), dtype, columns, range(rows))
    return GPTQ(*facts, packed.t(), scales.t(), zeros, groups, bits)


def _zeros(words: Tensor, storage: Storage, rows: int) -> Tensor:
    """The zero points (out, groups) in words (n, groups)."""
    [bits] = storage.bits
    if not storage.zero_offset:
        return unpacked(words, bits, rows)
    if 32 % bits:
        return (unpacked(words, bits, rows) + 1) & (2**bits - 1)
    # A stored 0 less 1 has borrowed from its neighbour in the word, so the word as a whole is mended.
    ones = sum(1 << place for place in range(0, 31, bits))
    return unpacked(words + ones, bits, rows)
