"""Gemma 3n (text): residual streams that are predicted and corrected, per-layer embeddings, sparse
activations, and last layers that share keys and values. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.gemma4 import BLOCKS
from litlora.formats.families.hf_config import (
    HFConfig,
    activation_name,
    common_fields,
    layer_types,
    window_fields,
)
from litlora.formats.families.rope import rope_by_kind

_SPARSE = 0.95
"""The default sparsity of the first layers,"""
_NUM_SPARSE = 10
"""and how many these are, in a model that has more."""


def read_gemma3n(c: HFConfig) -> dict[str, Any]:
    c.only("altup_active_idx", 0, 0)
    c.only("altup_correct_scale", True, True)
    kinds = c.get("layer_types") or [
        "sliding_attention" if (layer + 1) % 5 else "full_attention" for layer in c.layers
    ]
    c = c.replace(
        layer_types=kinds,
        intermediate_size=_one_size(c),
        max_position_embeddings=c.get("max_position_embeddings", 32_768),
    )
    source, scaling, local = rope_by_kind(c)
    fields = {
        **common_fields(
            source,
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            tied=True,
            head_dim=256,
            theta=1e6,
            scaling=scaling,
        ),
        **window_fields(c, c.get("sliding_window", 512), lambda layer: True),
    }
    width = c.get("hidden_size_per_layer_input", 256)
    return {
        **fields,
        **_sparsity(c),
        "rope_local_base_freq": _local(c, fields, local),
        "attention_bias": c.get("attention_bias", False),
        **BLOCKS,
        "final_logit_softcapping": c.get("final_logit_softcapping", 30.0),
        "num_kv_shared_layers": c.get("num_kv_shared_layers", 15) or None,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": c.get("vocab_size_per_layer_input", 262_144),
        "altup_num_inputs": c.get("altup_num_inputs", 4),
        "altup_coef_clip": c.get("altup_coef_clip", 120.0),
        "laurel_rank": c.get("laurel_rank", 64),
    }


def _one_size(c: HFConfig) -> Any:
    size = c.get("intermediate_size", 16_384)
    if not isinstance(size, list):
        return size
    if len(size) != len(c.layers) or len(set(size)) != 1:
        raise CheckpointError("intermediate_size: only one size for all layers is implemented")
    return size[0]


def _sparsity(c: HFConfig) -> dict[str, Any]:
    """Which layers have sparse activations, and how much of them is cut off."""
    pattern, count = c.get("activation_sparsity_pattern"), len(c.layers)
    if pattern is None:
        pattern = [_SPARSE if layer < _NUM_SPARSE < count else 0.0 for layer in c.layers]
    if len(pattern) != count:
        raise CheckpointError(
            f"activation_sparsity_pattern has {len(pattern)} entries; there are {count} layers"
        )
    shares = {share for share in pattern if share}
    if len(shares) > 1:
        raise CheckpointError("activation_sparsity_pattern: only one sparsity beside 0 is implemented")
    if not shares:
        return {}
    layers = tuple(layer for layer in c.layers if pattern[layer])
    return {"activation_sparsity": shares.pop(), "sparse_mlp_layers": layers}


def _local(c: HFConfig, fields: dict[str, Any], local: float | None) -> float | None:
    """The base of the rotation in layers with a window, if it is another."""
    base = local or c.get("rope_local_base_freq") or 10_000.0
    differs = base != fields["rope_theta"] or fields["rope_scaling"] is not None
    return base if differs and "sliding_window" in fields else None


def write_gemma3n(config: ModelConfig) -> dict[str, Any]:
    sparse = config.sparse_mlp_layers or ()
    return {
        "hidden_activation": activation_name(config),
        "attention_bias": config.attention_bias,
        "sliding_window": config.sliding_window or 512,
        "layer_types": layer_types(config),
        "rope_local_base_freq": config.rope_local_base_freq or config.rope_theta,
        "num_kv_shared_layers": config.num_kv_shared_layers or 0,
        "hidden_size_per_layer_input": config.hidden_size_per_layer_input,
        "vocab_size_per_layer_input": config.vocab_size_per_layer_input,
        "final_logit_softcapping": config.final_logit_softcapping,
        "altup_num_inputs": config.altup_num_inputs,
        "altup_coef_clip": config.altup_coef_clip,
        "laurel_rank": config.laurel_rank,
        "activation_sparsity_pattern": [
            config.activation_sparsity if layer in sparse else 0.0
            for layer in range(config.num_hidden_layers)
        ],
    }
