"""The normalisations that an architecture may have."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """RMSNorm in fp32; with a frozen weight, it keeps little for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class WeightlessRMSNorm(nn.Module):
    """RMSNorm without weights, in fp32 or better."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, x.shape[-1:], eps=self.eps).to(x.dtype)


class RMSNormPlusOne(nn.Module):
    """RMSNorm that multiplies by 1 + weight, in fp32 throughout (Gemma). 1 + weight is not stored:
    it would round in bf16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return rms_norm(x, 1 + exact, self.eps)


class LayerNormPlusOne(nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight (Nemotron), in fp32 or better: 1 + weight would round
    in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        weight, bias = 1 + self.weight.to(exact), self.bias.to(exact)
        return F.layer_norm(x.to(exact), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class HeadNorms(nn.Module):
    """A LayerNorm for each head: (..., H, D) -> (..., H, D)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(head_dim, eps, bias=False) for _ in range(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(head) for norm, head in zip(self.norms, x.unbind(-2), strict=True)], dim=-2)


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """The architecture's normalisation over the last dimension, of hidden_size unless another size
    is given."""
    size = size or config.hidden_size
    if config.norm == "layernorm_plain":
        return nn.LayerNorm(size, config.norm_eps, elementwise_affine=False)
    if config.norm == "layernorm_no_bias":
        return nn.LayerNorm(size, config.norm_eps, bias=False)
    kinds = {
        "rmsnorm": RMSNorm,
        "rmsnorm_plus_one": RMSNormPlusOne,
        "layernorm": nn.LayerNorm,
        "layernorm_plus_one": LayerNormPlusOne,
    }
    return kinds[config.norm](size, config.norm_eps)


def make_head_norm(config: ModelConfig, num_heads: int, head_dim: int) -> nn.Module | None:
    """The normalisation of queries or keys, if there is one."""
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "l2_rotated":
        return WeightlessRMSNorm(config.norm_eps)
    if config.qk_norm == "each_head":
        return HeadNorms(num_heads, head_dim, config.norm_eps)
    shared = config.qk_norm in ("head", "head_rotated")
    return make_norm(config, head_dim if shared else num_heads * head_dim)
