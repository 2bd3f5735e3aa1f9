"""gpt-oss: attention with sinks, and experts with biases and a clamped SwiGLU. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig, common_fields, layer_types, window_fields
from litlora.formats.families.rope import rope_settings

_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The scaling of a file that names none."""


def read_gpt_oss(c: HFConfig) -> dict[str, Any]:
    if c.get("rope_parameters") is None and c.get("rope_scaling") is None:
        c = c.replace(rope_scaling=_ROPE)
    c = c.replace(max_position_embeddings=c.get("max_position_embeddings", 131_072))
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), head_dim=64, theta=150_000.0),
        **window_fields(c, c.get("sliding_window", 128), lambda layer: layer % 2 == 0),
        "attention_bias": c.get("attention_bias", True),
        "attention_sinks": True,
        "num_experts": c.need("num_local_experts", "num_experts"),
        "num_experts_per_tok": c.need("num_experts_per_tok", "experts_per_token"),
        "moe_intermediate_size": c.need("intermediate_size"),
        "norm_topk_prob": True,
        "router_bias": True,
        "mlp_bias": True,
        "swiglu_limit": c.get("swiglu_limit", 7.0),
        "swiglu_alpha": c.get("swiglu_alpha", 1.702),
    }


def write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", **(rope_settings(config) or {}), "rope_theta": config.rope_theta}
    return {
        "attention_bias": config.attention_bias,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "rope_parameters": rope,
        "swiglu_limit": config.swiglu_limit,
        "swiglu_alpha": config.swiglu_alpha,
    }
