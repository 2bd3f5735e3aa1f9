"""Causal self-attention over queries, keys and values of each token."""

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.attention import attend, packed_attention
from litlora.kernels.rotary import halves, rotate
from litlora.lora import project
from litlora.model.context import Context, pick
from litlora.model.norms import make_head_norm


class Attention(nn.Module):
    """Causal grouped-query self-attention, with rotary positions if the layer has them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.clip = config.clip_qkv
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.gated = bool(config.attention_gate)
        self.q_proj = nn.Linear(config.hidden_size, H * self.head_dim * (1 + self.gated), bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, G * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, G * self.head_dim, bias=bias)
        output_bias = bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(H * self.head_dim, config.hidden_size, bias=output_bias)
        # An attribute, since compiled blocks leave it uncompiled: see litlora.train.compile.
        self.packed_attention = packed_attention
        self.sinks = nn.Parameter(torch.zeros(H)) if config.attention_sinks else None
        self.norm_all_heads = config.qk_norm == "all_heads"
        self.norm_rotated = config.qk_norm == "head_rotated"
        self.interleaved_dim = config.rotary_dim if config.rope_interleaved else None
        self.q_norm = make_head_norm(config, H)
        self.k_norm = make_head_norm(config, G)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions."""
        B, T, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        gate = None
        if self.gated:  # each head's query, and then its gate
            q, gate = (part.flatten(2) for part in q.unflatten(-1, (-1, 2, self.head_dim)).unbind(3))
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        if self.norm_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(B, T, -1, self.head_dim) for part in (q, k, v))  # (B, T, H·D) -> (B, T, H, D)
        if self.q_norm is not None and not (self.norm_all_heads or self.norm_rotated):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D); k and v (B, G, T, D)
        if context.rope is not None:
            if self.interleaved_dim is not None:
                q, k = (halves(part, self.interleaved_dim) for part in (q, k))
            # Under autocast this gives fp32; attention needs one dtype.
            q, k = (rotate(part, *context.rope).to(v.dtype) for part in (q, k))
        if self.norm_rotated:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.query_scale is not None:
            q = q * context.query_scale
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
            if T == 1 and self.window is not None:
                k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        if context.pack is None:
            y = attend(q, k, v, context.mask, scale=self.scale, softcap=self.softcap, sinks=self.sinks)
        else:
            scores = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
            y = self.packed_attention(q, k, v, context.pack, window=self.window, **scores)
        y = pick(y.transpose(1, 2).reshape(B, T, -1), context.positions)
        if gate is not None:
            y = y * pick(gate, context.positions).sigmoid()
        return project(y, self.o_proj)[0]
