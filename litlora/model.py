"""One GPT for every family, driven by `ModelConfig`.

Module names are Hugging Face Llama's, so that such a file loads without renaming and LoRA targets
are the names people know. Shapes: B batch, T tokens, C hidden_size, H heads, G key/value heads, D
head_dim, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.frozen.bitsandbytes import Quantized
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.streamed import StreamedEmbedding
from litlora.kernels.attention import Pack, attend, causal_mask, packed_attention
from litlora.kernels.lora import ACTIVATIONS
from litlora.kernels.rotary import Rope, RotaryTable, halves, rotate
from litlora.lora import LoRAEmbedding, gated_mlp, project
from litlora.norms import make_head_norm, make_norm


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, G, max_length, D) buffers a
    layer."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.length = 0
        """Tokens held; the next one gets this position."""
        self._layers = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) of new tokens after those held; returns all, (B, G, length + T,
        D)."""
        end = self.length + k.size(2)
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class Context(NamedTuple):
    """What a block needs to know of the tokens that it computes, beside their hidden states."""

    rope: Rope | None = None
    """The rotation of each token's queries and keys, if the layer has one."""
    mask: Tensor | None = None
    """(T, S): what each token sees; None if attention knows by itself."""
    cache: KVCache | None = None
    """The tokens before these, if any."""
    pack: Pack | None = None
    """How the B · T tokens divide into sequences; None: each of the B rows is one."""
    positions: Tensor | None = None
    """(M,), places of the flattened B · T tokens: the others are attended to, and not computed any
    further."""
    query_scale: Tensor | None = None
    """(T, 1): factor of each token's queries, if the architecture has one."""


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
        self.q_proj = nn.Linear(config.hidden_size, H * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, G * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, G * self.head_dim, bias=bias)
        output_bias = bias if config.attention_output_bias is None else config.attention_output_bias
        self.o_proj = nn.Linear(H * self.head_dim, config.hidden_size, bias=output_bias)
        # An attribute, since compiled blocks leave it uncompiled: see litlora.train.compile.
        self.packed_attention = packed_attention
        self.norm_all_heads = config.qk_norm == "all_heads"
        self.norm_rotated = config.qk_norm == "head_rotated"
        self.interleaved_dim = config.rotary_dim if config.rope_interleaved else None
        self.q_norm = make_head_norm(config, H)
        self.k_norm = make_head_norm(config, G)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions."""
        B, T, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
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
            y = attend(q, k, v, context.mask, scale=self.scale, softcap=self.softcap)
        else:
            y = self.packed_attention(
                q, k, v, context.pack, scale=self.scale, window=self.window, softcap=self.softcap
            )
        return project(pick(y.transpose(1, 2).reshape(B, T, -1), context.positions), self.o_proj)[0]


class MLP(nn.Module):
    """The feed-forward half of a block: gated (Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.gate_proj = (
            nn.Linear(config.hidden_size, size, bias=config.mlp_bias) if config.mlp == "gated" else None
        )
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = XIELU() if self.activation == "xielu" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.activation)
        (inner,) = project(x, self.up_proj)
        activate = self.act_fn or ACTIVATIONS[self.activation]
        return project(activate(inner), self.down_proj)[0]


class XIELU(nn.Module):
    """An activation with trained weights (Huang and Schlag 2024, arXiv:2411.13010): with p and n
    positive, p x² + β x for x > 0, else n (eˣ - 1 - x) + β x."""

    BETA, EPS = 0.5, -1e-6

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.zeros(1))
        self.alpha_n = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        p, n = F.softplus(self.alpha_p), self.BETA + F.softplus(self.alpha_n)
        negative = torch.expm1(x.clamp(max=self.EPS)) - x  # EPS: as the weights were trained
        return torch.where(x > 0, p * x * x, n * negative) + self.BETA * x


class Router(nn.Module):
    """Scores of each token: x Wᵀ. Not an nn.Linear, since adapters on all linear layers leave it
    out."""

    def __init__(self, hidden_size: int, num_scores: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scores, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MixtureOfExperts(nn.Module):
    """Each token goes through the experts that score highest, and through the shared expert if
    there is one (Jiang et al. 2024, arXiv:2401.04088)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_picked = config.num_experts_per_tok
        self.norm_shares = config.norm_topk_prob
        self.gate = Router(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Router(config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))  # (B, T, C) -> (N, C)
        # fp32: the shares decide which experts are picked
        scores = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        shares, picked = scores.topk(self.num_picked)  # (N, num_picked)
        if self.norm_shares:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(picked == number)
            # In training, an expert that no token picked runs on no rows: its gradient is then zero
            # instead of absent.
            if len(rows) or torch.is_grad_enabled():
                y = y.index_add(0, rows, (expert(tokens[rows]) * shares[rows, places, None]).to(y.dtype))
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return y.view_as(x)


class Block(nn.Module):
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
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.Identity() if self.shared_norm else make_norm(config)
        if self.norm_position != "before":
            self.pre_feedforward_layernorm = (
                make_norm(config) if self.norm_position == "both" else nn.Identity()
            )
            self.post_feedforward_layernorm = make_norm(config)
        sparse = config.num_experts is not None and layer not in config.dense_layers
        self.mlp = MixtureOfExperts(config) if sparse else MLP(config, config.intermediate_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) at the context's positions."""
        normed = self.input_layernorm(x)
        attended = self._scaled(self.self_attn(normed, context))
        x = pick(x, context.positions)
        if self.parallel:
            normed = pick(normed, context.positions)
            normed = normed if self.shared_norm else self.post_attention_layernorm(x)
            return x + attended + self._scaled(self.mlp(normed))
        if self.norm_position == "before":
            x = x + attended
            return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier is None else x * self.multiplier


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self._windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self._ropes = [config.rope(layer) for layer in range(config.num_hidden_layers)]
        # Filled on first use, and not part of a checkpoint, since they are computed.
        self._tables = {
            rope: RotaryTable(config.rotary_dim, *rope, config.max_position_embeddings)
            for rope in self._ropes
            if rope
        }

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """With `lengths`, input_ids (1, N) is a pack of sequences of these lengths, each of which
        sees itself alone.

        With `positions` (M,) of the flattened input_ids, only the hidden states there are returned,
        (1, M, C).
        """
        start, T = cache.length if cache is not None else 0, input_ids.size(1)
        pack = Pack(lengths) if lengths is not None else None
        x = self._embed(input_ids, start, pack)
        masks = {}
        if pack is None:
            masks = {window: causal_mask(T, start, window, x.device) for window in set(self._windows)}
        ropes = {
            rope: table.rows(start, T, x) if pack is None else table.packed_rows(pack, x)
            for rope, table in self._tables.items()
        }
        scale = self._query_scale(start, T, pack, x)
        for block, window, rope in zip(self.layers, self._windows, self._ropes, strict=True):
            last = block is self.layers[-1]
            places = positions if last else None
            context = Context(ropes.get(rope), masks.get(window), cache, pack, places, scale)
            x = block(x, context)
        if cache is not None:
            cache.length += T
        # Here, so that whatever multiplies by the head's weight has scaled logits.
        x, factor = self.norm(x), self.config.logit_scale
        return x if factor is None else x * factor

    def _query_scale(self, start: int, T: int, pack: Pack | None, like: Tensor) -> Tensor | None:
        """(T, 1): the factors of the queries at each position; None if the architecture has none."""
        beta, scaling = self.config.query_scale_beta, self.config.rope_scaling
        if beta is None:
            return None
        spans = [range(start, start + T)] if pack is None else [range(length) for length in pack.lengths]
        places = torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(like.device)
        turns = places // scaling.original_max_position_embeddings
        return (1 + beta * torch.log1p(turns.to(torch.float32)))[:, None].to(like.dtype)

    def _embed(self, input_ids: Tensor, start: int, pack: Pack | None) -> Tensor:
        """(B, T) -> (B, T, C); the first token has the position `start`."""
        x = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            # rounded to the embedding's dtype, as in training
            x = x * float(torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype))
        if self.config.embedding_multiplier is not None:
            x = x * self.config.embedding_multiplier
        if self.embed_positions is not None:
            spans = [(start, input_ids.size(1))] if pack is None else [(0, length) for length in pack.lengths]
            places = torch.cat([torch.arange(first, first + length) for first, length in spans])
            x = x + self.embed_positions(places.to(x.device))
        return x


class GPT(nn.Module):
    """A decoder-only language model: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.logits(self.model(input_ids, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)."""
        logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device in which the model computes."""
        embedding = self.model.embed_tokens
        inner = isinstance(embedding, StreamedEmbedding | LoRAEmbedding)
        return embedding.like if inner else embedding.weight

    @classmethod
    def without_weights(cls, config: ModelConfig) -> "GPT":
        """The model on the meta device: names and shapes only."""
        with torch.device("meta"), _SkipInit():
            return cls(config)

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of this model's weights;
        a tied head has no name of its own."""
        expected = {name: parameter.shape for name, parameter in self.named_parameters()}
        if missing := sorted(expected.keys() - tensors.keys()):
            raise CheckpointError(f"weight(s) missing: {shorten(missing)}")
        if unexpected := sorted(tensors.keys() - expected.keys()):
            raise CheckpointError(f"weight(s) that the architecture does not have: {shorten(unexpected)}")
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensors[name].shape)}; the architecture needs {tuple(shape)}"
                )

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor | Quantized]) -> "GPT":
        """A model that holds these very tensors: nothing is initialised or copied. A linear layer
        with a quantized weight is frozen.

        A tied head is stored once, under the embedding's name. Raises CheckpointError unless names
        and shapes fit exactly.
        """
        model = cls.without_weights(config)
        model.check_fit(tensors)
        dense = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        for name in tensors.keys() - dense.keys():
            layer, _, _ = name.rpartition(".")
            linear = model.get_submodule(layer)
            if type(linear) is nn.Linear:
                model.set_submodule(layer, FrozenLinear(QuantizedWeight(tensors[name]), linear.bias))
            else:
                dense[name] = tensors[name].tensor()
        # Detached: a Parameter among the tensors would become the model's own, and change when the
        # model's dtype or device does.
        model.load_state_dict(
            {name: tensor.detach() for name, tensor in dense.items()}, strict=False, assign=True
        )
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


class _SkipInit(TorchFunctionMode):
    """Skips initialisation: the meta device has nothing to fill, yet torch's first random number
    there costs a second of imports."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def pick(x: Tensor, positions: Tensor | None) -> Tensor:
    """x (B, T, C) at these positions (M,) of the B · T tokens: (1, M, C); x itself for None."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)[None]


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
