"""ModelConfig: the facts of an architecture, as `model_config.yaml` stores them. Torch-free.

A field has the name that Hugging Face's `config.json` gives it, where it has one.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litlora.errors import CheckpointError
from litlora.facts import Facts, check_size
from litlora.rope_facts import RopeScaling as RopeScaling
from litlora.storage.untrusted import read_yaml_mapping

CONFIG_FILE = "model_config.yaml"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Facts):
    """The architecture of one GPT. Raises CheckpointError if its fields contradict each other."""

    vocab_size: int
    """Rows of the embedding; the tokenizer may use fewer."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Inner width of the MLP."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Grouped-query attention: each key/value head serves num_attention_heads / num_key_value_heads
    queries."""
    head_dim: int
    """Width of one head; in most architectures hidden_size / num_attention_heads."""
    max_position_embeddings: int
    """Context length in tokens."""
    norm: Literal[
        "rmsnorm",
        "rmsnorm_plus_one",
        "layernorm",
        "layernorm_plain",
        "layernorm_no_bias",
        "layernorm_plus_one",
    ] = "rmsnorm"
    """The two that end with plus_one (Gemma, Nemotron) multiply by 1 + weight; layernorm_plain
    (OLMo 1) has no weights."""
    norm_eps: float = 1e-5
    norm_position: Literal["before", "after", "both"] = "before"
    """What is normalised: the input of attention and MLP (Llama), their output (OLMo 2), or both
    (Gemma 2)."""
    qk_norm: Literal["none", "head", "head_rotated", "each_head", "all_heads"] = "none"
    """How queries and keys are normalised: each head with shared weights (Qwen 3), the same after
    the rotation (Hunyuan), each head with its own weights (StableLM), or all heads together
    (OLMo 2)."""
    residual_multiplier: float | None = None
    """What attention and MLP give is multiplied by it (Granite)."""
    parallel_residual: bool = False
    """x + attention(norm(x)) + mlp(norm(x)): the MLP does not see the output of attention."""
    shared_norm: bool = False
    """With parallel_residual: one norm serves both."""
    mlp: Literal["gated", "plain"] = "gated"
    """gated: down(act(gate(x)) · up(x)); plain: down(act(up(x)))."""
    swiglu_limit: float | None = None
    """The gate is clamped from above, up to ± this, and then the MLP is
    down(gate · sigmoid(swiglu_alpha · gate) · (up + 1)) (gpt-oss)."""
    swiglu_alpha: float | None = None
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu"] = "silu"
    """relu2 is the square of relu; xielu (Apertus) has two weights in each layer."""
    attention_bias: bool = False
    """Biases in the query, key, value and output projections."""
    attention_output_bias: bool | None = None
    """Bias in the output projection, where it differs from attention_bias."""
    mlp_bias: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    """The output head is the embedding matrix; the checkpoint stores it once."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by √hidden_size (Gemma)."""
    embedding_multiplier: float | None = None
    """Embeddings are multiplied by it (Granite)."""
    logit_scale: float | None = None
    """Logits are multiplied by it (Cohere, Granite)."""

    positions: Literal["rotary", "learned"] = "rotary"
    """rotary: queries and keys are rotated; learned: each position adds a vector to the embedding
    (GPT-2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding's frequencies."""
    rope_local_base_freq: float | None = None
    """The base in layers with a sliding window, where it differs. rope_scaling does not apply to
    them (Gemma 3)."""
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    """Share of each head that is rotated."""
    rope_interleaved: bool | None = None
    """Pairs of neighbouring dimensions are rotated (GLM), not of the two halves of a head. None, and
    not false, is the default: files of models without it stay as they were."""
    layers_without_rope: tuple[int, ...] = ()
    """Numbers of the layers without rotary embeddings (SmolLM 3)."""
    query_scale_beta: float | None = None
    """Queries at position p are multiplied by 1 + beta · ln(1 + ⌊p / o⌋), where o is rope_scaling's
    original_max_position_embeddings (Ministral 3)."""

    sliding_window: int | None = None
    """Tokens that a layer with a window sees, the current one included."""
    full_attention_layers: tuple[int, ...] = ()
    """With sliding_window: numbers of the layers without a window."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by its square root; default head_dim."""
    attn_logit_softcapping: float | None = None
    """Attention scores s become cap · tanh(s / cap)."""
    final_logit_softcapping: float | None = None
    """The same cap for the logits."""
    attention_sinks: bool | None = None
    """Each head's softmax has one score more, a weight, of a value that is zero (gpt-oss)."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to ± this (OLMo 1)."""

    kv_lora_rank: int | None = None
    """Multi-head latent attention (DeepSeek-V3): width of the latent that keys and values are made of.
    head_dim is then the rotated part of a key, which all heads share."""
    q_lora_rank: int | None = None
    """Width of the latent that queries are made of; None: they are made of the input."""
    qk_nope_head_dim: int | None = None
    """Width of the part of a key that is not rotated."""
    v_head_dim: int | None = None
    mscale_all_dim: float | None = None
    """With a scaling of the rotation, scores are multiplied by (0.1 · mscale_all_dim · ln(factor) + 1)²."""
    attention_gate: bool | None = None
    """What attention gives is multiplied by a sigmoid that each head's query projection computes
    beside the query (Qwen3-Next)."""
    global_head_dim: int | None = None
    """Width of one head in the layers without a window, where it differs (Gemma 4)."""
    num_global_key_value_heads: int | None = None
    """The same for num_key_value_heads."""
    attention_k_eq_v: bool | None = None
    """In the layers without a window, values are what keys are before their norm (Gemma 4)."""
    value_norm: bool | None = None
    """Values are normalised, each head by itself, without weights (Gemma 4)."""
    num_kv_shared_layers: int | None = None
    """So many layers, the last ones, have no keys and values of their own, but those of the last layer
    before them that has a window if they have one, and none if they have none (Gemma 4)."""
    use_double_wide_mlp: bool | None = None
    """The MLP of these layers is twice as wide."""
    hidden_size_per_layer_input: int | None = None
    """Each token has a vector of this width for each layer, from an embedding of its own (Gemma 4)."""
    vocab_size_per_layer_input: int | None = None
    layer_scalar: bool | None = None
    """What a layer gives is multiplied by a stored number (Gemma 4)."""
    linear_attention_layers: tuple[int, ...] | None = None
    """Numbers of the layers with linear attention by the gated delta rule (Qwen3-Next)."""
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    """Each key head serves linear_num_value_heads / linear_num_key_heads values."""
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_split: bool | None = None
    """Linear attention has four input projections (Qwen 3.5), not two whose rows are grouped by key
    head (Qwen3-Next)."""
    linear_conv_kernel_dim: int | None = None
    """Tokens that the convolution in front of linear attention sees."""

    num_experts: int | None = None
    """Mixture of experts: MLPs in each layer, of which a router picks some for each token."""
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    """Inner width of an expert."""
    router_bias: bool | None = None
    """The router's scores have a bias (gpt-oss)."""
    router_scoring: Literal["sigmoid"] | None = None
    """An expert's share of a token is a sigmoid of its score (DeepSeek-V3), not a softmax of all."""
    router_correction: bool | None = None
    """Experts are picked by their scores and a value for each, which does not count when they are
    weighed (DeepSeek-V3)."""
    n_group: int | None = None
    """Groups of experts, of which topk_group can be picked from (DeepSeek-V3)."""
    topk_group: int | None = None
    routed_scaling_factor: float | None = None
    """The shares are multiplied by it."""
    norm_topk_prob: bool = False
    """The weights of the picked experts add up to 1."""
    shared_expert_intermediate_size: int | None = None
    """Inner width of an additional expert that every token uses (Qwen 2 MoE)."""
    shared_experts_intermediate_size: int | None = None
    """The same of one without a gate (DeepSeek-V3)."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers with one MLP instead of experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float):
                check_size(field.name, value)
            elif type(value) is tuple:
                self._check_layers(field.name, value)
        self._check_attention()
        self._check_layers_of_gemma4()
        self._check_latent_attention()
        self._check_linear_attention()
        self._check_experts()
        self._check_blocks()
        if self.rope_scaling is not None:
            self.rope_scaling.check_factors(self.rotary_dim // 2)
            is_proportional = self.rope_scaling.rope_type == "proportional"
            if is_proportional and self.sliding_window is not None and self.rope_local_base_freq is None:
                raise CheckpointError("a proportional rope_scaling needs rope_local_base_freq beside windows")

    def _check_layers(self, name: str, layers: tuple[int, ...]) -> None:
        if missing := [layer for layer in layers if not 0 <= layer < self.num_hidden_layers]:
            raise CheckpointError(
                f"{name} lists layer {missing[0]}; the model has {self.num_hidden_layers} layers"
            )
        if len(layers) > self.num_hidden_layers:
            raise CheckpointError(f"{name} lists a layer more than once")

    def _check_attention(self) -> None:
        if self.partial_rotary_factor > 1:
            raise CheckpointError(
                f"partial_rotary_factor is {self.partial_rotary_factor}; it must be at most 1"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise CheckpointError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
            )
        if self.attention_sinks and self.attn_logit_softcapping is not None:
            raise CheckpointError(
                "attention_sinks with attn_logit_softcapping is not a supported architecture"
            )
        if self.positions == "rotary" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise CheckpointError(
                f"{self.rotary_dim} of head_dim ({self.head_dim}) are rotated; rotary embeddings need an "
                "even number"
            )

    def _check_layers_of_gemma4(self) -> None:
        of_layers = (self.global_head_dim, self.num_global_key_value_heads, self.attention_k_eq_v)
        if any(of_layers) and self.sliding_window is None:
            raise CheckpointError("layers with other heads need others, with a sliding_window, beside them")
        heads = self.num_attention_heads
        if self.num_global_key_value_heads is not None and heads % self.num_global_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({heads}) is not a multiple of num_global_key_value_heads "
                f"({self.num_global_key_value_heads})"
            )
        sizes = (self.hidden_size_per_layer_input, self.vocab_size_per_layer_input)
        if (sizes[0] is None) != (sizes[1] is None):
            raise CheckpointError(
                "hidden_size_per_layer_input and vocab_size_per_layer_input must be set together"
            )
        is_other = self.kv_lora_rank or self.linear_attention_layers
        if is_other and (any(of_layers) or self.num_kv_shared_layers):
            raise CheckpointError("layers that share keys and values need plain attention in all layers")
        if sizes[1] is not None and sizes[1] < self.vocab_size:
            raise CheckpointError(
                f"vocab_size_per_layer_input ({sizes[1]}) is less than vocab_size ({self.vocab_size}): "
                "tokens without an input of each layer are not implemented"
            )
        if (sizes[0] or self.layer_scalar) and self.norm_position != "both":
            raise CheckpointError("per-layer inputs and layer_scalar need norm_position both")
        if self.num_kv_shared_layers is None:
            if self.use_double_wide_mlp:
                raise CheckpointError("use_double_wide_mlp needs num_kv_shared_layers")
            return
        own = range(self.num_hidden_layers - self.num_kv_shared_layers)
        kinds = {self.window(layer) is None for layer in own}
        if missing := [n for n in range(self.num_hidden_layers) if (self.window(n) is None) not in kinds]:
            raise CheckpointError(
                f"num_kv_shared_layers ({self.num_kv_shared_layers}): no layer before layer {missing[0]} has "
                "the keys and values that it shares"
            )

    def _check_latent_attention(self) -> None:
        sizes = [self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim]
        if None in sizes and sizes != [None] * 3:
            raise CheckpointError("kv_lora_rank, qk_nope_head_dim and v_head_dim must be set together")
        if self.kv_lora_rank is None:
            return
        others = {
            "sliding_window": self.sliding_window,
            "attention_sinks": self.attention_sinks,
            "attn_logit_softcapping": self.attn_logit_softcapping,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "query_scale_beta": self.query_scale_beta,
            "clip_qkv": self.clip_qkv,
            "attention_gate": self.attention_gate,
            "layers_without_rope": self.layers_without_rope or None,
        }
        if found := [name for name, value in others.items() if value is not None]:
            raise CheckpointError(f"{found[0]} with kv_lora_rank is not a supported architecture")
        if self.qk_norm != "none" or self.rotary_dim != self.head_dim or self.positions != "rotary":
            raise CheckpointError("kv_lora_rank needs heads without norms, whose head_dim is rotated whole")
        if self.mscale_all_dim is not None and getattr(self.rope_scaling, "factor", None) is None:
            raise CheckpointError("mscale_all_dim needs a rope_scaling with a factor")

    def _check_linear_attention(self) -> None:
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
        sizes = [getattr(self, f"linear_{name}") for name in names]
        if not self.linear_attention_layers:
            return
        if None in sizes:
            raise CheckpointError(f"linear_{names[sizes.index(None)]} missing: linear attention needs it")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise CheckpointError(
                f"linear_num_value_heads ({self.linear_num_value_heads}) is not a multiple of "
                f"linear_num_key_heads ({self.linear_num_key_heads})"
            )
        if self.linear_conv_kernel_dim < 2:
            raise CheckpointError("linear_conv_kernel_dim must be at least 2")

    def _check_experts(self) -> None:
        sizes = [self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size]
        if None in sizes and sizes != [None] * 3:
            raise CheckpointError(
                "num_experts, num_experts_per_tok and moe_intermediate_size must be set together"
            )
        if self.num_experts is not None and self.num_experts_per_tok > self.num_experts:
            raise CheckpointError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts "
                f"({self.num_experts})"
            )
        groups, picked = self.n_group, self.topk_group
        if (groups is None) != (picked is None):
            raise CheckpointError("n_group and topk_group must be set together")
        if groups is not None and self.num_experts is not None:
            size = self.num_experts // groups
            if self.num_experts % groups or size < 2 or picked > groups:
                raise CheckpointError(
                    f"n_group ({groups}) and topk_group ({picked}) do not fit {self.num_experts} experts: "
                    "a group needs two experts or more, and all groups as many"
                )
            if self.num_experts_per_tok > picked * size:
                raise CheckpointError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) is more than the experts of "
                    f"topk_group ({picked}) groups"
                )

    def _check_blocks(self) -> None:
        if self.parallel_residual and self.norm_position != "before":
            raise CheckpointError(
                f"parallel_residual with norm_position {self.norm_position} is not a supported architecture"
            )
        if self.shared_norm and not self.parallel_residual:
            raise CheckpointError("shared_norm needs parallel_residual")
        if (self.swiglu_limit is None) != (self.swiglu_alpha is None):
            raise CheckpointError("swiglu_limit and swiglu_alpha must be set together")
        if self.swiglu_limit is not None and (self.mlp != "gated" or self.hidden_act != "silu"):
            raise CheckpointError("swiglu_limit needs a gated mlp with the activation silu")
        if self.hidden_act == "xielu" and (self.mlp != "plain" or self.num_experts is not None):
            raise CheckpointError("hidden_act xielu needs a plain mlp, without experts")
        if self.residual_multiplier is not None and self.norm_position != "before":
            raise CheckpointError(
                f"residual_multiplier with norm_position {self.norm_position} is not a supported architecture"
            )
        if self.logit_scale is not None and self.lm_head_bias:
            raise CheckpointError("logit_scale with lm_head_bias is not a supported architecture")
        original = self.rope_scaling and self.rope_scaling.original_max_position_embeddings
        if self.query_scale_beta is not None and not original:
            raise CheckpointError(
                "query_scale_beta needs a rope_scaling with original_max_position_embeddings"
            )

    @property
    def least_modules(self) -> int:
        """Modules with weights that such a model has at least."""
        sparse_layers = self.num_hidden_layers - len(self.dense_layers)
        modules = self.num_hidden_layers + sparse_layers * (self.num_experts or 0)
        if self.qk_norm == "each_head":
            modules += self.num_hidden_layers * self.num_attention_heads
        return modules

    def facts(self) -> dict[str, Any]:
        """The facts that two models are compared by."""
        return self.to_dict()

    @property
    def rotary_dim(self) -> int:
        """How many of the leading dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window(self, layer: int) -> int | None:
        """Tokens that a layer sees, the current one included; None if it sees all of them."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def linear_channels(self) -> int:
        """Queries, keys and values of linear attention: what its convolution runs over."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim

    def is_linear(self, layer: int) -> bool:
        """Whether a layer has linear attention."""
        return layer in (self.linear_attention_layers or ())

    def cached(self, layer: int) -> tuple[int, int, int]:
        """(heads, width of a key, width of a value): what a layer keeps of each token."""
        if self.kv_lora_rank is not None:
            return 1, self.kv_lora_rank + self.head_dim, 0
        if self.shares_keys(layer):
            return 0, 0, 0
        heads, width = self.heads(layer)
        return heads, width, width

    def heads(self, layer: int) -> tuple[int, int]:
        """(key/value heads, width of each head) of a layer."""
        if self.window(layer) is not None:
            return self.num_key_value_heads, self.head_dim
        heads = self.num_global_key_value_heads or self.num_key_value_heads
        return heads, self.global_head_dim or self.head_dim

    def shares_keys(self, layer: int) -> bool:
        """Whether a layer has the keys and values of another one."""
        return layer >= self.num_hidden_layers - (self.num_kv_shared_layers or 0)

    @property
    def latent_scale(self) -> float:
        """What scores of latent attention are multiplied by."""
        scale = (self.qk_nope_head_dim + self.head_dim) ** -0.5
        if self.mscale_all_dim is None or self.rope_scaling.factor <= 1:
            return scale
        return scale * (0.1 * self.mscale_all_dim * math.log(self.rope_scaling.factor) + 1) ** 2

    def rope(self, layer: int) -> tuple[int, float, RopeScaling | None] | None:
        """(dimensions of a head that are rotated, base and scaling of their frequencies) in a layer; None
        if it has none."""
        if self.positions == "learned" or layer in self.layers_without_rope or self.is_linear(layer):
            return None
        dim = int(self.heads(layer)[1] * self.partial_rotary_factor)
        if self.window(layer) is not None and self.rope_local_base_freq is not None:
            return dim, self.rope_local_base_freq, None
        return dim, self.rope_theta, self.rope_scaling

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read a `model_config.yaml`. The message of a CheckpointError begins with the file's
        path."""
        values = read_yaml_mapping(path, f"a checkpoint directory needs its {CONFIG_FILE}")
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
