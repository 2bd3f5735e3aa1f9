"""Hugging Face's `config.json` -> ModelConfig and back, one entry a model family. Torch-free.

A family is known by its `model_type`. What its entry reads, it also writes; `write_config` reads
its own result again and refuses where that is not the same model. Dropout is not read: it is no
fact of the weights, and training has its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.storage.untrusted import read_json

HF_CONFIG_FILE = "config.json"
MOST_LAYERS = 10_000
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
MISSING = {
    "BaichuanForCausalLM": "its own remote code",
    "BloomForCausalLM": "ALiBi positions and a norm behind the embedding",
    "ChatGLMModel": "its own remote code",
    "Cohere2ForCausalLM": "interleaved rotary embeddings and a logit scale",
    "CohereForCausalLM": "interleaved rotary embeddings and a logit scale",
    "DeepseekV2ForCausalLM": "multi-head latent attention",
    "DeepseekV3ForCausalLM": "multi-head latent attention",
    "GPTBigCodeForCausalLM": "its fused multi-query layout",
    "GPTJForCausalLM": "interleaved rotary embeddings",
    "Gemma3ForConditionalGeneration": "an image encoder (the text-only Gemma3ForCausalLM is covered)",
    "Gemma3nForConditionalGeneration": "image and audio encoders",
    "GptOssForCausalLM": "attention sinks",
    "GraniteForCausalLM": "its multipliers of embedding, residual, attention and logits",
    "JambaForCausalLM": "state-space layers",
    "Llama4ForConditionalGeneration": "an image encoder and chunked attention",
    "MambaForCausalLM": "state-space layers",
    "Mamba2ForCausalLM": "state-space layers",
    "MPTForCausalLM": "ALiBi positions",
    "MptForCausalLM": "ALiBi positions",
    "OPTForCausalLM": "its offset learned positions",
    "Phi3SmallForCausalLM": "block-sparse attention",
    "Phi3VForCausalLM": "an image encoder",
    "PhimoeForCausalLM": "its router",
    "Qwen2VLForConditionalGeneration": "an image encoder",
    "Qwen2_5_VLForConditionalGeneration": "an image encoder",
    "Qwen3NextForCausalLM": "linear attention",
    "RWForCausalLM": "its own remote code (the later FalconForCausalLM is covered)",
}
"""What some architectures that people ask for would take."""


class Source:
    """The settings of one config.json; a setting that is absent has the family's default, one that
    is null is None."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def need(self, *names: str) -> Any:
        """The value under the first of several names."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        raise CheckpointError(f"{names[0]} missing")

    @property
    def layers(self) -> range:
        """The numbers of the layers; bounded, as lists are made of them."""
        count = self.need("num_hidden_layers", "n_layer")
        if type(count) is not int or not 0 < count <= MOST_LAYERS:
            raise CheckpointError(
                f"num_hidden_layers is {count!r}; it must be a whole number from 1 to {MOST_LAYERS}"
            )
        return range(count)

    def only(self, name: str, allowed: Any, default: Any) -> None:
        """Refuse a setting that changes what the model computes and is not implemented."""
        if (value := self.get(name, default)) != allowed:
            raise CheckpointError(f"{name} is {value!r}; only {allowed!r} is implemented")


@dataclass(frozen=True)
class Family:
    """One family: the architecture's name, and how its settings are read and written."""

    architecture: str
    read: Callable[[Source], dict[str, Any]]
    """-> the fields of ModelConfig."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """-> the settings that `_standard` does not cover or that have another name here."""
    without: tuple[str, ...] = ()
    """The settings of `_standard` that this family does not have."""


# ---- reading and writing a whole file


def read_config(values: dict[str, Any]) -> tuple[str, ModelConfig]:
    """(model_type, ModelConfig) of a config.json. Raises CheckpointError for what is not covered,
    naming what is missing."""
    kind, architectures = values.get("model_type"), values.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    if (
        not isinstance(kind, str)
        or kind not in FAMILIES
        or (named is not None and named != FAMILIES[kind].architecture)
    ):
        what = MISSING.get(named)
        covered = ", ".join(family.architecture for family in FAMILIES.values())
        raise CheckpointError(
            f"architecture {named or kind!r} (model_type {kind!r}) is not covered"
            + (f": it needs {what}" if what else "")
            + f"; covered: {covered}"
        )
    source = Source(values)
    if quantized := values.get("quantization_config"):
        by = quantized if isinstance(quantized, dict) else {}
        method = by.get("quant_method") or (
            "bitsandbytes" if by.get("load_in_4bit") or by.get("load_in_8bit") else None
        )  # as of old
        if method != "bitsandbytes":
            raise CheckpointError(
                f"quantization_config: weights quantized by {method!r} are not read, only bitsandbytes' in 4 and 8 bits; "
                "take the model in 16 or 32 bits"
            )
    try:
        if values.get("use_bidirectional_attention"):
            source.only("use_bidirectional_attention", False, False)
        return kind, ModelConfig(**FAMILIES[kind].read(source))
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as error:  # values of strange types
        raise CheckpointError(f"not a usable configuration: {error}") from None


def load_config(directory: Path) -> tuple[str, ModelConfig]:
    """(model_type, ModelConfig) of the config.json in a directory. Raises CheckpointError with the
    file's path in front."""
    path = directory / HF_CONFIG_FILE
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a Hugging Face folder needs it") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    try:
        return read_config(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_config(config: ModelConfig, model_type: str | None = None) -> dict[str, Any]:
    """The config.json of a model, as the family named, else as the first that can express it.

    Raises CheckpointError if none can: the settings are read back and must give the same
    ModelConfig.
    """
    for kind in [model_type] if model_type else FAMILIES:
        family = FAMILIES[kind]
        standard = {name: value for name, value in _standard(config).items() if name not in family.without}
        values = {
            "architectures": [family.architecture],
            "model_type": kind,
            **standard,
            **family.write(config),
        }
        try:
            if read_config(values)[1] == config:
                return values
        except CheckpointError:
            continue
    what = (
        f"architecture {FAMILIES[model_type].architecture}"
        if model_type
        else "any of Hugging Face's architectures known here"
    )
    raise CheckpointError(f"this model cannot be expressed as {what}")


def adapt_config(values: dict[str, Any], config: ModelConfig) -> dict[str, Any] | None:
    """A base's own config.json for a model made from it; None if it describes another one.

    A fine-tune may change what belongs to the vocabulary: the rows of the embedding, and whether
    the head is tied to it.
    """
    # auto_map names code beside the base, which stays there; what is written is not quantized
    values = {
        name: value for name, value in values.items() if name not in ("auto_map", "quantization_config")
    }
    adapted = {**values, "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    try:
        return adapted if read_config(adapted)[1] == config else None
    except CheckpointError:
        return None


# ---- what families share


def _common(
    c: Source,
    *,
    eps: str = "rms_norm_eps",
    default_eps: float = 1e-6,
    activation: str = "hidden_act",
    default_activation: str = "silu",
    tied: bool = False,
    head_dim: int | None = None,
    **rope: Any,
) -> dict[str, Any]:
    """The fields that nearly all families read alike; `head_dim` is the family's default."""
    hidden, heads = c.need("hidden_size", "n_embd"), c.need("num_attention_heads", "n_head")
    dim = c.get("head_dim") or head_dim
    if dim is None:
        if hidden % heads:
            raise CheckpointError(
                f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})"
            )
        dim = hidden // heads
    act = c.get(activation, default_activation)
    act = default_activation if act is None else act
    if act not in ACTIVATIONS:
        raise CheckpointError(f"{activation} {act!r} is not implemented; there are {', '.join(ACTIVATIONS)}")
    return {
        "vocab_size": c.need("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": c.get("intermediate_size"),
        "num_hidden_layers": len(c.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": c.get("num_key_value_heads") or heads,
        "head_dim": dim,
        "max_position_embeddings": c.need("max_position_embeddings", "n_positions"),
        "norm_eps": c.get(eps, default_eps),
        "hidden_act": ACTIVATIONS[act],
        "tie_word_embeddings": c.get("tie_word_embeddings", tied),
        **_rope(c, **rope),
    }


def _standard(config: ModelConfig) -> dict[str, Any]:
    """The settings that nearly all families write alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "gelu_pytorch_tanh" if config.hidden_act == "gelu_tanh" else config.hidden_act,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_settings(config),
        # no facts of the architecture, but some families' own defaults lie outside a smaller
        # vocabulary
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }


SCALING_KEYS = {
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
OTHER_SCALING_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "mscale",
    "mscale_all_dim",
    "finetuned",
}


def _rope(c: Source, theta: float = 10_000.0, partial: float = 1.0, *, scaling: Any = None) -> dict[str, Any]:
    """The rotary fields: from `rope_parameters` (2025 and later), or from `rope_theta`,
    `rope_scaling` and the share rotated."""
    values = scaling or c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise CheckpointError(
            f"rope_parameters {values!r}: settings of this form are not implemented for this architecture"
        )
    known = OTHER_SCALING_KEYS.union(*SCALING_KEYS.values())
    if unknown := sorted(values.keys() - known):
        raise CheckpointError(f"rope scaling: {', '.join(unknown)} is not implemented")
    share = values.get("partial_rotary_factor", c.get("partial_rotary_factor", partial))
    return {
        "rope_theta": values.get("rope_theta") or c.get("rope_theta") or theta,
        "partial_rotary_factor": 1.0 if share is None else share,
        "rope_scaling": _scaling(c, values),
    }


def _scaling(c: Source, values: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of RopeScaling, with what follows from others filled in."""
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind == "su":
        kind = "longrope"  # Phi-3's first name for it
    if kind not in SCALING_KEYS:
        raise CheckpointError(
            f"rope scaling of type {kind!r} is not implemented; there are {', '.join(SCALING_KEYS)}"
        )
    original = values.get("original_max_position_embeddings") or c.get("original_max_position_embeddings")
    found = {**values, "original_max_position_embeddings": original or c.need("max_position_embeddings")}
    if kind == "yarn":
        found = {
            **found,
            "beta_fast": values.get("beta_fast") or 32,
            "beta_slow": values.get("beta_slow") or 1,
        }
        found["truncate"] = values.get("truncate", True)
    if kind in ("yarn", "longrope") and values.get("attention_factor") is None:
        found["attention_factor"] = _attention_factor(c, kind, found)
    return {"rope_type": kind, **{key: found.get(key) for key in SCALING_KEYS[kind]}}


def _attention_factor(c: Source, kind: str, values: dict[str, Any]) -> float:
    """yarn: 0.1 ln(factor) + 1; longrope: sqrt(1 + ln(factor) / ln(original)); both where nothing
    else is said."""
    original = values["original_max_position_embeddings"]
    factor = values.get("factor") or c.need("max_position_embeddings") / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    shares = (values.get("mscale"), values.get("mscale_all_dim"))
    if all(shares):
        return (0.1 * shares[0] * math.log(factor) + 1) / (0.1 * shares[1] * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def _scaling_settings(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_scaling is None:
        return None
    values = config.rope_scaling.to_dict()
    if values["rope_type"] == "longrope":  # readers of before 2025 want exactly the type and the factors
        source = Source({"max_position_embeddings": config.max_position_embeddings})
        if values["attention_factor"] == _attention_factor(source, "longrope", {**values, "factor": None}):
            del values["attention_factor"]
    return values


def _windows(c: Source, window: int | None, slides: Callable[[int], bool]) -> dict[str, Any]:
    """The fields of sliding windows: from `layer_types` if it is there, else by the family's own
    rule."""
    layers = c.layers
    kinds = c.get("layer_types") or [
        "sliding_attention" if slides(layer) else "full_attention" for layer in layers
    ]
    if strange := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise CheckpointError(f"layer_types: {', '.join(strange)} is not implemented")
    if len(kinds) != len(layers):
        raise CheckpointError(f"layer_types has {len(kinds)} entries; there are {len(layers)} layers")
    if window is None or "sliding_attention" not in kinds:
        return {}
    full = tuple(layer for layer in layers if kinds[layer] == "full_attention")
    return {"sliding_window": window, "full_attention_layers": full}


def _layer_types(config: ModelConfig) -> list[str]:
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _optional_window(config: ModelConfig) -> dict[str, Any]:
    """Windows as the Qwen family and SmolLM 3 write them."""
    kinds = _layer_types(config)
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
    on = config.sliding_window is not None
    return {
        "use_sliding_window": on,
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _experts(c: Source) -> dict[str, Any]:
    """The fields of Qwen's experts: every decoder_sparse_step-th layer has them, but those
    listed."""
    step, plain = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    dense = tuple(layer for layer in c.layers if layer in plain or (layer + 1) % step)
    return {
        "num_experts": c.need("num_experts", "num_local_experts"),
        "num_experts_per_tok": c.need("num_experts_per_tok"),
        "moe_intermediate_size": c.need("moe_intermediate_size"),
        "norm_topk_prob": c.get("norm_topk_prob", False),
        "dense_layers": dense,
    }


def _expert_settings(config: ModelConfig) -> dict[str, Any]:
    names = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "shared_expert_intermediate_size",
    )
    return {name: getattr(config, name) for name in names} | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }


# ---- the families


def _llama(c: Source) -> dict[str, Any]:
    return {
        **_common(c),
        "attention_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False),
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _mistral(c: Source) -> dict[str, Any]:
    return {
        **_common(c),
        **_windows(
            Source({**c.values, "layer_types": None}), c.get("sliding_window", 4096), lambda layer: True
        ),
    }


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _mixtral(c: Source) -> dict[str, Any]:
    return {
        **_common(c, default_eps=1e-5, theta=1e6),
        **_windows(c, c.get("sliding_window"), lambda layer: True),
        "num_experts": c.get("num_local_experts", 8),
        "num_experts_per_tok": c.get("num_experts_per_tok", 2),
        "moe_intermediate_size": c.need("intermediate_size"),
        "norm_topk_prob": True,
    }


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": config.sliding_window,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
    }


def _qwen2(c: Source) -> dict[str, Any]:
    window, first = (
        c.get("sliding_window", 4096) if c.get("use_sliding_window") else None,
        c.get("max_window_layers", 28),
    )
    windows = _windows(c, window, lambda layer: layer >= first)
    return {**_common(c), **windows, "attention_bias": True, "attention_output_bias": False}


def _qwen2_moe(c: Source) -> dict[str, Any]:
    window, last = (
        c.get("sliding_window", 4096) if c.get("use_sliding_window") else None,
        c.get("max_window_layers", 28),
    )
    bias = c.get("qkv_bias", True)
    return {
        **_common(c),
        **_windows(c, window, lambda layer: layer % 2 == 0 and layer < last),
        **_experts(c),
        "shared_expert_intermediate_size": c.need("shared_expert_intermediate_size"),
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
    }


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return {**_optional_window(config), **_expert_settings(config), "qkv_bias": config.attention_bias}


def _qwen3(c: Source) -> dict[str, Any]:
    window, first = (
        c.get("sliding_window", 4096) if c.get("use_sliding_window") else None,
        c.get("max_window_layers", 28),
    )
    windows = _windows(c, window, lambda layer: layer >= first)
    return {
        **_common(c, head_dim=128),
        **windows,
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "head",
    }


def _qwen3_moe(c: Source) -> dict[str, Any]:
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    every = Source({**c.values, "layer_types": None})
    return {
        **_common(c),
        **_windows(every, window, lambda layer: True),
        **_experts(c),
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "head",
    }


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {**_optional_window(config), **_expert_settings(config), "attention_bias": config.attention_bias}


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**_optional_window(config), "attention_bias": config.attention_bias}


def _gemma(c: Source) -> dict[str, Any]:
    # Released files say gelu and mean its tanh form; where hidden_activation is there too, it has
    # the last word.
    act = c.get("hidden_activation") or c.get("hidden_act", "gelu_pytorch_tanh")
    c = Source({**c.values, "hidden_act": "gelu_pytorch_tanh" if act == "gelu" else act})
    return {
        **_common(c, default_activation="gelu_pytorch_tanh", tied=True, head_dim=256),
        "norm": "rmsnorm_plus_one",
        "scale_embeddings": True,
        "attention_bias": c.get("attention_bias", False),
    }


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def _gemma2(c: Source, caps: tuple[float | None, float | None] = (50.0, 30.0), **rope: Any) -> dict[str, Any]:
    return {
        **_common(
            c,
            activation="hidden_activation",
            default_activation="gelu_pytorch_tanh",
            tied=True,
            head_dim=256,
            **rope,
        ),
        **_windows(c, c.get("sliding_window", 4096), lambda layer: layer % 2 == 0),
        "norm": "rmsnorm_plus_one",
        "norm_position": "both",
        "scale_embeddings": True,
        "attention_bias": c.get("attention_bias", False),
        "query_pre_attn_scalar": c.get("query_pre_attn_scalar", 256),
        "attn_logit_softcapping": c.get("attn_logit_softcapping", caps[0]),
        "final_logit_softcapping": c.get("final_logit_softcapping", caps[1]),
    }


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    scalar = config.query_pre_attn_scalar or config.head_dim
    return {
        "hidden_activation": "gelu_pytorch_tanh" if config.hidden_act == "gelu_tanh" else config.hidden_act,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": int(scalar)
        if scalar == int(scalar)
        else scalar,  # transformers wants a whole number
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3(c: Source) -> dict[str, Any]:
    by_kind, pattern = c.get("rope_parameters") or {}, c.get("sliding_window_pattern", 6)
    layers = c.layers
    kinds = c.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in layers
    ]
    local = by_kind.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise CheckpointError(
            "rope_parameters: scaling in the layers with a sliding window is not implemented"
        )
    scaling = {**(by_kind.get("full_attention") or {}), **(c.get("rope_scaling") or {})}
    source = Source({**c.values, "layer_types": kinds, "rope_parameters": None})
    fields = _gemma2(source, caps=(None, None), theta=1e6, scaling=scaling)
    base = local.get("rope_theta") or c.get("rope_local_base_freq") or 10_000.0
    apart = "sliding_window" in fields and (
        base != fields["rope_theta"] or fields["rope_scaling"] is not None
    )
    return {**fields, "qk_norm": "head", "rope_local_base_freq": base if apart else None}


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gemma2(config), "rope_local_base_freq": config.rope_local_base_freq or config.rope_theta}


def _phi(c: Source) -> dict[str, Any]:
    return {
        **_common(c, eps="layer_norm_eps", default_eps=1e-5, default_activation="gelu_new", partial=0.5),
        "norm": "layernorm",
        "parallel_residual": True,
        "shared_norm": True,
        "mlp": "plain",
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "qk_norm": "head" if c.get("qk_layernorm") else "none",
    }


def _write_phi(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu_new" if config.hidden_act == "gelu_tanh" else config.hidden_act,
        "partial_rotary_factor": config.partial_rotary_factor,
        "qk_layernorm": config.qk_norm == "head",
    }


def _phi3(c: Source) -> dict[str, Any]:
    old = c.get("rope_scaling") or c.get("rope_parameters") or {}
    values = {**old, "original_max_position_embeddings": c.get("original_max_position_embeddings", 4096)}
    if "long_factor" in old:  # whatever the type is called, these are longrope's
        values["rope_type"] = "longrope"
    return {
        **_common(c, default_eps=1e-5, scaling=values),
        **_windows(Source({**c.values, "layer_types": None}), c.get("sliding_window"), lambda layer: True),
    }


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    scaling = _scaling_settings(config)
    original = scaling.pop("original_max_position_embeddings", None) if scaling else None
    if scaling:
        scaling["type"] = scaling.pop("rope_type")
    return {
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.partial_rotary_factor,
        "rope_scaling": scaling,
        "original_max_position_embeddings": original or config.max_position_embeddings,
    }


def _gpt_neox(c: Source) -> dict[str, Any]:
    source = Source(
        {
            **c.values,
            "partial_rotary_factor": c.get("rotary_pct", 0.25),
            "rope_theta": c.get("rotary_emb_base", 10_000.0),
        }
    )
    return {
        **_common(source, eps="layer_norm_eps", default_eps=1e-5, default_activation="gelu"),
        "norm": "layernorm",
        "parallel_residual": c.get("use_parallel_residual", True),
        "mlp": "plain",
        "attention_bias": c.get("attention_bias", True),
        "mlp_bias": True,
    }


def _write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.partial_rotary_factor,
        "rotary_emb_base": config.rope_theta,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
    }


def _gpt2(c: Source) -> dict[str, Any]:
    c.only("add_cross_attention", False, False)
    c.only("scale_attn_by_inverse_layer_idx", False, False)
    act = {"activation": "activation_function", "default_activation": "gelu_new"}
    fields = _common(c, eps="layer_norm_epsilon", default_eps=1e-5, tied=True, **act)
    return {
        **fields,
        "intermediate_size": c.get("n_inner") or 4 * fields["hidden_size"],
        "positions": "learned",
        "norm": "layernorm",
        "mlp": "plain",
        "attention_bias": True,
        "mlp_bias": True,
        "query_pre_attn_scalar": None if c.get("scale_attn_weights", True) else 1.0,
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "activation_function": "gelu_new" if config.hidden_act == "gelu_tanh" else config.hidden_act,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.query_pre_attn_scalar is None,
    }


def _falcon(c: Source) -> dict[str, Any]:
    c.only("alibi", False, False)
    new, parallel = bool(c.get("new_decoder_architecture", False)), bool(c.get("parallel_attn", True))
    act = {"activation": "activation", "default_activation": "gelu"}
    c = Source({"max_position_embeddings": 2048, **c.values})  # the released files do not say
    fields = _common(c, eps="layer_norm_epsilon", default_eps=1e-5, tied=True, **act)
    heads, bias = fields["num_attention_heads"], bool(c.get("bias", False))
    norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if new and not parallel or (norms == 2 and not new):
        raise CheckpointError(
            f"new_decoder_architecture {new}, parallel_attn {parallel} and {norms} norms are not implemented together"
        )
    return {
        **fields,
        "intermediate_size": c.get("ffn_hidden_size") or 4 * fields["hidden_size"],
        "num_key_value_heads": (c.get("num_kv_heads") or heads)
        if new
        else 1
        if c.get("multi_query", True)
        else heads,
        "norm": "layernorm",
        "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
        "mlp": "plain",
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def _write_falcon(config: ModelConfig) -> dict[str, Any]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    new = groups not in (1, heads) or (config.parallel_residual and not config.shared_norm)
    return {
        "ffn_hidden_size": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation": "gelu_pytorch_tanh" if config.hidden_act == "gelu_tanh" else config.hidden_act,
        "num_kv_heads": groups,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if new else None,
        "multi_query": groups == 1 and not new,
        "parallel_attn": config.parallel_residual,
        "bias": config.attention_bias,
        "alibi": False,
    }


def _stablelm(c: Source) -> dict[str, Any]:
    bias, parallel = c.get("use_qkv_bias", False), c.get("use_parallel_residual", False)
    return {
        **_common(c, eps="layer_norm_eps", default_eps=1e-5, partial=0.25),
        "norm": "layernorm",
        "parallel_residual": parallel,
        "shared_norm": parallel,
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
        "qk_norm": "each_head" if c.get("qk_layernorm") else "none",
    }


def _write_stablelm(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "partial_rotary_factor": config.partial_rotary_factor,
        "use_parallel_residual": config.parallel_residual,
        "use_qkv_bias": config.attention_bias,
        "qk_layernorm": config.qk_norm == "each_head",
    }


def _olmo(c: Source) -> dict[str, Any]:
    fields = {**_common(c), "norm": "layernorm_plain", "norm_eps": 1e-5}
    return {**fields, "attention_bias": c.get("attention_bias", False), "clip_qkv": c.get("clip_qkv")}


def _write_olmo(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "clip_qkv": config.clip_qkv}


def _olmo2(c: Source) -> dict[str, Any]:
    fields = {**_common(c, default_eps=1e-5), "norm_position": "after", "qk_norm": "all_heads"}
    return {**fields, "attention_bias": c.get("attention_bias", False)}


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def _smollm3(c: Source) -> dict[str, Any]:
    layers, interval = c.layers, c.get("no_rope_layer_interval", 4)
    rotated = c.get("no_rope_layers") or [
        (layer + 1) % interval for layer in layers
    ]  # in spite of the name: 1 has rope
    if len(rotated) < len(layers):
        raise CheckpointError(f"no_rope_layers has {len(rotated)} entries; there are {len(layers)} layers")
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    return {
        **_common(c, tied=True, theta=2e6),
        **_windows(c, window, lambda layer: not rotated[layer]),
        "layers_without_rope": tuple(layer for layer in layers if not rotated[layer]),
        "attention_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False),
    }


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    rotated = [int(layer not in config.layers_without_rope) for layer in range(config.num_hidden_layers)]
    return {
        **_optional_window(config),
        "no_rope_layers": rotated,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


_NOT_FALCON = ("num_key_value_heads", "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps")
_NOT_GPT2 = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
    ),
)
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, _write_llama),
    "mistral": Family("MistralForCausalLM", _mistral, _write_mistral),
    "mixtral": Family("MixtralForCausalLM", _mixtral, _write_mixtral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _optional_window, ("head_dim",)),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, _write_qwen2_moe, ("head_dim",)),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _write_qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _write_qwen3_moe),
    "gemma": Family("GemmaForCausalLM", _gemma, _write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, _write_gemma2, ("hidden_act",)),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _write_gemma3, ("hidden_act",)),
    "phi": Family("PhiForCausalLM", _phi, _write_phi, ("head_dim", "rms_norm_eps")),
    "phi3": Family("Phi3ForCausalLM", _phi3, _write_phi3, ("head_dim",)),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _gpt_neox,
        _write_gpt_neox,
        ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"),
    ),
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _write_gpt2, _NOT_GPT2),
    "falcon": Family("FalconForCausalLM", _falcon, _write_falcon, _NOT_FALCON),
    "stablelm": Family("StableLmForCausalLM", _stablelm, _write_stablelm, ("head_dim", "rms_norm_eps")),
    "olmo": Family("OlmoForCausalLM", _olmo, _write_olmo, ("head_dim", "rms_norm_eps")),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, _write_olmo2, ("head_dim",)),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3, _write_smollm3),
}
