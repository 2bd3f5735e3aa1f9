"""Products of few rows with a weight in 8 bits, which read it as it is stored.

A token that is decoded multiplies by every weight once: values that are written to memory and read
again take three to ten times as long as the bytes that they come from.
"""

import torch
from torch import Tensor

from litlora.frozen.bitsandbytes import EightBit, Quantized
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

    The scale of a row of W multiplies the sum instead of each value: W itself is never rounded.
    """
    scales = _scales(matrix) if torch.is_inference_mode_enabled() else None
    if scales is None:
        return None
    rows, entries = x.reshape(-1, x.size(-1)), matrix.entries
    whole = matrix.stored_rows == range(len(entries))
    if not whole or x.device.type != "cpu" or x.dtype != matrix.dtype or not 0 < len(rows) <= FEW:
        return None
    is_int8 = entries.dtype == torch.int8
    fast = is_int8 and x.dtype == torch.bfloat16 and matrix.columns % COLUMNS == 0
    sums = (_in_bf16 if fast else _in_tiles)(rows, entries)
    return (sums * scales).to(x.dtype).view(*x.shape[:-1], -1)


def _scales(matrix: Quantized) -> Tensor | None:
    """What the sum over a row's entries is multiplied by, (out,); None for weights that are not in 8 bits
    with a scale for each row."""
    if isinstance(matrix, EightBit):
        return matrix.largest / 127
    return matrix.scales * 256 if type(matrix) is Float8 else None


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
