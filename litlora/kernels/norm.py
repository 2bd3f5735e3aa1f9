"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467). With a frozen weight, it keeps the input and
one number a row for the backward."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.kernels import cpu


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension, in fp32 or better, rounded once to
    x's dtype."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(exact), weight.shape, weight.to(exact), eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As plain_rms_norm, by the fastest way to the same values and gradients."""
    # A compiler fuses the plain one by itself; torch 2.11's turns the in-place operations below
    # into a wrong gradient.
    if (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not weight.requires_grad
        and not torch.compiler.is_compiling()
    ):
        return _RMSNorm.apply(x, weight, eps)
    if (y := cpu.rms_norm(x, weight, eps)) is not None:
        return y
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # computes in fp32 by itself
    return plain_rms_norm(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)  # (..., 1)
        inverse = torch.rsqrt(length.square_().div_(x.size(-1)).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)  # a bf16 x times an fp32 column is fp32

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        # y = x · i · w with i = (mean(x²) + eps)^-½. With g = dy · w,
        # dx = i · (g - x · i² · mean(g · x)).
        g = upstream * weight.to(inverse.dtype)
        share = (g * x).mean(dim=-1, keepdim=True).mul_(inverse.square())
        return g.sub_(x * share).mul_(inverse).to(x.dtype), None, None
