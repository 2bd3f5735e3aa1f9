"""Products with a weight in fp8 that a GPU computes in fp8: twice the speed of 16 bits.

Each row of the other factor is divided by its largest magnitude / 448 and rounded to float8_e4m3fn, as the
rows of W are; the sums are in fp32, and multiplied by both scales once. A value is off by at most 2^-4 of
itself, or 2^-10 of its row's scale. Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from litlora.frozen.few_bits import Quantized
from litlora.frozen.quantize import Float8
from litlora.frozen.scratch import scratch

FP8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Of the columns and rows of W."""
CAPABILITY = (8, 9)
"""Of the first GPUs of NVIDIA's that have such units."""


@cache
def has_units(device: torch.device) -> bool:
    """Whether this device multiplies in fp8."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def multiplies_in_fp8(matrix: Quantized, device: torch.device) -> bool:
    """Whether the products of a weight are computed in fp8 on this device, where it trains in bf16: one in
    float8_e4m3fn with a scale for each row, or one for all, whoever stored it."""
    if not isinstance(matrix, Float8) or not has_units(device):
        return False
    fits = matrix.entries.dtype == FP8 and not any(size % MULTIPLE for size in matrix.shape)
    return fits and matrix.scales_rows and type(matrix.stored_rows) is range


def times(x: Tensor, matrix: Quantized, made: dict[str, Any]) -> Tensor | None:
    """x Wᵀ (..., out) for x (..., in) in bf16; None where the values of W serve. Answers are generated
    with those. `made` keeps x in fp8, for other weights that it is multiplied by."""
    if not _serves(x, matrix):
        return None
    if "fp8" not in made:
        made["fp8"] = in_fp8(x.reshape(-1, x.size(-1)))
    entries, scale = made["fp8"]
    W, scales = _rows_of(matrix)
    return _scaled_mm(entries, W.t(), scale, scales.unsqueeze(0)).view(*x.shape[:-1], -1)


def back(dy: Tensor, matrix: Quantized) -> Tensor | None:
    """dy W (N, in) for dy (N, out) in bf16; None where the values of W serve."""
    if not _serves(dy, matrix):
        return None
    W, scales = _rows_of(matrix)
    # The scales of W's rows belong to the sum: they multiply dy, before it is rounded.
    entries, scale = in_fp8(dy.float() * scales)
    # The units read both factors along the sum.
    turned = scratch(matrix.shape[::-1], FP8, dy.device).copy_(W.t())
    return _scaled_mm(entries, turned.t(), scale, scale.new_ones(1, matrix.columns))


def _rows_of(matrix: Float8) -> tuple[Tensor, Tensor]:
    """Entries (out, in) and scales (out,) of the rows that make up the matrix."""
    rows = slice(matrix.stored_rows.start, matrix.stored_rows.stop)
    return matrix.entries[rows], matrix.row_scales()[rows]


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, C) as float8_e4m3fn entries and a scale for each row, (N, 1) in fp32: x ≈ entries · scale."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    # The smallest normal number keeps a row of zeros from dividing by 0.
    scale = (largest / torch.finfo(FP8).max).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(FP8, memory_format=torch.contiguous_format), scale


def _serves(x: Tensor, matrix: Quantized) -> bool:
    usable = x.dtype == torch.bfloat16 and x.numel() > 0 and not torch.is_inference_mode_enabled()
    return usable and multiplies_in_fp8(matrix, x.device)


def _scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16)
