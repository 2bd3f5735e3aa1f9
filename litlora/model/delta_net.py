"""Linear attention by the gated delta rule (Gated DeltaNet: Yang, Kautz and Hatamizadeh 2024,
arXiv:2412.06464), as Qwen3-Next has it in place of most of its attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.delta_rule import causal_convolution, chunked_delta_rule, recurrent_delta_rule
from litlora.kernels.lora import ACTIVATIONS
from litlora.lora import project
from litlora.model.context import Context, pick
from litlora.model.norms import RMSNorm

EPS = 1e-6
"""Of the lengths of queries and keys."""


class DeltaNet(nn.Module):
    """Mixes tokens through a state of a fixed size, which each token reads and changes.

    The names are those of the family: in_proj_qkvz gives queries, keys, values and gates of the
    output; in_proj_ba how fast the state learns and decays. Qwen 3.5 has in_proj_qkv, in_proj_z,
    in_proj_b and in_proj_a instead.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.activation = config.hidden_act
        C, values = config.hidden_size, self.value_heads * self.value_dim
        channels, width = config.linear_channels, config.linear_conv_kernel_dim
        # It holds the filters alone: the sum over the tokens is in causal_convolution.
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.norm = RMSNorm(self.value_dim, config.norm_eps)
        self.split = bool(config.linear_split)
        sizes = {"qkvz": channels + values, "ba": 2 * self.value_heads}
        if self.split:
            sizes = {"qkv": channels, "z": values, "b": self.value_heads, "a": self.value_heads}
        for name, size in sizes.items():
            self.add_module(f"in_proj_{name}", nn.Linear(C, size, bias=False))
        self.out_proj = nn.Linear(values, C, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions."""
        lengths = None if context.pack is None else context.pack.lengths
        mixed, gate, slow, rate = self._projected(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        inputs, state = self._past(mixed, context, exact)
        last = torch.cat([inputs, mixed[:, -inputs.size(1) :]], dim=1)[:, -inputs.size(1) :]
        mixed = ACTIVATIONS[self.activation](
            causal_convolution(mixed, self.conv1d.weight.to(mixed.dtype), inputs, lengths)
        )
        keys = self.key_heads * self.key_dim
        q, k, v = mixed.to(exact).split([keys, keys, self.value_heads * self.value_dim], dim=-1)
        q, k = (self._of_each_value_head(part) for part in (q, k))
        v = v.unflatten(-1, (self.value_heads, self.value_dim))
        decay = -self.A_log.to(exact).exp() * F.softplus(slow.to(exact) + self.dt_bias.to(exact))
        rule = recurrent_delta_rule if x.size(1) == 1 else chunked_delta_rule
        y, state = rule(q * self.key_dim**-0.5, k, v, decay, rate.to(exact).sigmoid(), state, lengths)
        if context.cache is not None:
            context.cache.keep(self.layer, last, state)
        y, gate = (pick(part.flatten(2), context.positions) for part in (y.to(x.dtype), gate))
        heads = (self.value_heads, self.value_dim)
        y = self.norm(y.unflatten(-1, heads)) * F.silu(gate.to(exact).unflatten(-1, heads))
        return project(y.to(x.dtype).flatten(2), self.out_proj)[0]

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, C) -> queries, keys and values (B, T, channels); gates (B, T, H, V); what decay and
        rate are made of, (B, T, H) each."""
        if self.split:
            mixed, gate, rate, slow = project(
                x, self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a
            )
            return mixed, gate.unflatten(-1, (self.value_heads, self.value_dim)), slow, rate
        # Their rows are grouped by key head.
        qkvz, ba = project(x, self.in_proj_qkvz, self.in_proj_ba)
        each = self.value_heads // self.key_heads
        values = each * self.value_dim
        q, k, v, gate = qkvz.unflatten(-1, (self.key_heads, -1)).split(
            [self.key_dim, self.key_dim, values, values], dim=-1
        )
        rate, slow = ba.unflatten(-1, (self.key_heads, -1)).split([each, each], dim=-1)
        mixed = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        gate = gate.flatten(2).unflatten(-1, (self.value_heads, self.value_dim))
        return mixed, gate, slow.flatten(2), rate.flatten(2)

    def _of_each_value_head(self, x: Tensor) -> Tensor:
        """Queries or keys (B, T, keys) of length 1, repeated for the value heads: (B, T, H, K)."""
        x = x.unflatten(-1, (self.key_heads, self.key_dim))
        x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)
        return x.repeat_interleave(self.value_heads // self.key_heads, dim=2)

    def _past(self, mixed: Tensor, context: Context, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        """The last inputs of the convolution (B, W - 1, channels), and the state."""
        if context.cache is not None:
            return context.cache.past(self.layer)
        B, width = mixed.size(0), self.conv1d.weight.size(2)
        shape = (B, self.value_heads, self.key_dim, self.value_dim)
        return mixed.new_zeros(B, width - 1, mixed.size(2)), mixed.new_zeros(shape, dtype=exact)
