"""Qwen 2 and 3, dense and with experts. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import (
    HFConfig,
    common_fields,
    optional_window_settings,
    window_fields,
)


def read_qwen2(c: HFConfig) -> dict[str, Any]:
    first = c.get("max_window_layers", 28)
    return {
        **common_fields(c),
        **window_fields(c, _window(c), lambda layer: layer >= first),
        "attention_bias": True,
        "attention_output_bias": False,
    }


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return optional_window_settings(config)


def read_qwen2_moe(c: HFConfig) -> dict[str, Any]:
    last, bias = c.get("max_window_layers", 28), c.get("qkv_bias", True)
    return {
        **common_fields(c),
        **window_fields(c, _window(c), lambda layer: layer % 2 == 0 and layer < last),
        **expert_fields(c),
        "shared_expert_intermediate_size": c.need("shared_expert_intermediate_size"),
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
    }


def write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **optional_window_settings(config),
        **expert_settings(config),
        "qkv_bias": config.attention_bias,
    }


def read_qwen3(c: HFConfig) -> dict[str, Any]:
    first = c.get("max_window_layers", 28)
    return {
        **common_fields(c, head_dim=128),
        **window_fields(c, _window(c), lambda layer: layer >= first),
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "head",
    }


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return {**optional_window_settings(config), "attention_bias": config.attention_bias}


def read_qwen3_moe(c: HFConfig) -> dict[str, Any]:
    return {
        **common_fields(c),
        **window_fields(c.replace(layer_types=None), _window(c), lambda layer: True),
        **expert_fields(c),
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "head",
    }


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **optional_window_settings(config),
        **expert_settings(config),
        "attention_bias": config.attention_bias,
    }


def _window(c: HFConfig) -> int | None:
    return c.get("sliding_window", 4096) if c.get("use_sliding_window") else None


def expert_fields(c: HFConfig) -> dict[str, Any]:
    """The fields of the experts: every decoder_sparse_step-th layer has them, except those listed
    in mlp_only_layers."""
    step, plain = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    return {
        "num_experts": c.need("num_experts", "num_local_experts"),
        "num_experts_per_tok": c.need("num_experts_per_tok"),
        "moe_intermediate_size": c.need("moe_intermediate_size"),
        "norm_topk_prob": c.get("norm_topk_prob", False),
        "dense_layers": tuple(layer for layer in c.layers if layer in plain or (layer + 1) % step),
    }


def expert_settings(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }
