"""DeepSeek-V3 and what has its architecture: multi-head latent attention and its experts. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig, common_fields
from litlora.formats.families.rope import rope_settings
from litlora.formats.families.routed import routed_fields, routed_settings

_SIZES = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128}
"""With the family's defaults."""


def read_deepseek_v3(c: HFConfig) -> dict[str, Any]:
    heads = c.need("num_attention_heads")
    c = c.replace(head_dim=c.get("qk_rope_head_dim", 64), num_key_value_heads=heads)
    fields = common_fields(c)
    experts = {"n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    return {
        **fields,
        **routed_fields(c, **experts, routed_scaling_factor=2.5),
        **{name: c.get(name, default) for name, default in _SIZES.items()},
        "q_lora_rank": c.get("q_lora_rank", 1536),
        "rope_interleaved": True if c.get("rope_interleave", True) else None,
        "mscale_all_dim": (rope.get("mscale_all_dim") or None) if fields["rope_scaling"] else None,
        "attention_bias": c.get("attention_bias", False),
    }


def write_deepseek_v3(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", **(rope_settings(config) or {}), "rope_theta": config.rope_theta}
    scale = {} if config.mscale_all_dim is None else {"mscale_all_dim": config.mscale_all_dim}
    return {
        **routed_settings(config),
        **{name: getattr(config, name) for name in _SIZES},
        "q_lora_rank": config.q_lora_rank,
        "qk_rope_head_dim": config.head_dim,
        "rope_interleave": bool(config.rope_interleaved),
        "rope_parameters": {**rope, **scale},
        "attention_bias": config.attention_bias,
        "num_nextn_predict_layers": 0,
    }
