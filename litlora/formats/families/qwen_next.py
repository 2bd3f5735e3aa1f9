"""Qwen3-Next and Qwen 3.5, dense and with experts: linear attention by the gated delta rule in most
layers. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.hf_config import HFConfig, common_fields
from litlora.formats.families.qwen import expert_fields, expert_settings

_SIZES = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""With the family's defaults."""


def read_qwen3_next(c: HFConfig) -> dict[str, Any]:
    return {
        **_hybrid_fields(c),
        **expert_fields(c.replace(norm_topk_prob=c.get("norm_topk_prob", True))),
        "shared_expert_intermediate_size": c.need("shared_expert_intermediate_size"),
    }


def read_qwen3_5(c: HFConfig) -> dict[str, Any]:
    fields = _hybrid_fields(c)
    return {**fields, "linear_split": True if "linear_attention_layers" in fields else None}


def read_qwen3_5_moe(c: HFConfig) -> dict[str, Any]:
    """Every layer has experts; released files do not say how wide an MLP without them would be."""
    width = c.need("moe_intermediate_size")
    c = c.replace(intermediate_size=c.get("intermediate_size") or width, norm_topk_prob=True)
    return {
        **read_qwen3_5(c),
        **expert_fields(c.replace(decoder_sparse_step=1, mlp_only_layers=None)),
        "shared_expert_intermediate_size": c.need("shared_expert_intermediate_size"),
    }


def _hybrid_fields(c: HFConfig) -> dict[str, Any]:
    """What both have."""
    return {
        **common_fields(c, head_dim=256, partial=0.25),
        **_linear_fields(c),
        "norm": "rmsnorm_plus_one",
        "qk_norm": "head",
        "attention_bias": c.get("attention_bias", False),
        "attention_gate": True,
    }


def write_qwen3_5(config: ModelConfig) -> dict[str, Any]:
    experts = expert_settings(config)
    return {name: value for name, value in write_qwen3_next(config).items() if name not in experts}


def write_qwen3_next(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    return {
        **expert_settings(config),
        **{name: getattr(config, name) for name in _SIZES},
        "layer_types": ["linear_attention" if config.is_linear(n) else "full_attention" for n in layers],
        "attention_bias": config.attention_bias,
        "partial_rotary_factor": config.partial_rotary_factor,
    }


def _linear_fields(c: HFConfig) -> dict[str, Any]:
    """The fields of linear attention: three layers of four have it, unless the file says which."""
    every, layers = c.get("full_attention_interval", 4), c.layers
    kinds = c.get("layer_types") or [
        "linear_attention" if (layer + 1) % every else "full_attention" for layer in layers
    ]
    if unknown := sorted(set(kinds) - {"linear_attention", "full_attention"}):
        raise CheckpointError(f"layer_types: {', '.join(unknown)} is not implemented")
    if len(kinds) != len(layers):
        raise CheckpointError(f"layer_types has {len(kinds)} entries; there are {len(layers)} layers")
    linear = tuple(layer for layer in layers if kinds[layer] == "linear_attention")
    if not linear:
        return {}
    return {
        "linear_attention_layers": linear,
        **{name: c.get(name, default) for name, default in _SIZES.items()},
    }
