"""Products of few rows with a weight in 4 or 8 bits, which read it as it is stored.

A token that is decoded multiplies by every weight once: values that are written to memory and read
again take three to ten times as long as the bytes that they come from.
"""

import torch
from torch import Tensor

from litlora.frozen.bitsandbytes import EightBit, FourBit, Quantized
from litlora.frozen.quantize import Float8, eight_bits_below
from litlora.frozen.scratch import scratch

FEW = 8
"""Rows for which this pays. torch's kernel computes each by itself, and values that were computed
once serve all."""
TILE_BYTES = 2 << 20
"""Values that exist at a time: few enough to stay in the processor's cache."""
COLUMNS = 32
"""torch's kernel reads beyond the end of a row that is not a multiple of so many bytes."""


def product(x: Tensor, matrix: Quantized) -> Tensor | None:
    """x Wᵀ (..., out) for x (..., in), of the dtype of x, where nothing learns; None where computing
    with W's values is as quick, or where these were rounded to fewer bits than x has.

    W itself is never rounded.
    """
    # Not of the subclasses, which have other scales.
    if not (torch.is_inference_mode_enabled() and type(matrix) in (EightBit, FourBit, Float8)):
        return None
    rows = x.reshape(-1, x.size(-1))
    if x.device.type != "cpu" or x.dtype != matrix.dtype or not 0 < len(rows) <= FEW:
        return None
    if isinstance(matrix, FourBit):
        sums = _in_values(rows, matrix)
    elif matrix.stored_rows == range(len(matrix.entries)):
        is_int8 = isinstance(matrix, EightBit)
        fast = is_int8 and x.dtype == torch.bfloat16 and matrix.columns % COLUMNS == 0
        # A scale multiplies the sum instead of each value.
        scales = matrix.largest / 127 if is_int8 else matrix.scales * 256
        sums = (_in_bf16 if fast else _in_tiles)(rows, matrix.entries) * scales
    else:
        return None
    return sums.to(x.dtype).view(*x.shape[:-1], -1)


def _in_bf16(x: Tensor, entries: Tensor) -> Tensor:
    """x (n, in) entriesᵀ in bf16, by torch's kernel, which sums in fp32."""
    # Without its scales: they would be rounded to bf16.
    return torch._weight_int8pack_mm(x.contiguous(), entries, x.new_ones(len(entries)))


def _in_tiles(x: Tensor, entries: Tensor) -> Tensor:
    """x (n, in) entriesᵀ in fp32; of entries in fp8 times 2^-8."""
    step = max(1, TILE_BYTES // (entries.size(1) * torch.float32.itemsize))
    sums, x = x.new_empty(len(x), len(entries), dtype=torch.float32), x.float()
    for first in range(0, len(entries), step):
        part = entries[first : first + step]
        if part.dtype == torch.int8:
            values = scratch(part.shape, torch.float32, x.device).copy_(part)
        else:
            values = eight_bits_below(part, scratch(part.shape, torch.int16, x.device))
        torch.mm(x, values.t(), out=sums[:, first : first + len(part)])
    return sums


def _in_values(x: Tensor, matrix: Quantized) -> Tensor:
    """x (n, in) Wᵀ in fp32, whose values exist for some rows of W at a time."""
    step = max(1, TILE_BYTES // (matrix.columns * torch.float32.itemsize))
    sums, x, row = x.new_empty(len(x), len(matrix.stored_rows), dtype=torch.float32), x.float(), 0
    for values in matrix.parts(step):
        torch.mm(x, values.t(), out=sums[:, row : row + len(values)])
        row += len(values)
    return sums
