"""Families whose routers pick experts by scores with a correction: GLM 4.5, dots.llm1, ERNIE 4.5.
Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig, common_fields, layer_types, window_fields


def routed_fields(c: HFConfig, **defaults: Any) -> dict[str, Any]:
    """The fields of the experts, in the words of DeepSeek-V3. `defaults` are the family's."""
    c = HFConfig({**defaults, **c.values})
    c.only("scoring_func", "sigmoid", "sigmoid")
    c.only("topk_method", "noaux_tc", "noaux_tc")
    c.only("moe_layer_freq", 1, 1)
    width, shared = c.need("moe_intermediate_size"), c.get("n_shared_experts")
    groups = c.get("n_group") or 1
    factor = c.get("routed_scaling_factor", 1.0)
    return {
        "num_experts": c.need("n_routed_experts", "num_local_experts"),
        "num_experts_per_tok": c.need("num_experts_per_tok"),
        "moe_intermediate_size": width,
        "norm_topk_prob": c.get("norm_topk_prob", True),
        "router_scoring": "sigmoid",
        "router_correction": True,
        "n_group": None if groups == 1 else groups,
        "topk_group": None if groups == 1 else c.need("topk_group"),
        "routed_scaling_factor": None if factor == 1 else factor,
        "shared_experts_intermediate_size": width * shared if shared else None,
        "dense_layers": tuple(layer for layer in c.layers if layer < c.get("first_k_dense_replace", 0)),
    }


def routed_settings(config: ModelConfig) -> dict[str, Any]:
    width = config.moe_intermediate_size or 1
    return {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "n_group": config.n_group or 1,
        "topk_group": config.topk_group or 1,
        "routed_scaling_factor": config.routed_scaling_factor or 1.0,
        "n_shared_experts": (config.shared_experts_intermediate_size or 0) // width or None,
        "first_k_dense_replace": len(config.dense_layers),
    }


def read_glm4_moe(c: HFConfig) -> dict[str, Any]:
    bias = c.get("attention_bias", False)
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), partial=0.5),
        **routed_fields(c, n_shared_experts=1, first_k_dense_replace=1),
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
        "qk_norm": "head" if c.get("use_qk_norm", False) else "none",
    }


def write_glm4_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **routed_settings(config),
        "attention_bias": config.attention_bias,
        "partial_rotary_factor": config.partial_rotary_factor,
        "use_qk_norm": config.qk_norm == "head",
    }


def read_dots1(c: HFConfig) -> dict[str, Any]:
    first = c.get("max_window_layers", 62)
    return {
        **common_fields(c),
        **window_fields(c, c.get("sliding_window", 4096), lambda layer: layer >= first),
        **routed_fields(c, norm_topk_prob=False),
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "head",
    }


def write_dots1(config: ModelConfig) -> dict[str, Any]:
    return {
        **routed_settings(config),
        "attention_bias": config.attention_bias,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def read_ernie4_5_moe(c: HFConfig) -> dict[str, Any]:
    c.only("moe_norm_min", 1e-12, 1e-12)
    bias = bool(c.get("use_bias", False))
    layers = c.layers
    width, shared = c.need("moe_intermediate_size"), c.get("moe_num_shared_experts", 2)
    last, every = c.get("moe_layer_end_index", -1), c.get("moe_layer_interval", 1)
    first, last = c.get("moe_layer_start_index", 1), len(layers) - 1 if last == -1 else last
    sparse = [layer for layer in layers if (layer + 1) % every == 0 and first <= layer <= last]
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), tied=True, theta=500_000.0),
        "rope_interleaved": True,
        "attention_bias": bias,
        "mlp_bias": bias,
        "expert_bias": False if bias else None,
        "lm_head_bias": bias,
        "num_experts": c.need("moe_num_experts"),
        "num_experts_per_tok": c.need("moe_k"),
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "router_correction": True,
        "shared_experts_intermediate_size": width * shared if shared else None,
        "dense_layers": tuple(layer for layer in layers if layer not in sparse),
    }


def write_ernie4_5_moe(config: ModelConfig) -> dict[str, Any]:
    width = config.moe_intermediate_size or 1
    sparse = [layer for layer in range(config.num_hidden_layers) if layer not in config.dense_layers]
    return {
        "use_bias": config.mlp_bias,
        "moe_num_experts": config.num_experts,
        "moe_k": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_num_shared_experts": (config.shared_experts_intermediate_size or 0) // width,
        "moe_layer_start_index": min(sparse, default=0),
        "moe_layer_end_index": max(sparse, default=0),
        "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
    }
