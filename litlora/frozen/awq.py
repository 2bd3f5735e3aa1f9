"""Weights that AWQ stored in 4 bits, version "gemm" (Lin et al. 2023, arXiv:2306.00978).

    X.qweight  int32 (in, out / 8): eight rows of W in a word, in the order of ORDER
    X.qzeros   int32 (groups, out / 8): zero points, packed likewise
    X.scales   (groups, out)

W is (out, in), in the dtype of the scales: W = (q - zero) · scale, as AutoAWQ has it.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litlora.frozen.bitsandbytes import DTYPES
from litlora.frozen.grouped import Grouped, PackedRows, checked_scales, group_numbers
from litlora.frozen.methods import Storage
from litlora.frozen.stored_tensors import StoredTensors, integers

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where row n of eight lies in a word, in nibbles from the lowest: even rows in the lower half."""

WORDS = 64
"""Columns of words that are packed anew at a time: what fits into the caches."""


@dataclass(frozen=True)
class AWQ(Grouped):
    """Eight rows of W in a word."""

    tool = "awq"

    def in_rows(self) -> Grouped:
        pairs = self.columns // 2
        rows = torch.empty(self.packed.size(1), 8, pairs, dtype=torch.uint8)
        for first in range(0, len(rows), WORDS):
            words = self.packed[:, first : first + WORDS]
            even, odd = words[::2], words[1::2]
            # Of each byte of both columns the lower halves, and the upper halves.
            lower = (even & 0x0F0F0F0F) | (odd & 0x0F0F0F0F) << 4
            upper = (even >> 4 & 0x0F0F0F0F) | (odd & ~0x0F0F0F0F)
            halves = torch.stack([lower, upper]).permute(2, 0, 1).contiguous()
            halves = halves.view(torch.uint8).view(-1, 2, pairs, 4)
            for row, place in enumerate(ORDER):
                rows[first : first + WORDS, row] = halves[:, place % 2, :, place // 2]
        words = rows.view(-1, pairs).view(torch.int32)
        facts = self.name, self.file, self.dtype, self.columns, self.stored_rows
        return AWQRows(*facts, words, self.scales, self.zeros, self.groups, self.width).in_rows()

    def _entries(self, first: int, last: int) -> Tensor:
        start = first // 8
        entries = _unpacked(self.packed[:, start : -(-last // 8)])
        return entries[first - start * 8 : last - start * 8].contiguous()


@dataclass(frozen=True)
class AWQRows(PackedRows):
    tool = "awq"


def _unpacked(words: Tensor) -> Tensor:
    """The entries in int32 words (n, out / 8): (out, n) in uint8."""
    shifts = torch.tensor(ORDER, dtype=torch.int32, device=words.device).view(1, 8, 1) * 4
    return (words.t().unsqueeze(1) >> shifts).bitwise_and_(15).to(torch.uint8).flatten(0, 1)


def find_awq(parts: StoredTensors, storage: Storage) -> None:
    """Put an AWQ in the place of each weight's tensors. Raises CheckpointError."""
    for module in parts.ending(".qweight"):
        parts.put(f"{module}.qweight", partial(_awq, parts, module, storage.group_size))


def _awq(parts: StoredTensors, module: str, size: int | None) -> AWQ:
    name = f"{module}.qweight"
    packed, scales = parts.pop(name), parts.pop(f"{module}.scales")
    if packed.ndim != 2 or not packed.numel():
        raise ValueError(f"{tuple(packed.shape)} is not a matrix")
    columns, rows = packed.size(0), packed.size(1) * 8
    integers(packed, "it", tuple(packed.shape))
    count = checked_scales(scales, rows, columns, size)
    zeros = _unpacked(integers(parts.pop(f"{module}.qzeros"), "qzeros", (count, rows // 8)))
    dtype = scales.dtype if scales.dtype in DTYPES.values() else parts.dtype
    facts = (f"{module}.weight", parts.file(name), dtype, columns, range(rows))
    return AWQ(*facts, packed, scales.t(), zeros, group_numbers(columns, size), 4)
