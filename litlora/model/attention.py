"""Causal self-attention over queries, keys and values of each token."""

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.attention import attend, attend_apart, last_seen, packed_attention
from litlora.kernels.rotary import Rope, halves, rotate
from litlora.lora import project
from litlora.model.cache import CacheBatch, KVCache
from litlora.model.context import Context, Seen, pick
from litlora.model.norms import WeightlessRMSNorm, make_head_norm


class Attention(nn.Module):
    """Causal grouped-query self-attention, with rotary positions if the layer has them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window, self.chunk = config.window(layer), config.chunk(layer)
        is_rotated = config.rope(layer) is not None
        self.scales_queries = config.floor_scale is None or not is_rotated
        self.softcap, self.clip = config.attn_logit_softcapping, config.clip_qkv
        H, C, bias = config.num_attention_heads, config.hidden_size, config.attention_bias
        G, self.head_dim = config.heads(layer)
        self.heads, self.groups = H, G
        self.scale = (config.query_pre_attn_scalar or self.head_dim) ** -0.5
        self.gated = bool(config.attention_gate)
        self.q_proj = nn.Linear(C, H * self.head_dim * (1 + self.gated), bias=bias)
        # A layer that shares keys has none of its own, and one whose values are keys no values.
        self.shares_keys = config.shares_keys(layer)
        self.values_are_keys = bool(config.attention_k_eq_v) and self.window is None
        if not self.shares_keys:
            self.k_proj = nn.Linear(C, G * self.head_dim, bias=bias)
            if not self.values_are_keys:
                self.v_proj = nn.Linear(C, G * self.head_dim, bias=bias)
        output_bias = bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(H * self.head_dim, C, bias=output_bias)
        # An attribute, since compiled blocks leave it uncompiled: see litlora.train.compile.
        self.packed_attention = packed_attention
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None
        self.norm_all_heads = config.qk_norm == "all_heads"
        self.norm_rotated = config.qk_norm in ("head_rotated", "l2_rotated")
        self.interleaved_dim = config.rotary_dim if config.rope_interleaved else None
        has_norms = is_rotated or config.qk_norm != "l2_rotated"
        self.q_norm = make_head_norm(config, H, self.head_dim) if has_norms else None
        has_norms &= not self.shares_keys
        self.k_norm = make_head_norm(config, G, self.head_dim) if has_norms else None
        self.v_norm = WeightlessRMSNorm(config.norm_eps) if config.value_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions."""
        B, T, _ = x.shape
        own = () if self.shares_keys else (self.k_proj,)
        own += () if self.shares_keys or self.values_are_keys else (self.v_proj,)
        q, *others = project(x, self.q_proj, *own)
        gate = None
        if self.gated:  # each head's query, and then its gate
            q, gate = (part.flatten(2) for part in q.unflatten(-1, (-1, 2, self.head_dim)).unbind(3))
        q, *others = map(self._clipped, (q, *others))
        q, k = self._queries_and_keys(q, others, context)  # (B, H, T, D), (B, G, T, D)
        if context.query_scale is not None and self.scales_queries:
            q = q * context.query_scale
        seen = self._keys_and_values(k, others, context)
        y = self._attended(q, seen, context)
        y = pick(y.transpose(1, 2).reshape(B, T, -1), context.positions)
        if gate is not None:
            y = y * pick(gate, context.positions).sigmoid()
        return project(y, self.o_proj)[0]

    def _queries_and_keys(
        self, q: Tensor, others: list[Tensor], context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """Of what was projected, (B, T, H·D): normalised and rotated, (B, H, T, D); no keys in a layer
        that shares them."""
        dtype, parts, norms = q.dtype, [q, *others[:1]], (self.q_norm, self.k_norm)
        if self.norm_all_heads:
            parts = [norm(x) for x, norm in zip(parts, norms, strict=False)]
        of_heads = (None, None) if self.norm_all_heads or self.norm_rotated else norms
        parts = [self._heads(x, norm) for x, norm in zip(parts, of_heads, strict=False)]
        if context.rope is not None:
            parts = self._rotated(parts, context.rope, dtype)
        if self.norm_rotated and self.q_norm is not None:
            parts = [norm(x) for x, norm in zip(parts, norms, strict=False)]
        return parts[0], parts[1] if others else None

    def _keys_and_values(self, k: Tensor | None, projected: list[Tensor], context: Context) -> Seen:
        """Of all tokens so far: this layer's own, the keys k and values of what it projected
        (B, T, G·D), or those that it shares."""
        kind = self.window is not None
        if self.shares_keys:
            return context.keys[kind]
        v = self._heads(projected[-1], self.v_norm)
        seen = (k, v) if context.cache is None else context.cache.append(self.layer, k, v)
        if context.keys is not None:
            context.keys[kind] = seen
        return seen

    def _attended(self, q: Tensor, seen: Seen, context: Context) -> Tensor:
        """Queries (B, H, T, D) -> (B, H, T, D)."""
        scores = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        if isinstance(context.cache, CacheBatch):
            return attend_apart(q, seen, window=self.window, chunk=self.chunk, **scores)
        k, v = seen
        if context.pack is not None:
            reach = {"window": self.window, "chunk": self.chunk}
            return self.packed_attention(q, k, v, context.pack, **reach, **scores)
        if isinstance(context.cache, KVCache) and q.size(2) == 1:
            k, v = last_seen(k, v, self.window, self.chunk)
        return attend(q, k, v, context.mask, **scores)

    def _heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Queries, keys or values (B, T, H·D) -> (B, H, T, D), each head normalised."""
        if norm is None and x.size(1) == 1:  # nothing to move
            return x.reshape(x.size(0), -1, 1, self.head_dim)
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _rotated(self, parts: list[Tensor], rope: Rope, dtype: torch.dtype) -> list[Tensor]:
        """Queries (B, H, T, D), and the keys if the layer has them, rotated, in this dtype."""
        if len(parts) == 2 and parts[0].size(2) == 1:
            # One token: as many operations for both as for one, on little memory.
            (both,) = self._rotated([torch.cat(parts, dim=1)], rope, dtype)
            return both.split([part.size(1) for part in parts], dim=1)
        if self.interleaved_dim is not None:
            parts = [halves(x, self.interleaved_dim) for x in parts]
        # Under autocast this gives fp32; attention needs one dtype.
        return [rotate(x, *rope).to(dtype) for x in parts]

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)
