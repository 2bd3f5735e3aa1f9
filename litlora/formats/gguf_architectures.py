"""What llama.cpp computes for each of its architectures, as the facts of a ModelConfig. Torch-free.

llama.cpp has one graph for each architecture. A GGUF file's metadata sets sizes and a few more facts
of it; everything else is fixed. So a model fits if its other facts are those of the graph: a fact
that is new in ModelConfig is refused until an architecture says otherwise.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from litlora.config import ModelConfig, RopeScaling
from litlora.errors import CheckpointError

SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "norm_eps",
    "tie_word_embeddings",
    "rope_theta",
}
"""The facts that every architecture takes from the metadata."""
CHECKED_APART = {"rope_scaling", "sliding_window", "full_attention_layers", "layers_without_rope"}
BIASES = ("attention_bias", "attention_output_bias", "mlp_bias")
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
ROUTED = (*EXPERTS, "shared_experts_intermediate_size", "dense_layers", "routed_scaling_factor")
ROUTED += ("norm_topk_prob",)


@dataclass(frozen=True)
class GraphOf:
    """One architecture of llama.cpp."""

    name: str
    """general.architecture."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """The facts of its graph that are not ModelConfig's defaults."""
    free: tuple[str, ...] = ()
    """The facts that may have any value, besides the sizes."""
    scalings: tuple[str, ...] = ("linear", "yarn")
    """How its rotary frequencies may be scaled."""
    rotated: bool = False
    """The rows of queries and keys are in the order of Meta's Llama."""
    full_attention: Callable[[int], bool] | None = None
    """Whether a layer, by its number, has no window. None: no layer has one."""
    without_rope: Callable[[int], bool] | None = None
    """Whether a layer, by its number, has no rotary embedding. None: every layer has one."""
    own_head: bool = False
    """A tied output head is stored once more."""
    always_tied: bool = False
    """The output head is the embedding."""
    dense_first: bool = False
    """Layers without experts come before all others, if there are any."""
    is_shared: bool = False
    """Each layer with experts has one that every token uses."""
    most_layers: int | None = None
    """A model with more has another graph, which no family here has."""


_PLAIN_MLP = {"mlp": "plain", "norm": "layernorm"}
_GEMMA = {"norm": "rmsnorm_plus_one", "hidden_act": "gelu_tanh", "scale_embeddings": True}
_ALL_BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
_COHERE = {
    "norm": "layernorm_no_bias",
    "parallel_residual": True,
    "shared_norm": True,
    "rope_interleaved": True,
}
_HYBRID = {"norm": "rmsnorm_plus_one", "qk_norm": "head", "attention_gate": True}
LINEAR = ("linear_attention_layers", "linear_num_key_heads", "linear_num_value_heads")
LINEAR += ("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "mscale_all_dim")
_SHARED = (*EXPERTS, "shared_expert_intermediate_size")
_SIGMOID = {"router_scoring": "sigmoid", "router_correction": True}
_QKV_BIAS = {"attention_bias": True, "attention_output_bias": False}
_LLAMA = GraphOf("llama", free=BIASES, scalings=("linear", "llama3", "yarn"), rotated=True)
_DEEPSEEK = GraphOf(
    "deepseek2",
    {**_SIGMOID, "rope_interleaved": True},
    (*ROUTED, *LATENT, "n_group", "topk_group"),
    scalings=("yarn",),
    dense_first=True,
    is_shared=True,
)
GRAPHS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": GraphOf("llama", {"norm_topk_prob": True}, EXPERTS, rotated=True),
    "qwen2": GraphOf("qwen2", _QKV_BIAS),
    "qwen3": GraphOf("qwen3", {"qk_norm": "head"}),
    "qwen3_moe": GraphOf("qwen3moe", {"qk_norm": "head", "norm_topk_prob": True}, EXPERTS),
    "gemma": GraphOf("gemma", _GEMMA, always_tied=True),
    "gemma2": GraphOf(
        "gemma2",
        {**_GEMMA, "norm_position": "both"},
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        full_attention=lambda layer: layer % 2 == 1,
        always_tied=True,
    ),
    "gemma3_text": GraphOf(
        "gemma3",
        {**_GEMMA, "norm_position": "both", "qk_norm": "head", "rope_local_base_freq": 10_000.0},
        ("query_pre_attn_scalar", "final_logit_softcapping"),
        scalings=("linear",),
        full_attention=lambda layer: layer % 6 == 5,
    ),
    "phi3": GraphOf("phi3", free=("partial_rotary_factor",), scalings=("longrope",)),
    "olmo2": GraphOf("olmo2", {"norm_position": "after", "qk_norm": "all_heads"}, own_head=True),
    "gpt_neox": GraphOf(
        "gptneox",
        {**_PLAIN_MLP, **_ALL_BIASES, "hidden_act": "gelu"},
        ("parallel_residual", "partial_rotary_factor"),
        own_head=True,
    ),
    "gpt2": GraphOf(
        "gpt2",
        {**_PLAIN_MLP, **_ALL_BIASES, "hidden_act": "gelu_tanh", "positions": "learned"},
        scalings=(),
    ),
    "granite": GraphOf(
        "granite",
        free=(*BIASES, "query_pre_attn_scalar", "embedding_multiplier", "residual_multiplier", "logit_scale"),
        rotated=True,
    ),
    "smollm3": GraphOf("smollm3", rotated=True, without_rope=lambda layer: layer % 4 == 3),
    "olmo3": GraphOf(
        "olmo2",
        {"norm_position": "after", "qk_norm": "all_heads"},
        scalings=(),
        full_attention=lambda layer: layer % 4 == 3,
        own_head=True,
    ),
    "olmoe": GraphOf("olmoe", {"qk_norm": "all_heads"}, EXPERTS, own_head=True),
    "olmo": GraphOf("olmo", {"norm": "layernorm_plain"}, ("clip_qkv",), rotated=True),
    "phi": GraphOf(
        "phi2",
        {**_PLAIN_MLP, **_ALL_BIASES, "hidden_act": "gelu_tanh", "lm_head_bias": True}
        | {"parallel_residual": True, "shared_norm": True},
        ("partial_rotary_factor",),
        own_head=True,
    ),
    "stablelm": GraphOf(
        "stablelm",
        {"norm": "layernorm", "attention_output_bias": False},
        ("attention_bias", "parallel_residual", "shared_norm", "partial_rotary_factor"),
        own_head=True,
    ),
    "cohere": GraphOf("command-r", _COHERE, ("logit_scale",), scalings=(), always_tied=True),
    "cohere2": GraphOf(
        "cohere2",
        _COHERE,
        ("logit_scale",),
        scalings=(),
        full_attention=lambda layer: layer % 4 == 3,
        without_rope=lambda layer: layer % 4 == 3,
        always_tied=True,
    ),
    "glm4": GraphOf(
        "glm4",
        {"norm_position": "both", "rope_interleaved": True, "attention_output_bias": False},
        ("attention_bias", "partial_rotary_factor"),
    ),
    "ernie4_5": GraphOf("ernie4_5", {"rope_interleaved": True}),
    "seed_oss": GraphOf("seed_oss", {"attention_output_bias": False}, ("attention_bias",)),
    "nemotron": GraphOf(
        "nemotron",
        {"norm": "layernorm_plus_one", "mlp": "plain", "hidden_act": "relu2"},
        ("partial_rotary_factor", *BIASES),
        scalings=("linear",),
        own_head=True,
    ),
    "arcee": GraphOf("arcee", {"mlp": "plain", "hidden_act": "relu2"}, rotated=True),
    "qwen2_moe": GraphOf("qwen2moe", _QKV_BIAS, (*EXPERTS, "shared_expert_intermediate_size"), own_head=True),
    "qwen3_5_text": GraphOf(
        "qwen35", {**_HYBRID, "linear_split": True}, (*LINEAR, "partial_rotary_factor"), scalings=()
    ),
    "qwen3_5_moe_text": GraphOf(
        "qwen35moe",
        {**_HYBRID, "linear_split": True, "norm_topk_prob": True},
        (*LINEAR, *_SHARED, "partial_rotary_factor"),
        scalings=(),
    ),
    "qwen3_next": GraphOf(
        "qwen3next",
        {**_HYBRID, "norm_topk_prob": True},
        (*LINEAR, *_SHARED, "partial_rotary_factor"),
        scalings=(),
    ),
    "glm4_moe": GraphOf(
        "glm4moe",
        {**_SIGMOID, "attention_output_bias": False},
        (*ROUTED, "attention_bias", "qk_norm", "partial_rotary_factor"),
        dense_first=True,
        is_shared=True,
    ),
    "dots1": GraphOf(
        "dots1", {**_SIGMOID, "qk_norm": "head"}, ROUTED, own_head=True, dense_first=True, is_shared=True
    ),
    "deepseek_v3": _DEEPSEEK,
    "ernie4_5_moe": GraphOf(
        "ernie4_5-moe",
        {"router_correction": True, "norm_topk_prob": True, "rope_interleaved": True},
        (*EXPERTS, "shared_experts_intermediate_size", "dense_layers"),
        dense_first=True,
    ),
    "exaone4": GraphOf(
        "exaone4", {"norm_position": "after", "qk_norm": "head"}, scalings=("llama3",), most_layers=63
    ),
    "hunyuan_v1_dense": GraphOf("hunyuan-dense", {"qk_norm": "head_rotated"}, scalings=()),
    "apertus": GraphOf(
        "apertus",
        {"mlp": "plain", "hidden_act": "xielu", "qk_norm": "head"},
        scalings=("llama3",),
        own_head=True,
    ),
    "falcon": GraphOf(
        "falcon",
        {**_PLAIN_MLP, "hidden_act": "gelu", "parallel_residual": True},
        ("shared_norm",),
        scalings=(),
    ),
    "starcoder2": GraphOf("starcoder2", {**_PLAIN_MLP, **_ALL_BIASES, "hidden_act": "gelu_tanh"}),
}
"""By model_type."""
WITH_WIDE_QUERIES = (26, 27)
"""Layers of the models of DeepSeek whose queries llama.cpp expects without a latent of their own."""
EVEN_HEADS = {
    *("qwen2", "phi3", "olmo2", "gptneox", "gpt2", "starcoder2", "olmoe", "olmo", "phi2", "stablelm"),
    *("command-r", "cohere2", "nemotron", "qwen2moe", "exaone4", "falcon"),
}
"""The architectures whose heads together are as wide as the model."""
UNGROUPED = {"olmoe", "dots1"}
"""Those in which every query head has a key of its own."""
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the models whose scores llama.cpp divides by √(hidden_size / heads), not by √head_dim."""
_AS_SAFETENSORS = (
    "write a Hugging Face folder with scripts/convert_lit_checkpoint.py instead, for vLLM and transformers"
)


def graph_of(model_type: str, config: ModelConfig) -> GraphOf:
    """The architecture for a model of a family. Raises CheckpointError if llama.cpp has none, or
    computes something else in it, naming that."""
    graph = GRAPHS.get(model_type)
    if graph is None:
        raise CheckpointError(
            f"models of the family {model_type} cannot be written as GGUF, only {', '.join(GRAPHS)}; "
            f"{_AS_SAFETENSORS}"
        )
    for fact in dataclasses.fields(ModelConfig):
        if fact.name in SIZES | CHECKED_APART | {*graph.free}:
            continue
        expected, value = graph.fixed.get(fact.name, fact.default), getattr(config, fact.name)
        if fact.name == "attention_output_bias" and value is None and expected is not None:
            value = config.attention_bias
        if value != expected:
            raise CheckpointError(
                f"{fact.name} is {value!r}, and llama.cpp's architecture {graph.name} has "
                f"{expected!r}; {_AS_SAFETENSORS}"
            )
    without = [n for n in range(config.num_hidden_layers) if graph.without_rope and graph.without_rope(n)]
    if [*config.layers_without_rope] != without:
        raise CheckpointError(
            f"layers_without_rope is {[*config.layers_without_rope]}, and llama.cpp's architecture "
            f"{graph.name} has {without}; {_AS_SAFETENSORS}"
        )
    if graph.always_tied and not config.tie_word_embeddings:
        raise CheckpointError(
            f"the model has an output head of its own, and llama.cpp's architecture {graph.name} has none; "
            f"{_AS_SAFETENSORS}"
        )
    _check_heads(graph, config)
    _check_layers(graph, config)
    _check_experts(graph, config)
    _check_linear(graph, config)
    _check_latent(graph, config)
    _check_scores(graph, config)
    _check_scaling(graph, config)
    return graph


def _check_heads(graph: GraphOf, config: ModelConfig) -> None:
    width = config.num_attention_heads * config.head_dim
    if graph.name in EVEN_HEADS and width != config.hidden_size:
        raise CheckpointError(
            f"num_attention_heads x head_dim is {width}, and in llama.cpp's architecture {graph.name} it is "
            f"hidden_size, {config.hidden_size}; {_AS_SAFETENSORS}"
        )
    if graph.name in UNGROUPED and config.num_key_value_heads != config.num_attention_heads:
        raise CheckpointError(
            f"num_key_value_heads is {config.num_key_value_heads}, and in llama.cpp's architecture "
            f"{graph.name} it is num_attention_heads, {config.num_attention_heads}; {_AS_SAFETENSORS}"
        )


def _check_layers(graph: GraphOf, config: ModelConfig) -> None:
    if graph.most_layers is not None and config.num_hidden_layers > graph.most_layers:
        raise CheckpointError(
            f"num_hidden_layers is {config.num_hidden_layers}, and llama.cpp's architecture {graph.name} has "
            f"windows of its own above {graph.most_layers}; {_AS_SAFETENSORS}"
        )


def _check_experts(graph: GraphOf, config: ModelConfig) -> None:
    first = range(len(config.dense_layers))
    if graph.dense_first and [*config.dense_layers] != [*first]:
        raise CheckpointError(
            f"dense_layers is {[*config.dense_layers]}, and in llama.cpp's architecture {graph.name} such "
            f"layers are the first ones; {_AS_SAFETENSORS}"
        )
    shared, width = config.shared_experts_intermediate_size or 0, config.moe_intermediate_size
    if graph.is_shared and (not shared or shared % width):
        raise CheckpointError(
            f"shared_experts_intermediate_size is {shared or None}, and in llama.cpp's architecture "
            f"{graph.name} it is a multiple of moe_intermediate_size, {width}; {_AS_SAFETENSORS}"
        )


def _check_latent(graph: GraphOf, config: ModelConfig) -> None:
    is_wide = config.num_hidden_layers in WITH_WIDE_QUERIES
    if graph is _DEEPSEEK and (config.q_lora_rank is None) != is_wide:
        raise CheckpointError(
            f"q_lora_rank is {config.q_lora_rank}, and llama.cpp's architecture {graph.name} has "
            f"{'none' if is_wide else 'one'} for {config.num_hidden_layers} layers; {_AS_SAFETENSORS}"
        )


def _check_linear(graph: GraphOf, config: ModelConfig) -> None:
    """Raise CheckpointError for linear attention that llama.cpp does not have."""
    if "linear_attention_layers" not in graph.free:
        return
    layers = [*(config.linear_attention_layers or ())]
    if full_attention_interval(config) is None or not layers:
        raise CheckpointError(
            f"linear_attention_layers is {layers}, and in llama.cpp's "
            f"architecture {graph.name} each n-th layer has none, and all others have it; {_AS_SAFETENSORS}"
        )
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    if keys != values:
        raise CheckpointError(
            f"linear_value_head_dim is {values}, and in llama.cpp's architecture {graph.name} it is "
            f"linear_key_head_dim, {keys}; {_AS_SAFETENSORS}"
        )


def _check_scores(graph: GraphOf, config: ModelConfig) -> None:
    """Raise CheckpointError if attention scores are divided by something else than llama.cpp does,
    which the metadata cannot say."""
    if graph.name not in GEMMA_27B:
        return
    is_27b = config.num_hidden_layers == GEMMA_27B[graph.name]
    theirs = config.hidden_size / config.num_attention_heads if is_27b else config.head_dim
    ours = config.query_pre_attn_scalar or config.head_dim
    if ours != theirs:
        raise CheckpointError(
            f"query_pre_attn_scalar is {ours:g}, and llama.cpp's architecture {graph.name} has {theirs:g} "
            f"for {config.num_hidden_layers} layers; {_AS_SAFETENSORS}"
        )


def _check_scaling(graph: GraphOf, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    # Within the context of pre-training, dynamic scaling changes nothing; the file has that context.
    if scaling is None or scaling.rope_type == "dynamic":
        return
    if scaling.rope_type not in graph.scalings:
        known = ", ".join(graph.scalings) or "none"
        raise CheckpointError(
            f"rope_scaling is of type {scaling.rope_type}, and llama.cpp's architecture {graph.name} has "
            f"{known}; {_AS_SAFETENSORS}"
        )
    if scaling.rope_type == "yarn":
        # With latent attention, scores have the factor, and not cosines and sines.
        default = 1.0 if config.mscale_all_dim is not None else yarn_attention_factor(scaling)
        if graph is _DEEPSEEK and config.mscale_all_dim is None:
            raise CheckpointError(
                "rope_scaling of type yarn has no mscale_all_dim, which llama.cpp's architecture "
                f"{graph.name} has; {_AS_SAFETENSORS}"
            )
        given = (scaling.beta_fast, scaling.beta_slow, scaling.truncate)
        if given != (32, 1, True) or not math.isclose(scaling.attention_factor, default, rel_tol=1e-6):
            raise CheckpointError(
                "rope_scaling of type yarn has beta_fast, beta_slow, truncate, attention_factor "
                f"{(*given, scaling.attention_factor)}, and llama.cpp has {(32, 1, True, default)}; "
                f"{_AS_SAFETENSORS}"
            )


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """What llama.cpp multiplies cosines and sines by."""
    return 0.1 * math.log(scaling.factor) + 1


def context_of(graph: GraphOf, config: ModelConfig) -> int:
    """The context up to which llama.cpp computes what the model does: that of the model, or its
    window, if llama.cpp has no such windows. A context that fits the window does not notice it."""
    if config.sliding_window is None or has_windows(graph, config):
        return config.max_position_embeddings
    return min(config.sliding_window, config.max_position_embeddings)


def has_windows(graph: GraphOf, config: ModelConfig) -> bool:
    """Whether the windows of a model are those of the architecture."""
    if config.sliding_window is None or graph.full_attention is None:
        return False
    full = tuple(layer for layer in range(config.num_hidden_layers) if graph.full_attention(layer))
    return config.full_attention_layers == full


def full_attention_interval(config: ModelConfig) -> int | None:
    """The number n of which every n-th layer has attention without a state, as llama.cpp counts them;
    None if there is none."""
    layers = range(config.num_hidden_layers)
    full = [layer for layer in layers if not config.is_linear(layer)]
    every = full[0] + 1 if full else 0
    return every if full and full == [layer for layer in layers if (layer + 1) % every == 0] else None
