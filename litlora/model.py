"""One GPT for every family, driven by `ModelConfig`.

Module names are Hugging Face Llama's, so that such a file loads without renaming and LoRA targets
are the names people know. Shapes: B batch, T tokens, C hidden_size, H heads, G key/value heads, D
head_dim, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litlora.config import ModelConfig, RopeScaling
from litlora.errors import CheckpointError
from litlora.kernels.attention import Pack, attend, causal_mask, packed_attention
from litlora.kernels.lora import ACTIVATIONS
from litlora.kernels.norm import rms_norm
from litlora.kernels.sizes import few
from litlora.lora import gated_mlp, project

Rope = tuple[Tensor, Tensor]
"""Cosines and sines (T, R) of the positions at hand, for the R rotated dimensions of a head."""


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
        """Store k, v (B, G, T, D) of the new tokens behind those held; return all (B, G, length +
        T, D)."""
        end = self.length + k.size(2)
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal grouped-query self-attention; positions by rotation (Su et al. 2021,
    arXiv:2104.09864), if the layer has them."""

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
        self.packed_attention = (
            packed_attention  # an attribute: what compiles a block leaves this out, see litlora.train.compile
        )
        self.norm_all_heads = config.qk_norm == "all_heads"
        self.q_norm = make_head_norm(config, H)
        self.k_norm = make_head_norm(config, G)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        cache: KVCache | None,
        pack: Pack | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) of the `wanted` (M,) of the B · T tokens."""
        B, T, _ = x.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if self.clip is not None:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        if self.norm_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(B, T, -1, self.head_dim) for part in (q, k, v))  # (B, T, H·D) -> (B, T, H, D)
        if self.q_norm is not None and not self.norm_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
        )  # (B, H, T, D); k and v (B, G, T, D)
        if rope is not None:
            q, k = (
                rotate(part, *rope).to(v.dtype) for part in (q, k)
            )  # under autocast fp32 comes out; attention wants one dtype
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            if T == 1 and self.window is not None:
                k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        if pack is None:
            y = attend(q, k, v, mask, scale=self.scale, softcap=self.softcap)
        else:
            y = self.packed_attention(
                q, k, v, pack, scale=self.scale, window=self.window, softcap=self.softcap
            )
        return project(pick(y.transpose(1, 2).reshape(B, T, -1), wanted), self.o_proj)[0]


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

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.activation)
        (inner,) = project(x, self.up_proj)
        return project(ACTIVATIONS[self.activation](inner), self.down_proj)[0]


class Router(nn.Module):
    """Scores of each token: x W^T. A module of its own kind, as an adapter on all linear layers
    does not mean it."""

    def __init__(self, hidden_size: int, num_scores: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scores, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MixtureOfExperts(nn.Module):
    """Each token goes through the experts that score highest, and through the shared one if there
    is one (arXiv:2401.04088)."""

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
        scores = self.gate(tokens).softmax(
            dim=-1, dtype=torch.float32
        )  # fp32: the shares decide who is picked
        shares, picked = scores.topk(self.num_picked)  # (N, num_picked)
        if self.norm_shares:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(picked == number)
            # In training an expert that nobody picked computes nothing on no rows, so that its
            # gradient is zero, not absent.
            if len(rows) or torch.is_grad_enabled():
                y = y.index_add(0, rows, (expert(tokens[rows]) * shares[rows, places, None]).to(y.dtype))
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return y.view_as(x)


class Block(nn.Module):
    """Attention and MLP, each added to the stream; norms on their input, their output or both."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_position, self.parallel, self.shared_norm = (
            config.norm_position,
            config.parallel_residual,
            config.shared_norm,
        )
        # The names are those of the families: where only inputs are normalised, the MLP's norm is
        # post_attention_layernorm.
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

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        mask: Tensor | None,
        cache: KVCache | None,
        pack: Pack | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C), or (1, M, C) of the `wanted` (M,) of the B · T tokens: all are
        attended to, no other is computed on."""
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, rope, mask, cache, pack, wanted)
        x = pick(x, wanted)
        if self.parallel:
            normed = pick(normed, wanted)
            return x + attended + self.mlp(normed if self.shared_norm else self.post_attention_layernorm(x))
        if self.norm_position == "before":
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


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
        # filled on first use: computed, so no part of any checkpoint
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
        wanted: Tensor | None = None,
    ) -> Tensor:
        """With `lengths`, input_ids (1, N) holds sequences of these lengths one behind the other:
        none sees another.

        With `wanted` (M,), places in the flattened input_ids, only their hidden states come back,
        (1, M, C).
        """
        num_tokens = input_ids.size(1)
        if lengths is not None and (
            spare := few(num_tokens, self.embed_tokens.weight, least=16, parts=32) - num_tokens
        ):
            # Sequences more, which nobody looks at; none longer than the others, so within the
            # context and the windows.
            pieces = [min(max(lengths), spare - start) for start in range(0, spare, max(lengths))]
            input_ids, lengths = F.pad(input_ids, (0, spare)), [*lengths, *pieces]
        num_wanted = num_tokens
        if wanted is not None:
            num_wanted = len(wanted)
            wanted = F.pad(
                wanted, (0, few(num_wanted, self.embed_tokens.weight, least=16, parts=32) - num_wanted)
            )
        start, T = cache.length if cache is not None else 0, input_ids.size(1)
        pack = Pack(lengths) if lengths is not None else None
        x = self.embed_tokens(input_ids)  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * float(
                torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
            )  # rounded to the embedding's dtype, as in training
        if self.embed_positions is not None:
            spans = [(start, T)] if pack is None else [(0, length) for length in pack.lengths]
            positions = torch.cat([torch.arange(first, first + length) for first, length in spans])
            x = x + self.embed_positions(positions.to(x.device))
        masks = (
            {window: causal_mask(T, start, window, x.device) for window in set(self._windows)}
            if pack is None
            else {}
        )
        rotations = {
            rope: table.rows(start, T, x) if pack is None else table.packed_rows(pack, x)
            for rope, table in self._tables.items()
        }
        for block, window, rope in zip(self.layers, self._windows, self._ropes, strict=True):
            x = block(
                x,
                rotations.get(rope),
                masks.get(window),
                cache,
                pack,
                wanted if block is self.layers[-1] else None,
            )
        if cache is not None:
            cache.length += T
        return self.norm(x)[:, :num_wanted]


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

    @classmethod
    def without_weights(cls, config: ModelConfig) -> "GPT":
        """The model on the meta device: names and shapes only."""
        with torch.device("meta"), _SkipInit():
            return cls(config)

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of this model's
        weights."""
        expected = {
            name: parameter.shape for name, parameter in self.named_parameters()
        }  # a tied head is not named twice
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
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> "GPT":
        """A model that holds these very tensors: built on the meta device, so nothing is
        initialised or copied.

        Tied heads are stored once, under the embedding's name. Raises CheckpointError unless names
        and shapes fit exactly.
        """
        model = cls.without_weights(config)
        model.check_fit(tensors)
        # Detached: a tensor that is a Parameter would become the model's own, and change with its
        # dtype and device.
        model.load_state_dict(
            {name: tensor.detach() for name, tensor in tensors.items()}, strict=False, assign=True
        )
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


class _SkipInit(TorchFunctionMode):
    """Initialises nothing: on the meta device there is nothing to fill, yet the first random number
    costs a second of imports."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """These (M,) of the B · T tokens of x (B, T, C): (1, M, C); all, as they are, for None."""
    return x if wanted is None else x.flatten(0, 1).index_select(0, wanted)[None]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in fp32; a frozen one keeps little for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMSNormPlusOne(nn.Module):
    """RMSNorm that multiplies by 1 + weight, in fp32 throughout (Gemma). Stored as it is: 1 +
    weight would round in bf16."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x, 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)), self.eps
        )


class HeadNorms(nn.Module):
    """A LayerNorm for each head: (..., H, D) -> (..., H, D)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(head_dim, eps, bias=False) for _ in range(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(head) for norm, head in zip(self.norms, x.unbind(-2), strict=True)], dim=-2)


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """The normalisation that the architecture asks for, over the last dimension; of hidden_size
    unless another is given."""
    size = size or config.hidden_size
    if config.norm == "layernorm_plain":
        return nn.LayerNorm(size, config.norm_eps, elementwise_affine=False)
    return {"rmsnorm": RMSNorm, "rmsnorm_plus_one": RMSNormPlusOne, "layernorm": nn.LayerNorm}[config.norm](
        size, config.norm_eps
    )


def make_head_norm(config: ModelConfig, num_heads: int) -> nn.Module | None:
    """The normalisation of queries or keys, if there is one."""
    if config.qk_norm == "none":
        return None
    if config.qk_norm == "each_head":
        return HeadNorms(num_heads, config.head_dim, config.norm_eps)
    return make_norm(config, config.head_dim if config.qk_norm == "head" else num_heads * config.head_dim)


class RotaryTable:
    """Cosines and sines of position · frequency, kept for the longest sequence so far."""

    def __init__(self, dim: int, theta: float, scaling: RopeScaling | None, max_positions: int) -> None:
        self.dim, self.theta, self.scaling, self.max_positions = dim, theta, scaling, max_positions
        self._regime: int | None = None
        self._rows: Rope | None = None

    def rows(self, start: int, T: int, like: Tensor) -> Rope:
        """cos, sin (T, dim) of the positions start to start + T - 1, in the dtype and on the device
        of `like`."""
        length = start + T
        regime = self._regime_of(length)
        if (
            self._rows is None
            or regime != self._regime
            or self._rows[0].size(0) < length
            or self._rows[0].device != like.device
        ):
            self._regime = regime
            with torch.inference_mode(
                False
            ):  # kept beyond this call: what generation computed must serve training too
                self._rows = self._compute(length, like.device)
        cos, sin = self._rows
        return cos[start:length].to(like.dtype), sin[start:length].to(like.dtype)

    def packed_rows(self, pack: Pack, like: Tensor) -> Rope:
        """As rows, for sequences one behind the other: the positions start anew with each."""
        cos, sin = zip(*(self.rows(0, length, like) for length in pack.lengths), strict=True)
        return torch.cat(cos), torch.cat(sin)

    def _regime_of(self, length: int) -> int:
        """Lengths of one regime share their frequencies: two scalings make them depend on how long
        the sequence is."""
        kind = self.scaling.rope_type if self.scaling is not None else None
        if kind == "dynamic":
            return max(length, self.max_positions)
        return int(kind == "longrope" and length > self.scaling.original_max_position_embeddings)

    def _compute(self, length: int, device: torch.device) -> Rope:
        frequencies, factor = rotary_frequencies(
            self.dim, self.theta, self.scaling, self.max_positions, length
        )
        rows = -(-length // 256) * 256  # some in advance: generation asks for one more at a time
        angles = torch.outer(
            torch.arange(rows, dtype=torch.float32, device=device), frequencies.to(device)
        ).repeat(1, 2)
        return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, max_positions: int, length: int
) -> tuple[Tensor, float]:
    """The angle between two positions for each rotated pair, theta^(-2i/dim) as scaled, (dim / 2,);
    and a factor for cos and sin.

    `length` is that of the sequence. linear: Chen et al. 2023, arXiv:2306.15595; dynamic:
    NTK-aware, growing with the length; yarn: Peng et al. 2023, arXiv:2309.00071; longrope: Ding et
    al. 2024, arXiv:2402.13753; llama3: Llama 3.1.
    """
    kind = scaling.rope_type if scaling is not None else None
    if kind == "dynamic" and length > max_positions:
        theta *= (scaling.factor * length / max_positions - (scaling.factor - 1)) ** (dim / (dim - 2))
    # fp32: a bf16 angle is off by whole turns at long range
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if kind == "linear":
        return frequencies / scaling.factor, 1.0
    if (
        kind == "llama3"
    ):  # waves that turn often within the old context stay, those that hardly turn are stretched
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        keep = (
            (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        ).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor, 1.0
    if kind == "yarn":  # the same idea, with a ramp over the pair's number instead of its turns

        def pair_that_turns(times: float) -> float:
            return (
                dim
                * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi))
                / (2 * math.log(theta))
            )

        first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        keep = 1 - ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor, scaling.attention_factor
    if kind == "longrope":
        divisors = (
            scaling.long_factor if length > scaling.original_max_position_embeddings else scaling.short_factor
        )
        return frequencies / torch.tensor(divisors), scaling.attention_factor
    return frequencies, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+R/2}) of the first R dimensions of x (B, H, T, D) by its angle
    (T, R)."""
    if cos.size(-1) < x.size(-1):
        rotated, rest = x.split([cos.size(-1), x.size(-1) - cos.size(-1)], dim=-1)
        return torch.cat((rotate(rotated, cos, sin), rest), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
