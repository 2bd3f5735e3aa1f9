"""Llama and the families that change little of it. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.hf_config import (
    HFConfig,
    common_fields,
    optional_window_settings,
    window_fields,
)
from litlora.formats.families.rope import rope_settings


def read_llama(c: HFConfig) -> dict[str, Any]:
    return {
        **common_fields(c),
        "attention_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False),
    }


def write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def read_mistral(c: HFConfig) -> dict[str, Any]:
    windows = window_fields(c.replace(layer_types=None), c.get("sliding_window", 4096), lambda layer: True)
    return {**common_fields(c), **windows}


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def read_mixtral(c: HFConfig) -> dict[str, Any]:
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), theta=1e6),
        **window_fields(c, c.get("sliding_window"), lambda layer: True),
        "num_experts": c.get("num_local_experts", 8),
        "num_experts_per_tok": c.get("num_experts_per_tok", 2),
        "moe_intermediate_size": c.need("intermediate_size"),
        "norm_topk_prob": True,
    }


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        "sliding_window": config.sliding_window,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
    }


def read_phi3(c: HFConfig) -> dict[str, Any]:
    in_file = c.get("rope_scaling") or c.get("rope_parameters") or {}
    scaling = {**in_file, "original_max_position_embeddings": c.get("original_max_position_embeddings", 4096)}
    if "long_factor" in in_file:  # longrope, whatever the file calls it
        scaling["rope_type"] = "longrope"
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), scaling=scaling),
        **window_fields(c.replace(layer_types=None), c.get("sliding_window"), lambda layer: True),
    }


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    scaling = rope_settings(config)
    original = scaling.pop("original_max_position_embeddings", None) if scaling else None
    if scaling:
        scaling["type"] = scaling.pop("rope_type")
    return {
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.partial_rotary_factor,
        "rope_scaling": scaling,
        "original_max_position_embeddings": original or config.max_position_embeddings,
    }


def read_olmo(c: HFConfig) -> dict[str, Any]:
    return {
        **common_fields(c),
        "norm": "layernorm_plain",
        "norm_eps": 1e-5,
        "attention_bias": c.get("attention_bias", False),
        "clip_qkv": c.get("clip_qkv"),
    }


def write_olmo(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "clip_qkv": config.clip_qkv}


def read_olmo2(c: HFConfig) -> dict[str, Any]:
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5)),
        "norm_position": "after",
        "qk_norm": "all_heads",
        "attention_bias": c.get("attention_bias", False),
    }


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def read_smollm3(c: HFConfig) -> dict[str, Any]:
    layers, interval = c.layers, c.get("no_rope_layer_interval", 4)
    # In spite of its name, a 1 in no_rope_layers means that the layer has rope.
    rotated = c.get("no_rope_layers") or [(layer + 1) % interval for layer in layers]
    if len(rotated) < len(layers):
        raise CheckpointError(f"no_rope_layers has {len(rotated)} entries; there are {len(layers)} layers")
    window = c.get("sliding_window") if c.get("use_sliding_window") else None
    return {
        **common_fields(c, tied=True, theta=2e6),
        **window_fields(c, window, lambda layer: not rotated[layer]),
        "layers_without_rope": tuple(layer for layer in layers if not rotated[layer]),
        "attention_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False),
    }


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
    rotated = [int(layer not in config.layers_without_rope) for layer in range(config.num_hidden_layers)]
    return {
        **optional_window_settings(config),
        "no_rope_layers": rotated,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
