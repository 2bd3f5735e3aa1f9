"""Which facts of an architecture contradict each other, or are of none that is known. Torch-free."""

from typing import TYPE_CHECKING

from litlora.errors import CheckpointError

if TYPE_CHECKING:
    from litlora.config import ModelConfig


def check(config: "ModelConfig") -> None:
    """Raise CheckpointError if the fields contradict each other."""
    _check_attention(config)
    _check_layers_of_gemma(config)
    _check_streams(config)
    _check_latent_attention(config)
    _check_linear_attention(config)
    _check_chunks(config)
    _check_experts(config)
    _check_blocks(config)
    _check_scaling(config)


def _check_attention(config: "ModelConfig") -> None:
    if config.partial_rotary_factor > 1:
        raise CheckpointError(
            f"partial_rotary_factor is {config.partial_rotary_factor}; it must be at most 1"
        )
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise CheckpointError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
        )
    if config.attention_sinks and config.attn_logit_softcapping is not None:
        raise CheckpointError("attention_sinks with attn_logit_softcapping is not a supported architecture")
    if config.positions == "rotary" and (
        config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim
    ):
        raise CheckpointError(
            f"{config.rotary_dim} of head_dim ({config.head_dim}) are rotated; rotary embeddings need an "
            "even number"
        )


def _check_layers_of_gemma(config: "ModelConfig") -> None:
    of_layers = (config.global_head_dim, config.num_global_key_value_heads, config.attention_k_eq_v)
    if any(of_layers) and config.sliding_window is None:
        raise CheckpointError("layers with other heads need others, with a sliding_window, beside them")
    heads = config.num_attention_heads
    if config.num_global_key_value_heads is not None and heads % config.num_global_key_value_heads:
        raise CheckpointError(
            f"num_attention_heads ({heads}) is not a multiple of num_global_key_value_heads "
            f"({config.num_global_key_value_heads})"
        )
    sizes = (config.hidden_size_per_layer_input, config.vocab_size_per_layer_input)
    if (sizes[0] is None) != (sizes[1] is None):
        raise CheckpointError(
            "hidden_size_per_layer_input and vocab_size_per_layer_input must be set together"
        )
    is_other = config.kv_lora_rank or config.linear_attention_layers
    if is_other and (any(of_layers) or config.num_kv_shared_layers):
        raise CheckpointError("layers that share keys and values need plain attention in all layers")
    # The tokens of images and sound, which Gemma 3n has at the end, read the row of the first token.
    if sizes[1] is not None and sizes[1] < config.vocab_size and config.altup_num_inputs is None:
        raise CheckpointError(
            f"vocab_size_per_layer_input ({sizes[1]}) is less than vocab_size ({config.vocab_size}): "
            "tokens without an input of each layer are not implemented"
        )
    if (sizes[0] or config.layer_scalar) and config.norm_position != "both":
        raise CheckpointError("per-layer inputs and layer_scalar need norm_position both")
    if config.num_kv_shared_layers is None:
        if config.use_double_wide_mlp:
            raise CheckpointError("use_double_wide_mlp needs num_kv_shared_layers")
        return
    own = range(config.num_hidden_layers - config.num_kv_shared_layers)
    kinds = {config.window(layer) is None for layer in own}
    if missing := [n for n in range(config.num_hidden_layers) if (config.window(n) is None) not in kinds]:
        raise CheckpointError(
            f"num_kv_shared_layers ({config.num_kv_shared_layers}): no layer before layer {missing[0]} has "
            "the keys and values that it shares"
        )


def _check_streams(config: "ModelConfig") -> None:
    names = ("altup_num_inputs", "laurel_rank", "hidden_size_per_layer_input")
    given = [getattr(config, name) is not None for name in names]
    if given[0] != given[1] or (given[0] and not given[2]):
        raise CheckpointError(f"{names[0]} needs {names[1]} and {names[2]}, and laurel_rank needs {names[0]}")
    if given[0] and (config.norm_position != "both" or config.layer_scalar or config.enable_moe_block):
        raise CheckpointError(
            "altup_num_inputs needs norm_position both, without layer_scalar and enable_moe_block"
        )
    if config.altup_num_inputs == 1:
        raise CheckpointError("altup_num_inputs must be at least 2")
    if config.activation_sparsity is None and config.sparse_mlp_layers:
        raise CheckpointError("sparse_mlp_layers needs activation_sparsity")
    if config.activation_sparsity is not None:
        if config.activation_sparsity >= 1 or config.mlp != "gated" or config.swiglu_limit is not None:
            raise CheckpointError("activation_sparsity must be below 1, and needs a plain gated mlp")
        if config.num_experts is not None:
            raise CheckpointError("activation_sparsity with num_experts is not a supported architecture")


def _check_latent_attention(config: "ModelConfig") -> None:
    sizes = [config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim]
    if None in sizes and sizes != [None] * 3:
        raise CheckpointError("kv_lora_rank, qk_nope_head_dim and v_head_dim must be set together")
    if config.kv_lora_rank is None:
        return
    others = {
        "sliding_window": config.sliding_window,
        "attention_sinks": config.attention_sinks,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "query_scale_beta": config.query_scale_beta,
        "clip_qkv": config.clip_qkv,
        "attention_gate": config.attention_gate,
        "layers_without_rope": config.layers_without_rope or None,
    }
    if found := [name for name, value in others.items() if value is not None]:
        raise CheckpointError(f"{found[0]} with kv_lora_rank is not a supported architecture")
    if config.qk_norm != "none" or config.rotary_dim != config.head_dim or config.positions != "rotary":
        raise CheckpointError("kv_lora_rank needs heads without norms, whose head_dim is rotated whole")
    if config.mscale_all_dim is not None and getattr(config.rope_scaling, "factor", None) is None:
        raise CheckpointError("mscale_all_dim needs a rope_scaling with a factor")


def _check_linear_attention(config: "ModelConfig") -> None:
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sizes = [getattr(config, f"linear_{name}") for name in names]
    if not config.linear_attention_layers:
        return
    if None in sizes:
        raise CheckpointError(f"linear_{names[sizes.index(None)]} missing: linear attention needs it")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise CheckpointError(
            f"linear_num_value_heads ({config.linear_num_value_heads}) is not a multiple of "
            f"linear_num_key_heads ({config.linear_num_key_heads})"
        )
    if config.linear_conv_kernel_dim < 2:
        raise CheckpointError("linear_conv_kernel_dim must be at least 2")


def _check_chunks(config: "ModelConfig") -> None:
    others = ("sliding_window", "kv_lora_rank", "num_kv_shared_layers", "linear_attention_layers")
    found = [name for name in others if getattr(config, name)]
    if config.attention_chunk_size is not None and found:
        raise CheckpointError(f"{found[0]} with attention_chunk_size is not a supported architecture")
    if config.floor_scale is not None and config.query_scale_beta is None:
        raise CheckpointError("floor_scale needs query_scale_beta")


def _check_experts(config: "ModelConfig") -> None:
    if config.enable_moe_block:
        _check_experts_beside(config)
    sizes = [config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size]
    if None in sizes and sizes != [None] * 3:
        raise CheckpointError(
            "num_experts, num_experts_per_tok and moe_intermediate_size must be set together"
        )
    if config.num_experts is not None and config.num_experts_per_tok > config.num_experts:
        raise CheckpointError(
            f"num_experts_per_tok ({config.num_experts_per_tok}) is more than num_experts "
            f"({config.num_experts})"
        )
    groups, picked = config.n_group, config.topk_group
    if (groups is None) != (picked is None):
        raise CheckpointError("n_group and topk_group must be set together")
    if groups is not None and config.num_experts is not None:
        size = config.num_experts // groups
        if config.num_experts % groups or size < 2 or picked > groups:
            raise CheckpointError(
                f"n_group ({groups}) and topk_group ({picked}) do not fit {config.num_experts} experts: "
                "a group needs two experts or more, and all groups as many"
            )
        if config.num_experts_per_tok > picked * size:
            raise CheckpointError(
                f"num_experts_per_tok ({config.num_experts_per_tok}) is more than the experts of "
                f"topk_group ({picked}) groups"
            )


def _check_experts_beside(config: "ModelConfig") -> None:
    if config.num_experts is None or config.norm_position != "both" or not config.norm_topk_prob:
        raise CheckpointError("enable_moe_block needs num_experts, norm_topk_prob and norm_position both")
    others = ("router_bias", "router_scoring", "router_correction", "n_group", "routed_scaling_factor")
    others += ("shared_expert_intermediate_size", "shared_experts_intermediate_size", "dense_layers")
    if found := [name for name in others if getattr(config, name)]:
        raise CheckpointError(f"{found[0]} with enable_moe_block is not a supported architecture")


def _check_blocks(config: "ModelConfig") -> None:
    if config.parallel_residual and config.norm_position != "before":
        raise CheckpointError(
            f"parallel_residual with norm_position {config.norm_position} is not a supported architecture"
        )
    if config.shared_norm and not config.parallel_residual:
        raise CheckpointError("shared_norm needs parallel_residual")
    if (config.swiglu_limit is None) != (config.swiglu_alpha is None):
        raise CheckpointError("swiglu_limit and swiglu_alpha must be set together")
    if config.swiglu_limit is not None and (config.mlp != "gated" or config.hidden_act != "silu"):
        raise CheckpointError("swiglu_limit needs a gated mlp with the activation silu")
    if config.hidden_act == "xielu" and (config.mlp != "plain" or config.num_experts is not None):
        raise CheckpointError("hidden_act xielu needs a plain mlp, without experts")
    if config.residual_multiplier is not None and config.norm_position != "before":
        raise CheckpointError(
            f"residual_multiplier with norm_position {config.norm_position} is not a supported architecture"
        )
    if config.logit_scale is not None and config.lm_head_bias:
        raise CheckpointError("logit_scale with lm_head_bias is not a supported architecture")
    original = config.rope_scaling and config.rope_scaling.original_max_position_embeddings
    if config.query_scale_beta is not None and config.floor_scale is None and not original:
        raise CheckpointError("query_scale_beta needs a rope_scaling with original_max_position_embeddings")


def _check_scaling(config: "ModelConfig") -> None:
    if config.rope_scaling is None:
        return
    config.rope_scaling.check_factors(config.rotary_dim // 2)
    is_proportional = config.rope_scaling.rope_type == "proportional"
    if is_proportional and config.sliding_window is not None and config.rope_local_base_freq is None:
        raise CheckpointError("a proportional rope_scaling needs rope_local_base_freq beside windows")
