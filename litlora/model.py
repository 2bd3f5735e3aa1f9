"""One GPT for every family, driven by `ModelConfig`.

Module names are Hugging Face Llama's, so that such a file loads without renaming and LoRA targets are the names people
know. Shapes: B batch, T tokens, C hidden_size, H heads, G key/value heads, D head_dim, V vocabulary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.errors import CheckpointError

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, G, max_length, D) buffers a layer."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.max_length = max_length
        self.length = 0
        """Tokens held; the next one gets this position."""
        self._layers = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) of the new tokens behind those held; return all (B, G, length + T, D)."""
        end = self.length + k.size(2)
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.grouped = q_size != kv_size
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, H·D) -> (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # One new token may look at everything that is held; without a mask and without a past, the triangle is SDPA's own.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """The feed-forward half of a block: gated (Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias) if config.mlp == "gated" else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.up_proj(x)) if self.gate_proj is None else self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self._rope: tuple[Tensor, Tensor] | None = None  # filled on first use: computed, so no part of any checkpoint

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        start, T = cache.length if cache is not None else 0, input_ids.size(1)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = (part[start : start + T].to(x.dtype) for part in self._rotary(start + T, x.device))
        mask = None
        if start and T > 1:  # several new tokens behind a past: each sees the past and its own triangle
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def _rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rope is None or self._rope[0].size(0) < length or self._rope[0].device != device:
            self._rope = rotary_table(length, self.config.head_dim, self.config.rope_theta, device)
        return self._rope


class GPT(nn.Module):
    """A decoder-only language model: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.lm_head(self.model(input_ids, cache))

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> "GPT":
        """A model that holds these very tensors: built on the meta device, so nothing is initialised or copied.

        Tied heads are stored once, under the embedding's name. Raises CheckpointError unless names and shapes fit exactly.
        """
        with torch.device("meta"):
            model = cls(config)
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}  # a tied head is not named twice
        if missing := sorted(expected.keys() - tensors.keys()):
            raise CheckpointError(f"weight(s) missing: {shorten(missing)}")
        if unexpected := sorted(tensors.keys() - expected.keys()):
            raise CheckpointError(f"weight(s) that the architecture does not have: {shorten(unexpected)}")
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise CheckpointError(f"{name} has shape {tuple(tensors[name].shape)}; the architecture needs {tuple(shape)}")
        model.load_state_dict(dict(tensors), strict=False, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation that the architecture asks for, over the last dimension."""
    return {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm](config.hidden_size, eps=config.norm_eps)


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, D) of position · theta^(-2i/D), each angle twice: for both halves of a head."""
    # fp32: a bf16 angle is off by whole turns at long range
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of x (B, H, T, D) by its angle (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def shorten(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
