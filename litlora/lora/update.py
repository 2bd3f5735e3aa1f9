"""One layer's low-rank update: its tensors, its scale, and the one place where the formula stands.

W' = W + s · B A, with s = alpha / r (Hu et al. 2021, arXiv:2106.09685), or alpha / √r (rsLoRA,
Kalajdzievski 2023, arXiv:2312.03732); what another variant adds to it, `litlora/lora/variants.py`
says.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from litlora.errors import UserError

LORA_A, LORA_B = "lora_A", "lora_B"
"""What the two factors are called in a module and in a file, behind the layer's name."""
PREFIX = "lora_"
"""What the names of all tensors of an update begin with."""


@dataclass(frozen=True)
class Update:
    """What a layer's factors, and what a variant keeps beside them, add to its weight."""

    A: Tensor
    """(r, in), or (r, in, *kernel) of a convolution."""
    B: Tensor
    """(out, r), or (out, r, 1, ...) of a convolution."""
    scale: float = 1.0
    kind: Literal["linear", "conv1d", "embedding"] = "linear"
    """conv1d and embedding: the weight is stored as (in, out), so that the update is added
    transposed."""
    variant: str = "lora"
    """What the tensors mean: the name of one of `litlora.lora.variants.VARIANTS`."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What the variant keeps beside A and B, by its name in a file (lora_...)."""

    @property
    def rank(self) -> int:
        return self.A.size(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this is for."""
        shape = (self.B.size(0), *self.A.shape[1:])
        return shape if self.kind == "linear" else shape[::-1]

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), of a convolution A (r, in · kernel)."""
        return self.B.flatten(1), self.A.flatten(1)

    def with_matrices(self, B: Tensor, A: Tensor) -> "Update":
        """The update with other factors, of any rank: B (out, r) and A (r, in) take on the form that
        its own have."""
        B = B.reshape(*B.shape, *self.B.shape[2:])
        A = A.reshape(A.size(0), *self.A.shape[1:])
        return dataclasses.replace(self, B=B.contiguous(), A=A.contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names behind the layer's."""
        return {LORA_A: self.A, LORA_B: self.B, **self.extra}

    def detached(self) -> "Update":
        """The same tensors, of which no gradient is asked for."""
        extra = {name: tensor.detach() for name, tensor in self.extra.items()}
        return dataclasses.replace(self, A=self.A.detach(), B=self.B.detach(), extra=extra)

    def product(self) -> Tensor:
        """s · B A, (out, in), of a convolution (out, in · kernel), in fp32 or better."""
        B, A = self.matrices
        exact = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
        return self.scale * (B.to(exact) @ A.to(exact))

    def add_product(self, total: Tensor, rows: slice = slice(None), factor: float = 1.0) -> Tensor:
        """Add these rows of factor · s · B A to `total`, the same rows of a weight in fp32 or better,
        in place; returns it."""
        B, A = (matrix.to(total.dtype) for matrix in (self.matrices[0][rows], self.matrices[1]))
        if self.kind == "linear":
            total.view(len(total), -1).addmm_(B, A, alpha=factor * self.scale)
        else:
            total.add_((B @ A).T, alpha=factor * self.scale)
        return total

    def add_to(self, total: Tensor, before: Tensor, rows: slice = slice(None), factor: float = 1.0) -> Tensor:
        """Add these rows of factor · (W' - W) to `total` in place; `before` are the same rows of W,
        the weight that the update was trained on. Both (n, in), `total` in fp32 or better."""
        from litlora.lora.variants import variant_named

        return variant_named(self.variant).add_to(total, self, before, rows, factor)

    def added_to(self, W: Tensor) -> Tensor:
        """W', summed in fp32 or better and rounded once to W's dtype: (out, in)."""
        total = W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
        return self.add_to(total, W).to(W.dtype)


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor in front of B A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def fitting(factor: float, what: str) -> float:
    """The factor of an update, if fp32 can hold it. Raises UserError that begins with `what`."""
    if not abs(factor) <= torch.finfo(torch.float32).max:
        raise UserError(f"{what}: times {factor:g}, which is beyond fp32; name a smaller strength or weight")
    return factor
