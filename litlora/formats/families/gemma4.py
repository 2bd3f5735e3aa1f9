"""Gemma 4 (text): layers without a window have other heads, the last layers share keys and values, each
layer has an input of its own in the small models, and experts beside its MLP in one. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.hf_config import (
    HFConfig,
    activation_name,
    common_fields,
    layer_types,
    window_fields,
)
from litlora.formats.families.rope import rope_by_kind

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
"""Of a file that has none."""

BLOCKS = {
    "scale_embeddings": True,
    "norm_position": "both",
    "qk_norm": "head",
    "value_norm": True,
    "query_pre_attn_scalar": 1.0,
}
"""What the blocks of Gemma 3n and 4 have in common."""


def read_gemma4(c: HFConfig) -> dict[str, Any]:
    kinds = list(c.get("layer_types") or ())
    kinds = kinds or ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in c.layers]
    c = c.replace(layer_types=[*kinds[:-1], "full_attention"])  # whatever the file says of the last
    source, scaling, local = rope_by_kind(c.replace(rope_parameters=c.get("rope_parameters") or _ROPE))
    fields = {
        **common_fields(
            source.replace(max_position_embeddings=c.get("max_position_embeddings", 131_072)),
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            tied=True,
            head_dim=256,
            scaling=_proportional(scaling),
        ),
        **window_fields(c, c.get("sliding_window", 512), lambda layer: True),
        "attention_bias": c.get("attention_bias", False),
        **BLOCKS,
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "layer_scalar": True,
    }
    shared, width = c.get("num_kv_shared_layers") or None, c.get("hidden_size_per_layer_input", 256) or None
    return {
        **fields,
        **_global_heads(c, fields),
        **_experts(c),
        "rope_local_base_freq": (local or 10_000.0) if "sliding_window" in fields else None,
        "attention_k_eq_v": True if c.get("attention_k_eq_v") else None,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": True if c.get("use_double_wide_mlp") and shared else None,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": c.get("vocab_size_per_layer_input", 262_144) if width else None,
    }


def _experts(c: HFConfig) -> dict[str, Any]:
    if not c.get("enable_moe_block", False):
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": c.need("num_experts"),
        "num_experts_per_tok": c.need("top_k_experts"),
        "moe_intermediate_size": c.need("moe_intermediate_size"),
        "norm_topk_prob": True,
    }


def _proportional(scaling: dict[str, Any]) -> dict[str, Any]:
    """A scaling of this type has a share of its own, which is not that of the rotated dimensions."""
    if scaling.get("rope_type") != "proportional":
        return scaling
    rest = {name: value for name, value in scaling.items() if name != "partial_rotary_factor"}
    return {"factor": 1.0, **rest, "proportion": scaling.get("partial_rotary_factor", 1.0)}


def _global_heads(c: HFConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The heads of the layers without a window. transformers 5 writes what differs for each of them."""
    width, heads = c.get("global_head_dim", 512), c.get("num_global_key_value_heads")
    by_layer = {int(layer): one for layer, one in (c.get("per_layer_config") or {}).items()}
    if by_layer:
        full = {layer for layer in c.layers if c.get("layer_types")[layer] == "full_attention"}
        settings = list(by_layer.values())
        odd = {name for one in settings for name in one} - {"head_dim", "num_key_value_heads"}
        if by_layer.keys() != full or any(one != settings[0] for one in settings) or odd:
            raise CheckpointError(
                "per_layer_config: only one head_dim and num_key_value_heads for all layers without a window "
                "are implemented"
            )
        width, heads = settings[0].get("head_dim"), settings[0].get("num_key_value_heads")
    elif not c.get("attention_k_eq_v"):
        heads = None  # without it the setting has no effect
    width = None if width == fields["head_dim"] else width
    heads = None if heads == fields["num_key_value_heads"] else heads
    if "sliding_window" in fields:
        return {"global_head_dim": width, "num_global_key_value_heads": heads}
    own = {"head_dim": width, "num_key_value_heads": heads}
    return {name: value for name, value in own.items() if value is not None}


def write_gemma4(config: ModelConfig) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        full |= config.rope_scaling.to_dict()
        if "proportion" in full:
            full["partial_rotary_factor"] = full.pop("proportion")
    heads = config.num_global_key_value_heads or config.num_key_value_heads
    differing = {"head_dim": config.global_head_dim or config.head_dim, "num_key_value_heads": heads}
    kinds = layer_types(config)
    return {
        "hidden_activation": activation_name(config),
        "attention_bias": config.attention_bias,
        "sliding_window": config.sliding_window or 512,
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": config.rope_local_base_freq or config.rope_theta,
            },
        },
        "per_layer_config": {
            str(layer): differing for layer, kind in enumerate(kinds) if kind == "full_attention"
        },
        "attention_k_eq_v": bool(config.attention_k_eq_v),
        "num_kv_shared_layers": config.num_kv_shared_layers or 0,
        "use_double_wide_mlp": bool(config.use_double_wide_mlp),
        "hidden_size_per_layer_input": config.hidden_size_per_layer_input or 0,
        "vocab_size_per_layer_input": config.vocab_size_per_layer_input or config.vocab_size,
        "final_logit_softcapping": config.final_logit_softcapping,
        "enable_moe_block": bool(config.enable_moe_block),
        "num_experts": config.num_experts,
        "top_k_experts": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
    }
