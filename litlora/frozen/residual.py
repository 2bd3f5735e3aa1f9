"""A frozen weight less a low-rank product: what PiSSA and OLoRA leave of W."""

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.frozen.weight import FrozenWeight


class Residual(FrozenWeight):
    """W - s · B A, of a W that stays as it is stored, in whatever form.

    The difference is never rounded to the dtype of W, and takes no memory: s · B A x is subtracted
    from W x.
    """

    def __init__(self, weight: FrozenWeight, A: Tensor, B: Tensor, scale: float) -> None:
        """A (r, in), B (out, r)."""
        self.weight, self.A, self.B, self.scale = weight, A, B, scale
        self.differentiable = weight.differentiable

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.weight.times(x, bias)
        # As the update beside it is computed: what has not changed since the start cancels.
        return y.sub_(F.linear(F.linear(x, self.A.to(x.dtype)) * self.scale, self.B.to(x.dtype)))

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        result = self.weight.back(dy, into)
        return result.addmm_(dy @ self.B.to(dy.dtype), self.A.to(dy.dtype), alpha=-self.scale)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        B, A = (factor.to(self.dtype) for factor in (self.B[rows], self.A))
        return torch.addmm(self.weight.rows(rows).to(self.dtype), B, A, alpha=-self.scale)
