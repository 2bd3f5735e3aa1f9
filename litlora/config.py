"""ModelConfig: the facts of an architecture, as `model_config.yaml` stores them. Torch-free.

The names are those of Hugging Face's `config.json`, wherever it has one for the thing.
"""

import dataclasses
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from litlora.errors import CheckpointError
from litlora.storage.untrusted import read_yaml

CONFIG_FILE = "model_config.yaml"
LARGEST = 2**28
"""No size or count of a real model is larger; products of two still fit into 64 bits."""


class _Facts:
    """What the dataclasses here share: every field is checked against its type, and they are read
    from plain values."""

    def __post_init__(self) -> None:
        for name, kind in _types(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for YAML; what is absent (None) is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {
            name: value.to_dict() if isinstance(value, _Facts) else value for name, value in values.items()
        }
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Raises CheckpointError for a missing, unknown or ill-typed field: nothing is guessed."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, values.keys() - names)):
            raise CheckpointError(
                f"unknown field(s) {', '.join(unknown)}; this version of litlora does not know them"
            )
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise CheckpointError(f"field(s) {', '.join(missing)} missing")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(_Facts):
    """How rotary frequencies are changed to reach beyond the context of pre-training."""

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float | None = None
    """By how much the context grows."""
    original_max_position_embeddings: int | None = None
    """Context of pre-training; llama3, yarn and longrope."""
    low_freq_factor: float | None = None
    """llama3: waves longer than original / low_freq_factor are stretched in full."""
    high_freq_factor: float | None = None
    """llama3: waves shorter than original / high_freq_factor are left alone."""
    beta_fast: float | None = None
    """yarn: rotations within the original context from which a frequency is left alone."""
    beta_slow: float | None = None
    """yarn: rotations up to which a frequency is stretched in full."""
    truncate: bool | None = None
    """yarn: the bounds of the ramp are whole numbers."""
    attention_factor: float | None = None
    """yarn, longrope: cosines and sines are multiplied by this."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency up to the original context."""
    long_factor: tuple[float, ...] | None = None
    """longrope: the same beyond it."""

    NEEDS = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
        ),
        "longrope": ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.NEEDS[self.rope_type]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if (value is None) == (field.name in needed):
                raise CheckpointError(
                    f"rope_scaling of type {self.rope_type}: {field.name} {'missing' if value is None else 'has no use'}"
                )
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and not (value > 0 and math.isfinite(value))
            ):
                raise CheckpointError(f"rope_scaling: {field.name} is {value!r}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Facts):
    """The architecture of one GPT; `CheckpointError` if the sizes contradict each other."""

    vocab_size: int
    """Rows of the embedding; a tokenizer may use fewer."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the MLP."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Grouped-query attention: each key/value head serves num_attention_heads / num_key_value_heads
    queries."""
    head_dim: int
    """Width of one head; hidden_size / num_attention_heads unless the architecture says
    otherwise."""
    max_position_embeddings: int
    """Context length in tokens."""
    norm: Literal["rmsnorm", "rmsnorm_plus_one", "layernorm", "layernorm_plain"] = "rmsnorm"
    """rmsnorm_plus_one (Gemma) multiplies by 1 + weight; layernorm_plain (OLMo 1) has no
    weights."""
    norm_eps: float = 1e-5
    norm_position: Literal["before", "after", "both"] = "before"
    """Where attention and MLP are normalised: their input (Llama), their output (OLMo 2) or both
    (Gemma 2)."""
    qk_norm: Literal["none", "head", "each_head", "all_heads"] = "none"
    """Queries and keys are normalised a head at a time with the same weights for all (Qwen 3) or
    with each head's own (StableLM), or all heads together (OLMo 2)."""
    parallel_residual: bool = False
    """x + attention(norm(x)) + mlp(norm(x)) instead of one after the other."""
    shared_norm: bool = False
    """With parallel_residual: one norm serves both."""
    mlp: Literal["gated", "plain"] = "gated"
    """gated: down(act(gate(x)) · up(x)); plain: down(act(up(x)))."""
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    attention_bias: bool = False
    """Biases in the query, key, value and output projections."""
    attention_output_bias: bool | None = None
    """The output projection's bias where it differs from the others'."""
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    """The output head is the embedding matrix itself; the checkpoint then stores it once."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by √hidden_size (Gemma)."""

    positions: Literal["rotary", "learned"] = "rotary"
    """rotary: queries and keys are rotated; learned: a vector a position is added to the embedding
    (GPT-2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding's frequencies."""
    rope_local_base_freq: float | None = None
    """The base in layers with a sliding window, where it differs; those are not scaled (Gemma
    3)."""
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    """Share of each head that is rotated."""
    layers_without_rope: tuple[int, ...] = ()
    """Numbers of the layers that rotate nothing (SmolLM 3)."""

    sliding_window: int | None = None
    """Tokens a layer with a window sees, the current one included."""
    full_attention_layers: tuple[int, ...] = ()
    """With sliding_window: numbers of the layers that see everything all the same."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by its root; default head_dim."""
    attn_logit_softcapping: float | None = None
    """Attention scores s become cap · tanh(s / cap)."""
    final_logit_softcapping: float | None = None
    """The same for the logits."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to ± this (OLMo 1)."""

    num_experts: int | None = None
    """Mixture of experts: MLPs a layer, of which a router picks a few for each token."""
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    """Width inside an expert."""
    norm_topk_prob: bool = False
    """The shares of the picked experts add up to 1."""
    shared_expert_intermediate_size: int | None = None
    """Width of an expert that serves every token besides (Qwen 2 MoE)."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers with a plain MLP instead of experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float) and not (value > 0 and math.isfinite(value)):
                raise CheckpointError(f"{field.name} is {value!r}; it must be positive")
            if type(value) is int and value > LARGEST:
                raise CheckpointError(f"{field.name} is {value}; no model is that large")
            if type(value) is tuple and any(not 0 <= layer < self.num_hidden_layers for layer in value):
                raise CheckpointError(
                    f"{field.name} names layers that there are not; there are {self.num_hidden_layers}"
                )
            if type(value) is tuple and len(value) > self.num_hidden_layers:
                raise CheckpointError(f"{field.name} names a layer more than once")
        if self.partial_rotary_factor > 1:
            raise CheckpointError(
                f"partial_rotary_factor is {self.partial_rotary_factor}; it is a share, 1 at most"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.positions == "rotary" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise CheckpointError(
                f"{self.rotary_dim} of head_dim ({self.head_dim}) are rotated; rotary embeddings need an even number"
            )
        moe = [self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size]
        if None in moe and moe != [None] * 3:
            raise CheckpointError(
                "num_experts, num_experts_per_tok and moe_intermediate_size belong together"
            )
        if self.num_experts is not None and self.num_experts_per_tok > self.num_experts:
            raise CheckpointError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts ({self.num_experts})"
            )
        if self.parallel_residual and self.norm_position != "before":
            raise CheckpointError(
                f"parallel_residual with norm_position {self.norm_position} is no architecture known here"
            )
        if self.shared_norm and not self.parallel_residual:
            raise CheckpointError("shared_norm needs parallel_residual")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                if (count := len(factors := getattr(self.rope_scaling, name))) != self.rotary_dim // 2:
                    raise CheckpointError(
                        f"rope_scaling: {name} has {count} numbers; there are {self.rotary_dim // 2} frequencies"
                    )
                if odd := [factor for factor in factors if not (factor > 0 and math.isfinite(factor))]:
                    raise CheckpointError(f"rope_scaling: {name} holds {odd[0]!r}; it must be positive")

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """Tokens that a layer sees, the current one included; None for all."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def rope(self, layer: int) -> tuple[float, RopeScaling | None] | None:
        """Base and scaling of a layer's rotary frequencies; None where nothing is rotated."""
        if self.positions == "learned" or layer in self.layers_without_rope:
            return None
        if self.window(layer) is not None and self.rope_local_base_freq is not None:
            return self.rope_local_base_freq, None
        return self.rope_theta, self.rope_scaling

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read a `model_config.yaml`. Raises CheckpointError with the file's path in front."""
        try:
            values = read_yaml(path)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file; a checkpoint directory needs its {CONFIG_FILE}"
            ) from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: must hold a mapping of field names to values")
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value as its type wants it. Raises CheckpointError if it is of another."""
    if get_origin(kind) is types.UnionType:  # every union here is "or None"
        return None if value is None else _checked(name, value, get_args(kind)[0])
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise CheckpointError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise CheckpointError(f"{name} is {value!r}; it must be a list")
        return tuple(_checked(name, entry, get_args(kind)[0]) for entry in value)
    if kind is RopeScaling and isinstance(value, dict):
        return RopeScaling.from_dict(value)
    if kind is float and type(value) is int:  # YAML writes 10000.0 and 10000 alike
        return float(value)
    if type(value) is not kind:
        raise CheckpointError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return value
