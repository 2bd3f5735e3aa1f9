"""Products of many matrices, each with its own rows of one tensor. Nothing waits for how many rows there
are of each: the plain twin, a loop over the matrices, has to (`litlora/model/experts.py`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes: of the rows of every tensor."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fits(width: int, dtype: torch.dtype) -> bool:
    """Whether rows of this width and dtype can be multiplied so. The compiler knows bf16 alone."""
    known = DTYPES[:1] if torch.compiler.is_compiling() else DTYPES
    return dtype in known and width * dtype.itemsize % ALIGNMENT == 0


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x_i W_eᵀ for x (N, in), whose rows are sorted by e, and W (E, out, in): (N, out). Rows
    ends[e - 1] to ends[e] belong to matrix e; ends (E,) int32."""
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def grouped_back(dy: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """dy_i W_e for dy (N, out): (N, in), the gradient of x in `grouped_linear`."""
    return F.grouped_mm(dy, weights, offs=ends)


def grouped_update(x: Tensor, A: Tensor, B: Tensor, ends: Tensor, scale: float) -> Tensor:
    """s · B_e A_e x_i for x (N, in), A (E, r, in) and B (E, out, r), all of one dtype: (N, out)."""
    unaligned = -A.size(1) % (ALIGNMENT // x.element_size())
    if unaligned:  # rows and columns of zeros change nothing
        A, B = F.pad(A, (0, 0, 0, unaligned)), F.pad(B, (0, unaligned))
    return grouped_linear(grouped_linear(x, A, ends) * scale, B, ends)
