"""Families that change one or two things of Llama, Mistral or OLMo 2. Torch-free."""

from typing import Any

from litlora.config import ModelConfig
from litlora.formats.families.hf_config import HFConfig, common_fields, layer_types, window_fields
from litlora.formats.families.llama import read_llama, read_mistral, read_olmo2
from litlora.formats.families.rope import rope_by_kind, rope_settings


def read_arcee(c: HFConfig) -> dict[str, Any]:
    fields = common_fields(c, eps=("rms_norm_eps", 1e-5), activation=("hidden_act", "relu2"))
    return {**read_llama(c.replace(hidden_act="silu")), **fields, "mlp": "plain"}


_APERTUS_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def read_apertus(c: HFConfig) -> dict[str, Any]:
    if "rope_parameters" not in c.values and "rope_scaling" not in c.values:
        c = c.replace(rope_scaling=_APERTUS_ROPE)
    act = ("hidden_act", "xielu")
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5), activation=act, theta=12_000_000.0),
        "mlp": "plain",
        "qk_norm": "head",
        "attention_bias": c.get("attention_bias", False),
    }


def write_apertus(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", **(rope_settings(config) or {}), "rope_theta": config.rope_theta}
    return {"attention_bias": config.attention_bias, "rope_parameters": rope}


def read_seed_oss(c: HFConfig) -> dict[str, Any]:
    bias, out = c.get("attention_bias", True), c.get("attention_out_bias", False)
    return {
        **common_fields(c, head_dim=128),
        "attention_bias": bias,
        "attention_output_bias": None if out == bias else out,
        "mlp_bias": c.get("mlp_bias", False),
    }


def write_seed_oss(config: ModelConfig) -> dict[str, Any]:
    out = config.attention_output_bias
    return {
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.attention_bias if out is None else out,
        "mlp_bias": config.mlp_bias,
    }


def read_granite(c: HFConfig) -> dict[str, Any]:
    # Scores are multiplied by attention_multiplier, and here divided by the root of a scalar.
    scalar = c.get("attention_multiplier", 1.0) ** -2
    nearest = float(round(scalar))
    scale = c.get("logits_scaling", 1.0)
    return {
        **read_llama(c),
        "query_pre_attn_scalar": nearest if abs(scalar - nearest) < 1e-9 * scalar else scalar,
        "embedding_multiplier": _unless_one(c.get("embedding_multiplier", 1.0)),
        "residual_multiplier": _unless_one(c.get("residual_multiplier", 1.0)),
        "logit_scale": _unless_one(1 / scale),
    }


def _unless_one(factor: float) -> float | None:
    return None if factor == 1 else factor


def write_granite(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_multiplier": (config.query_pre_attn_scalar or config.head_dim) ** -0.5,
        "embedding_multiplier": config.embedding_multiplier or 1.0,
        "residual_multiplier": config.residual_multiplier or 1.0,
        "logits_scaling": 1 / (config.logit_scale or 1.0),
    }


def read_hunyuan(c: HFConfig) -> dict[str, Any]:
    c.only("use_cla", False, False)
    c.only("use_qk_norm", True, True)
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if isinstance(rope, dict) and rope.get("alpha"):
        # A fixed alpha stretches the base, whatever the length (NTK-aware).
        base = rope.get("rope_theta") or c.get("rope_theta") or 10_000.0
        dim = common_fields(c.replace(rope_scaling=None, rope_parameters=None))["head_dim"]
        c = c.replace(
            rope_scaling=None, rope_parameters=None, rope_theta=base * rope["alpha"] ** (dim / (dim - 2))
        )
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5)),
        "attention_bias": c.get("attention_bias", False),
        "qk_norm": "head_rotated",
    }


def write_hunyuan(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def read_ministral(c: HFConfig) -> dict[str, Any]:
    windows = window_fields(c, c.get("sliding_window", 4096), lambda layer: True)
    return {**common_fields(c), **windows}


def write_ministral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, "layer_types": layer_types(config)}


_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_ministral3(c: HFConfig) -> dict[str, Any]:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or _MINISTRAL3_ROPE
    known = {name: value for name, value in rope.items() if name != "max_position_embeddings"}
    beta = known.pop("llama_4_scaling_beta", None)
    source = c.replace(rope_parameters=known, rope_scaling=None, sliding_window=c.get("sliding_window"))
    eps = c.get("rms_norm_eps", 1e-5)
    head_dim = c.get("head_dim") or 128
    fields = read_mistral(source.replace(rms_norm_eps=eps, head_dim=head_dim))
    return {**fields, "query_scale_beta": beta}


def write_ministral3(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", **(rope_settings(config) or {}), "rope_theta": config.rope_theta}
    beta = {} if config.query_scale_beta is None else {"llama_4_scaling_beta": config.query_scale_beta}
    return {"sliding_window": config.sliding_window, "rope_parameters": {**rope, **beta}}


def read_olmo3(c: HFConfig) -> dict[str, Any]:
    source, scaling, local = rope_by_kind(c)
    scaling = {"rope_theta": c.get("rope_theta") or 500_000.0, **scaling}
    window = c.get("sliding_window", 4096)
    fields = {
        **read_olmo2(source.replace(rope_scaling=scaling)),
        **window_fields(c, window, lambda layer: bool((layer + 1) % 4)),
    }
    base = local or fields["rope_theta"]
    differs = base != fields["rope_theta"] or fields["rope_scaling"] is not None
    return {**fields, "rope_local_base_freq": base if differs and "sliding_window" in fields else None}


def write_olmo3(config: ModelConfig) -> dict[str, Any]:
    theta = config.rope_theta
    full = {"rope_type": "default", **(rope_settings(config) or {}), "rope_theta": theta}
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq or theta}
    return {
        "attention_bias": config.attention_bias,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


def read_olmoe(c: HFConfig) -> dict[str, Any]:
    c.only("clip_qkv", None, None)
    return {
        **read_olmo2(c),
        "norm_position": "before",
        "num_experts": c.get("num_experts", 64),
        "num_experts_per_tok": c.get("num_experts_per_tok", 8),
        "moe_intermediate_size": c.need("intermediate_size"),
        "norm_topk_prob": c.get("norm_topk_prob", False),
    }


def write_olmoe(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.attention_bias,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
    }


def read_flex_olmo(c: HFConfig) -> dict[str, Any]:
    c = c.replace(num_experts=c.get("num_experts", 7), num_experts_per_tok=c.get("num_experts_per_tok", 5))
    theta = c.get("rope_theta") or 500_000.0
    return {**read_olmoe(c.replace(rope_theta=theta, clip_qkv=None)), "norm_position": "after"}


def read_exaone4(c: HFConfig) -> dict[str, Any]:
    window = c.get("sliding_window", 4096)
    pattern = c.get("sliding_window_pattern", 4) if window is not None else None
    windows = window_fields(c, window, lambda layer: _slides(pattern, layer, len(c.layers)))
    full = windows.get("full_attention_layers", tuple(c.layers))
    return {
        **common_fields(c, eps=("rms_norm_eps", 1e-5)),
        **windows,
        "norm_position": "after",
        "qk_norm": "head",
        "layers_without_rope": () if window is None else full,
    }


def _slides(pattern: int | str | None, layer: int, count: int) -> bool:
    """Whether a layer has a window: all but every n-th, or as the letters L (local) and G say."""
    if isinstance(pattern, str):
        return layer != count - 1 and pattern[layer % len(pattern)] == "L"
    return bool(pattern) and bool((layer + 1) % pattern)


def write_exaone4(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, "layer_types": layer_types(config)}
