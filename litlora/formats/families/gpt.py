"""Families with layer norm, most of them with a plain MLP: GPT-2, GPT-NeoX, Phi, Falcon, StableLM,
StarCoder 2, Nemotron. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.hf_config import HFConfig, activation_name, common_fields, window_fields


def read_gpt2(c: HFConfig) -> dict[str, Any]:
    c.only("add_cross_attention", False, False)
    c.only("scale_attn_by_inverse_layer_idx", False, False)
    activation = ("activation_function", "gelu_new")
    fields = common_fields(c, eps=("layer_norm_epsilon", 1e-5), activation=activation, tied=True)
    return {
        **fields,
        "intermediate_size": c.get("n_inner") or 4 * fields["hidden_size"],
        "positions": "learned",
        "norm": "layernorm",
        "mlp": "plain",
        "attention_bias": True,
        "mlp_bias": True,
        "query_pre_attn_scalar": None if c.get("scale_attn_weights", True) else 1.0,
    }


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "activation_function": activation_name(config, tanh="gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.query_pre_attn_scalar is None,
    }


def read_gpt_neox(c: HFConfig) -> dict[str, Any]:
    rope = {
        "partial_rotary_factor": c.get("rotary_pct", 0.25),
        "rope_theta": c.get("rotary_emb_base", 10_000.0),
    }
    eps, activation = ("layer_norm_eps", 1e-5), ("hidden_act", "gelu")
    return {
        **common_fields(c.replace(**rope), eps=eps, activation=activation),
        "norm": "layernorm",
        "parallel_residual": c.get("use_parallel_residual", True),
        "mlp": "plain",
        "attention_bias": c.get("attention_bias", True),
        "mlp_bias": True,
    }


def write_gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.partial_rotary_factor,
        "rotary_emb_base": config.rope_theta,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
    }


def read_phi(c: HFConfig) -> dict[str, Any]:
    eps, activation = ("layer_norm_eps", 1e-5), ("hidden_act", "gelu_new")
    return {
        **common_fields(c, eps=eps, activation=activation, partial=0.5),
        "norm": "layernorm",
        "parallel_residual": True,
        "shared_norm": True,
        "mlp": "plain",
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "qk_norm": "head" if c.get("qk_layernorm") else "none",
    }


def write_phi(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config, tanh="gelu_new"),
        "partial_rotary_factor": config.partial_rotary_factor,
        "qk_layernorm": config.qk_norm == "head",
    }


def read_falcon(c: HFConfig) -> dict[str, Any]:
    c.only("alibi", False, False)
    new, parallel = bool(c.get("new_decoder_architecture", False)), bool(c.get("parallel_attn", True))
    # Released files do not state their context length.
    c = c.replace(max_position_embeddings=c.get("max_position_embeddings", 2048))
    eps, activation = ("layer_norm_epsilon", 1e-5), ("activation", "gelu")
    fields = common_fields(c, eps=eps, activation=activation, tied=True)
    norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if (new and not parallel) or (norms == 2 and not new):
        raise CheckpointError(
            f"new_decoder_architecture {new}, parallel_attn {parallel} and {norms} norms are not implemented "
            "together"
        )
    bias = bool(c.get("bias", False))
    return {
        **fields,
        "intermediate_size": c.get("ffn_hidden_size") or 4 * fields["hidden_size"],
        "num_key_value_heads": _falcon_key_value_heads(c, new, fields["num_attention_heads"]),
        "norm": "layernorm",
        "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
        "mlp": "plain",
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def _falcon_key_value_heads(c: HFConfig, new: bool, heads: int) -> int:
    if new:
        return c.get("num_kv_heads") or heads
    return 1 if c.get("multi_query", True) else heads


def write_falcon(config: ModelConfig) -> dict[str, Any]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    new = groups not in (1, heads) or (config.parallel_residual and not config.shared_norm)
    return {
        "ffn_hidden_size": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation": activation_name(config),
        "num_kv_heads": groups,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if new else None,
        "multi_query": groups == 1 and not new,
        "parallel_attn": config.parallel_residual,
        "bias": config.attention_bias,
        "alibi": False,
    }


def read_stablelm(c: HFConfig) -> dict[str, Any]:
    bias, parallel = c.get("use_qkv_bias", False), c.get("use_parallel_residual", False)
    return {
        **common_fields(c, eps=("layer_norm_eps", 1e-5), partial=0.25),
        "norm": "layernorm",
        "parallel_residual": parallel,
        "shared_norm": parallel,
        "attention_bias": bias,
        "attention_output_bias": False if bias else None,
        "qk_norm": "each_head" if c.get("qk_layernorm") else "none",
    }


def write_stablelm(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm_eps,
        "partial_rotary_factor": config.partial_rotary_factor,
        "use_parallel_residual": config.parallel_residual,
        "use_qkv_bias": config.attention_bias,
        "qk_layernorm": config.qk_norm == "each_head",
    }


def read_starcoder2(c: HFConfig) -> dict[str, Any]:
    bias, act = c.get("use_bias", True), ("hidden_act", "gelu_pytorch_tanh")
    return {
        **common_fields(c, eps=("norm_epsilon", 1e-5), activation=act, tied=True),
        **window_fields(c.replace(layer_types=None), c.get("sliding_window"), lambda layer: True),
        "norm": "layernorm",
        "mlp": "plain",
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def write_starcoder2(config: ModelConfig) -> dict[str, Any]:
    return {
        "norm_epsilon": config.norm_eps,
        "sliding_window": config.sliding_window,
        "use_bias": config.attention_bias,
    }


def read_nemotron(c: HFConfig) -> dict[str, Any]:
    return {
        **common_fields(c, eps=("norm_eps", 1e-5), activation=("hidden_act", "relu2"), partial=0.5),
        "norm": "layernorm_plus_one",
        "mlp": "plain",
        "attention_bias": c.get("attention_bias", False),
        "mlp_bias": c.get("mlp_bias", False),
    }


def write_nemotron(config: ModelConfig) -> dict[str, Any]:
    return {
        "norm_eps": config.norm_eps,
        "partial_rotary_factor": config.partial_rotary_factor,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
