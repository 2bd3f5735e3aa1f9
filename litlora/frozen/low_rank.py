"""A product of two narrow matrices that is taken out of a weight with the same bits on every machine."""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class LowRank:
    """B A (out, in), of factors in bf16.

    No two machines compute the last bits of a matrix product alike, as its sums have no fixed order.
    Here the order is that of the rank, and a product of two values in bf16 is exact in fp32, whether
    or not it is rounded before it is added.
    """

    A: Tensor
    """(r, in)."""
    B: Tensor
    """(out, r)."""

    def __post_init__(self) -> None:
        """Raises ValueError for factors that make no such product."""
        A, B = self.A, self.B
        if A.dtype != DTYPE or B.dtype != DTYPE:
            raise ValueError(f"its factors are in {A.dtype} and {B.dtype}, and must be in {DTYPE}")
        if not (A.ndim == B.ndim == 2 and A.size(0) == B.size(1) > 0):
            raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} make no product")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError("it holds values that are not finite")

    @classmethod
    def near(cls, A: Tensor, B: Tensor, scale: float) -> "LowRank":
        """s · B A of a positive s, with each factor rounded, on the CPU."""
        root = scale**0.5
        return cls(*((factor * root).to("cpu", DTYPE).contiguous() for factor in (A, B)))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.B.size(0), self.A.size(1)))

    def take_out(self, W: Tensor, rows: slice) -> None:
        """Subtract these rows of the product from those of a weight, (n, in) in fp32, in place."""
        A, B = self.A.float(), self.B[rows].float()
        for a, b in zip(A, B.T, strict=True):
            W.addcmul_(b[:, None], a, value=-1)
