"""One layer of the model: attention and MLP with their norms."""

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.model.altup import AltUp, Laurel
from litlora.model.attention import Attention
from litlora.model.context import Context, pick
from litlora.model.delta_net import DeltaNet
from litlora.model.experts import MixtureOfExperts, WithExperts
from litlora.model.latent_attention import LatentAttention
from litlora.model.mlp import MLP
from litlora.model.norms import make_norm
from litlora.model.per_layer import WithGate


class Block(WithGate, WithExperts):
    """Attention and MLP, each added to the residual stream; norms on their input, output or
    both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_position = config.norm_position
        self.multiplier = config.residual_multiplier
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_norm
        # The names are those of the families: where only inputs are normalised, the norm of the
        # MLP's input is called post_attention_layernorm.
        self.input_layernorm = nn.Identity() if self.norm_position == "after" else make_norm(config)
        self.is_linear = config.is_linear(layer)
        if self.is_linear:
            self.linear_attn = DeltaNet(config, layer)
        else:
            is_latent = config.kv_lora_rank is not None
            self.self_attn = LatentAttention(config, layer) if is_latent else Attention(config, layer)
        self.post_attention_layernorm = nn.Identity() if self.shared_norm else make_norm(config)
        if self.norm_position != "before":
            self.pre_feedforward_layernorm = (
                make_norm(config) if self.norm_position == "both" else nn.Identity()
            )
            self.post_feedforward_layernorm = make_norm(config)
        beside = config.num_experts is None or config.enable_moe_block
        sparse = not beside and layer not in config.dense_layers
        is_wide = config.use_double_wide_mlp and config.shares_keys(layer)
        width = config.intermediate_size * (2 if is_wide else 1)
        cut = config.activation_sparsity if layer in (config.sparse_mlp_layers or ()) else None
        self.mlp = MixtureOfExperts(config) if sparse else MLP(config, width, cut)
        has_streams = config.altup_num_inputs is not None
        self.altup, self.laurel = (AltUp(config), Laurel(config)) if has_streams else (None, None)
        self.add_experts(config)
        self.add_gate(config)
        self.register_buffer("layer_scalar", torch.ones(1) if config.layer_scalar else None)

    @property
    def is_plain(self) -> bool:
        """Whether it adds attention to its input, then the MLP, and does nothing else."""
        others = (self.altup, self.laurel, self.router, self.gate_activation, self.layer_scalar)
        scales_all = self.multiplier is None or self.norm_position == "before"
        is_softmax = not self.is_linear and not self.parallel
        return is_softmax and scales_all and all(other is None for other in others)

    @property
    def norms(self) -> list[nn.Module | None]:
        """Of a plain block: of the input, of what attention gives, of the MLP's input, of what it gives."""
        if self.norm_position == "before":
            return [self.input_layernorm, None, self.post_attention_layernorm, None]
        more = (self.pre_feedforward_layernorm, self.post_feedforward_layernorm)
        return [self.input_layernorm, self.post_attention_layernorm, *more]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions. With several streams
        (B, T, S, C) the layer computes with the first."""
        streams = None
        if self.altup is not None:
            streams = self.altup.predicted(x)
            x = streams[:, :, 0]
        normed = self.input_layernorm(x)
        attention = self.linear_attn if self.is_linear else self.self_attn
        attended = self._scaled(attention(normed, context))
        x = pick(x, context.positions)
        if self.parallel:
            normed = pick(normed, context.positions)
            normed = normed if self.shared_norm else self.post_attention_layernorm(x)
            return x + attended + self._scaled(self.mlp(normed))
        if self.norm_position == "before":
            x = x + attended
            return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))
        x = x + self.post_attention_layernorm(attended)
        if self.laurel is not None:
            x = (x + self.laurel(pick(normed, context.positions))) * 2**-0.5
        fed = self.with_experts(self.mlp(self.pre_feedforward_layernorm(x)), x)
        x = x + self.post_feedforward_layernorm(fed)
        given = pick(context.per_layer, context.positions)
        if streams is not None:
            streams = self.altup.corrected(pick(streams, context.positions), x)
            scaled = streams[:, :, 0] * self.altup.correct_output_scale
            return self.altup.with_made(streams, self.of_layer_input(scaled, given))
        if given is not None:
            x = x + self.of_layer_input(x, given)
        return x if self.layer_scalar is None else x * self.layer_scalar.to(x.dtype)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier is None else x * self.multiplier
