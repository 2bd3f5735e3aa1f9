"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads come from
one narrow latent of each token, which is all that generation keeps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.attention import attend, attend_apart, packed_attention
from litlora.kernels.rotary import halves, rotate
from litlora.lora import project
from litlora.model.cache import CacheBatch
from litlora.model.context import Context, pick
from litlora.model.norms import RMSNorm

EPS = 1e-6
"""Of the norms of latents, whatever the others have."""

READ = "kv_b_proj"
"""The linear layer whose weight is read while a single token is computed."""


class LatentAttention(nn.Module):
    """Causal self-attention over latents: R kv_lora_rank, N qk_nope_head_dim, P qk_rope_head_dim, E
    v_head_dim. A key is N values from the latent, and P rotated ones that all heads share."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.num_attention_heads
        self.rank, self.value_dim = config.kv_lora_rank, config.v_head_dim
        self.plain_dim, self.rotary_dim = config.qk_nope_head_dim, config.head_dim
        self.scale = config.latent_scale
        self.is_interleaved = bool(config.rope_interleaved)
        C, H, bias = config.hidden_size, self.num_heads, config.attention_bias
        queries = H * (self.plain_dim + self.rotary_dim)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(C, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.has_narrow_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(C, self.rank + self.rotary_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, EPS)
        self.kv_b_proj = nn.Linear(self.rank, H * (self.plain_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(H * self.value_dim, C, bias=bias)
        # An attribute, since compiled blocks leave it uncompiled: see litlora.train.compile.
        self.packed_attention = packed_attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions."""
        first = self.q_a_proj if self.has_narrow_queries else self.q_proj
        q, narrow = project(x, first, self.kv_a_proj_with_mqa)
        if self.has_narrow_queries:
            (q,) = project(self.q_a_layernorm(q), self.q_b_proj)
        latent, shared = narrow.split([self.rank, self.rotary_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # (B, 1, T, R)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, N + P)
        q, turned = q.split([self.plain_dim, self.rotary_dim], dim=-1)
        turned, shared = (self._rotated(part, context) for part in (turned, shared[:, None]))
        if context.cache is not None:
            # Latents and rotated parts side by side, in the place of the keys; there are no values.
            kept = torch.cat([latent, shared], dim=-1)
            seen = context.cache.append(self.layer, kept, kept[..., :0])
            apart = isinstance(context.cache, CacheBatch)
            kept = [one for one, _ in seen] if apart else seen[0]
            if x.size(1) == 1:
                y = self._of_one(q, turned, kept, context.mask)
                return project(y.transpose(1, 2).flatten(2), self.o_proj)[0]
            latent, shared = kept.split([self.rank, self.rotary_dim], dim=-1)
        y = self._attended(torch.cat([q, turned], dim=-1), latent, shared, context)
        y = pick(y.transpose(1, 2).flatten(2), context.positions)
        return project(y, self.o_proj)[0]

    def _rotated(self, x: Tensor, context: Context) -> Tensor:
        x = halves(x, self.rotary_dim) if self.is_interleaved else x
        # Under autocast this gives fp32; attention needs one dtype.
        return rotate(x, *context.rope).to(x.dtype)

    def _attended(self, q: Tensor, latent: Tensor, shared: Tensor, context: Context) -> Tensor:
        """q (B, H, T, N + P), latents (B, 1, S, R) and rotated parts (B, 1, S, P) -> (B, H, T, E)."""
        (both,) = project(latent[:, 0], self.kv_b_proj)
        both = both.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, S, N + E)
        k, v = both.split([self.plain_dim, self.value_dim], dim=-1)
        k = torch.cat([k, shared.to(k.dtype).expand(-1, self.num_heads, -1, -1)], dim=-1)
        # Kernels want queries, keys and values of one width.
        width = max(q.size(-1), self.value_dim)
        q, k, v = (F.pad(part.to(v.dtype), (0, width - part.size(-1))) for part in (q, k, v))
        if context.pack is None:
            y = attend(q, k, v, context.mask, scale=self.scale)
        else:
            y = self.packed_attention(q, k, v, context.pack, scale=self.scale)
        return y[..., : self.value_dim]

    def _of_one(self, q: Tensor, turned: Tensor, kept: Tensor | list[Tensor], mask: Tensor | None) -> Tensor:
        """One token that sees all that is kept (B, 1, S, R + P), or of sequences apart (1, 1, S, R + P)
        each: q (B, H, 1, N) and its rotated part (B, H, 1, P) -> (B, H, 1, E). It goes into the space of
        the latents and comes back: making keys and values of them would take S times as much."""
        W = self.kv_b_proj.weight.to(q.dtype).view(self.num_heads, -1, self.rank)
        keys, values = W.split([self.plain_dim, self.value_dim], dim=1)  # (H, N, R) and (H, E, R)
        inside = torch.cat([q @ keys, turned], dim=-1)  # (B, H, 1, R + P)
        if isinstance(kept, list):
            y = attend_apart(inside, [(one, one[..., : self.rank]) for one in kept], scale=self.scale)
        else:
            y = attend(inside, kept, kept[..., : self.rank], mask, scale=self.scale)
        return y @ values.transpose(1, 2)
