"""Products of two factors, B A, that are never formed: singular values, norm, distance.

ΔW = s · B A is (out, in), of a convolution (out, in · kernel). With B = Q_B R_B and A^T = Q_A R_A
it is Q_B (s · R_B R_A^T) Q_A^T, so the singular value decomposition of the small matrix in the
middle, rank x rank, is that of the whole. All of it is in float64, which costs milliseconds a
layer.
"""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from litlora.lora import Update

ROUNDING = 1e-9
"""Factors in fp32 cannot hold a smaller share of ΔW than this; anything below it does not count
towards the rank."""
NOISE = 1e-14
"""Terms that cancel out leave this share of ‖B‖ ‖A‖ behind, which float64 cannot tell from zero."""


def svd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and Vt (k, in) of B A, without the scale, in float64; k is the smallest of
    rank, out and in."""
    B, A = update.matrices
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vt @ Q_A.T


def least_rank(S: Tensor, max_error: float, noise: float = 0.0) -> int:
    """How many of these singular values, largest first, must be kept so that the rest is within
    `max_error` of the whole, or within `noise`; at least 1."""
    rest = S.square().flip(0).cumsum(0).flip(0).sqrt()  # rest[k]: the norm of all from the k-th on
    return max(1, int((rest > max(max(max_error, ROUNDING) * rest[0].item(), noise)).sum()))


def norm(update: Update) -> float:
    """‖ΔW‖, Frobenius."""
    B, A = update.matrices
    return _norm(B.double() * update.scale, A.double())


def difference(one: Update, other: Update) -> float:
    """‖ΔW - ΔW'‖, Frobenius, of the factors as they are stored."""
    if one is other:
        return 0.0
    (B, A), (other_B, other_A) = ([factor.double() for factor in update.matrices] for update in (one, other))
    return _norm(torch.cat([B * one.scale, other_B * -other.scale], dim=1), torch.cat([A, other_A]))


def _norm(B: Tensor, A: Tensor) -> float:
    R_B, R_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    found = torch.linalg.norm(R_B @ R_A.T).item()
    return 0.0 if found <= NOISE * (R_B.norm() * R_A.norm()).item() else found


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a computed factor: the given one, but at least fp32, so that storing it adds no
    error."""
    return torch.promote_types(dtype, torch.float32)


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all these tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
