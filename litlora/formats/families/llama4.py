"""Llama 4: attention in chunks, layers without rotary embeddings, and experts whose input the router
scales. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.hf_config import HFConfig, common_fields


def read_llama4(c: HFConfig) -> dict[str, Any]:
    layers = c.layers
    head_dim = None if "head_dim" in c.values else 128  # null is an even share of hidden_size
    every = c.get("no_rope_layer_interval", 4)
    rotated = c.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in layers]
    if len(rotated) < len(layers):
        raise CheckpointError(f"no_rope_layers has {len(rotated)} entries; there are {len(layers)} layers")
    rotated = [bool(one) for one in rotated[: len(layers)]]
    fields = common_fields(
        c.replace(intermediate_size=c.need("intermediate_size_mlp")),
        eps=("rms_norm_eps", 1e-5),
        head_dim=head_dim,
        theta=500_000.0,
    )
    is_tuned = c.get("attn_temperature_tuning", True) and not all(rotated)
    return {
        **fields,
        **_chunk_fields(c, rotated),
        **_expert_fields(c),
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "l2_rotated" if c.get("use_qk_norm", True) else "none",
        "rope_interleaved": True,
        "layers_without_rope": tuple(layer for layer in layers if not rotated[layer]),
        "query_scale_beta": c.get("attn_scale", 0.1) if is_tuned else None,
        "floor_scale": c.get("floor_scale", 8192) if is_tuned else None,
    }


def _chunk_fields(c: HFConfig, rotated: list[bool]) -> dict[str, Any]:
    """Layers with rotary embeddings have chunks, unless the file says which."""
    kinds = c.get("layer_types") or ["chunked_attention" if one else "full_attention" for one in rotated]
    if unknown := sorted(set(kinds) - {"chunked_attention", "full_attention"}):
        raise CheckpointError(f"layer_types: {', '.join(unknown)} is not implemented")
    if len(kinds) != len(rotated):
        raise CheckpointError(f"layer_types has {len(kinds)} entries; there are {len(rotated)} layers")
    if "chunked_attention" not in kinds:
        return {}
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    size = c.need("attention_chunk_size") if "attention_chunk_size" in c.values else 8192
    return {"attention_chunk_size": size, "full_attention_layers": full}


def _expert_fields(c: HFConfig) -> dict[str, Any]:
    layers, every = c.layers, c.get("interleave_moe_layer_step", 1)
    sparse = c.get("moe_layers")
    sparse = range(every - 1, len(layers), every) if sparse is None else sparse
    dense = tuple(layer for layer in layers if layer not in sparse)
    if len(dense) == len(layers):
        return {}
    width = c.need("intermediate_size")
    return {
        "num_experts": c.need("num_local_experts"),
        "num_experts_per_tok": c.get("num_experts_per_tok", 1),
        "moe_intermediate_size": width,
        "router_scoring": "sigmoid",
        "scale_expert_inputs": True,
        "shared_experts_intermediate_size": width,
        "dense_layers": dense,
    }


def write_llama4(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    sparse = [] if config.num_experts is None else [n for n in layers if n not in config.dense_layers]
    chunks = [config.chunk(layer) is not None for layer in layers]
    return {
        "intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.num_experts or 1,
        "num_experts_per_tok": config.num_experts_per_tok or 1,
        "moe_layers": sparse,
        "attention_bias": config.attention_bias,
        "use_qk_norm": config.qk_norm == "l2_rotated",
        "no_rope_layers": [int(layer not in config.layers_without_rope) for layer in layers],
        "layer_types": ["chunked_attention" if one else "full_attention" for one in chunks],
        "attention_chunk_size": config.attention_chunk_size or 8192,
        "attn_temperature_tuning": config.floor_scale is not None,
        "attn_scale": config.query_scale_beta or 0.1,
        "floor_scale": config.floor_scale or 8192,
    }
