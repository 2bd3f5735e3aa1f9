"""Families that rotate neighbouring dimensions: Cohere, GLM, ERNIE 4.5, Helium. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig, common_fields, layer_types, window_fields


def read_cohere(c: HFConfig, theta: float = 500_000.0) -> dict[str, Any]:
    c.only("use_qk_norm", False, False)
    scale = c.get("logit_scale", 0.0625)
    return {
        **common_fields(c, eps=("layer_norm_eps", 1e-5), tied=True, theta=theta),
        "norm": "layernorm_no_bias",
        "parallel_residual": True,
        "shared_norm": True,
        "rope_interleaved": True,
        "attention_bias": c.get("attention_bias", False),
        "logit_scale": None if scale == 1 else scale,
    }


def write_cohere(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "logit_scale": config.logit_scale or 1.0,
        "attention_bias": config.attention_bias,
    }


def read_cohere2(c: HFConfig) -> dict[str, Any]:
    pattern, window = c.get("sliding_window_pattern", 4), c.get("sliding_window", 4096)
    windows = window_fields(c, window, lambda layer: bool((layer + 1) % pattern))
    full = windows.get("full_attention_layers", tuple(c.layers))
    return {**read_cohere(c, theta=10_000.0), **windows, "layers_without_rope": full}


def write_cohere2(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_cohere(config),
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def read_glm(c: HFConfig) -> dict[str, Any]:
    bias = c.get("attention_bias", True)
    return {
        **common_fields(c, eps=("rms_norm_eps", 1.5625e-07), head_dim=128, partial=0.5),
        "rope_interleaved": True,
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
    }


def write_glm(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.attention_bias,
        "partial_rotary_factor": config.partial_rotary_factor,
    }


def read_glm4(c: HFConfig) -> dict[str, Any]:
    return {**read_glm(c), "norm_position": "both"}


def read_ernie4_5(c: HFConfig) -> dict[str, Any]:
    bias = c.get("use_bias", False)
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), tied=True, head_dim=128, theta=500_000.0),
        "rope_interleaved": True,
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def write_ernie4_5(config: ModelConfig) -> dict[str, Any]:
    return {"use_bias": config.attention_bias}


def read_helium(c: HFConfig) -> dict[str, Any]:
    bias = c.get("attention_bias", False)
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-8), head_dim=128, theta=100_000.0),
        "rope_interleaved": True,
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
        "mlp_bias": c.get("mlp_bias", False),
    }


def write_helium(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
