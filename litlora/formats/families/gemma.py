"""Gemma 1 to 3 (text only). Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import (
    HFConfig,
    activation_name,
    common_fields,
    layer_types,
    window_fields,
)
from litlora.formats.families.rope import rope_by_kind


def read_gemma(c: HFConfig) -> dict[str, Any]:
    # Released files say gelu and mean its tanh form. hidden_activation takes precedence.
    act = c.get("hidden_activation") or c.get("hidden_act", "gelu_pytorch_tanh")
    c = c.replace(hidden_act="gelu_pytorch_tanh" if act == "gelu" else act)
    return {
        **common_fields(c, activation=("hidden_act", "gelu_pytorch_tanh"), tied=True, head_dim=256),
        "norm": "rmsnorm_plus_one",
        "scale_embeddings": True,
        "attention_bias": c.get("attention_bias", False),
    }


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def read_gemma2(
    c: HFConfig, caps: tuple[float | None, float | None] = (50.0, 30.0), **rope: Any
) -> dict[str, Any]:
    """`caps` are the default caps of the attention scores and of the logits."""
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    return {
        **common_fields(c, activation=activation, tied=True, head_dim=256, **rope),
        **window_fields(c, c.get("sliding_window", 4096), lambda layer: layer % 2 == 0),
        "norm": "rmsnorm_plus_one",
        "norm_position": "both",
        "scale_embeddings": True,
        "attention_bias": c.get("attention_bias", False),
        "query_pre_attn_scalar": c.get("query_pre_attn_scalar", 256),
        "attn_logit_softcapping": c.get("attn_logit_softcapping", caps[0]),
        "final_logit_softcapping": c.get("final_logit_softcapping", caps[1]),
    }


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    scalar = config.query_pre_attn_scalar or config.head_dim
    return {
        "hidden_activation": activation_name(config),
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "attention_bias": config.attention_bias,
        # transformers wants a whole number
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def read_gemma3(c: HFConfig) -> dict[str, Any]:
    pattern = c.get("sliding_window_pattern", 6)
    kinds = c.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in c.layers
    ]
    source, scaling, local = rope_by_kind(c.replace(layer_types=kinds))
    fields = read_gemma2(source, caps=(None, None), theta=1e6, scaling=scaling)
    base = local or c.get("rope_local_base_freq") or 10_000.0
    differs = base != fields["rope_theta"] or fields["rope_scaling"] is not None
    local_base = base if differs and "sliding_window" in fields else None
    return {**fields, "qk_norm": "head", "rope_local_base_freq": local_base}


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    return {**write_gemma2(config), "rope_local_base_freq": config.rope_local_base_freq or config.rope_theta}
