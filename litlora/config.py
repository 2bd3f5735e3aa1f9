"""ModelConfig: the facts of an architecture, as `model_config.yaml` stores them. Torch-free.

A field has the name that Hugging Face's `config.json` gives it, where it has one.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litlora.config_checks import check
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
    qk_norm: Literal["none", "head", "head_rotated", "each_head", "all_heads", "l2_rotated"] = "none"
    """How queries and keys are normalised: each head with shared weights (Qwen 3), the same after
    the rotation (Hunyuan), each head with its own weights (StableLM), all heads together (OLMo 2), or
    each head without weights after the rotation, in layers that have one (Llama 4)."""
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
    activation_sparsity: float | None = None
    """This share of the gates is cut off as if they were normally distributed, in the sparse_mlp_layers:
    what remains is their excess over mean + deviation · the quantile (Gemma 3n)."""
    sparse_mlp_layers: tuple[int, ...] | None = None
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
    floor_scale: int | None = None
    """With query_scale_beta, in the layers without rotary embeddings alone: p + 1 and floor_scale take
    the place of p and o (Llama 4)."""

    sliding_window: int | None = None
    """Tokens that a layer with a window sees, the current one included."""
    attention_chunk_size: int | None = None
    """Sequences divide into chunks of so many tokens; a layer sees the current one's alone (Llama 4)."""
    full_attention_layers: tuple[int, ...] = ()
    """With one of these two: numbers of the layers that see all tokens."""
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
    altup_num_inputs: int | None = None
    """Residual streams, of which each layer computes with one and predicts and corrects all (AltUp,
    Gemma 3n)."""
    altup_coef_clip: float | None = None
    """In training, the weights of what predicts and corrects are clamped to ± this."""
    laurel_rank: int | None = None
    """A product of two matrices of this rank is beside attention (LAuReL, Gemma 3n)."""
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
    expert_bias: bool | None = None
    """Biases in the experts that the router picks, where it differs from mlp_bias (ERNIE 4.5)."""
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
    scale_expert_inputs: bool | None = None
    """The shares multiply what goes into the experts, not what comes out (Llama 4)."""
    norm_topk_prob: bool = False
    """The weights of the picked experts add up to 1."""
    shared_expert_intermediate_size: int | None = None
    """Inner width of an additional expert that every token uses (Qwen 2 MoE)."""
    shared_experts_intermediate_size: int | None = None
    """The same of one without a gate (DeepSeek-V3)."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers with one MLP instead of experts."""
    enable_moe_block: bool | None = None
    """Experts are beside the MLP, not in its place, each of the two with norms of its own; the router
    scales its input, and the experts' shares (Gemma 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) in (int, float):
                check_size(field.name, value)
            elif type(value) is tuple:
                self._check_layers(field.name, value)
        check(self)

    def _check_layers(self, name: str, layers: tuple[int, ...]) -> None:
        if missing := [layer for layer in layers if not 0 <= layer < self.num_hidden_layers]:
            raise CheckpointError(
                f"{name} lists layer {missing[0]}; the model has {self.num_hidden_layers} layers"
            )
        if len(layers) > self.num_hidden_layers:
            raise CheckpointError(f"{name} lists a layer more than once")

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

    def chunk(self, layer: int) -> int | None:
        """Tokens of a chunk of a layer; None if it sees all of them."""
        return None if layer in self.full_attention_layers else self.attention_chunk_size

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
