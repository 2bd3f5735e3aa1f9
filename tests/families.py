"""Tiny random models of `transformers`: one for each family, and for each variant of a family."""

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FALCON = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SIGMOID = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 12}
GEMMA4 = {
    "num_hidden_layers": 7,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"],
    "final_logit_softcapping": 3.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA4 = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "attention_chunk_size": 7,
    "floor_scale": 6,
    "attn_scale": 0.7,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-3": (
        "LlamaConfig",
        {**GROUPED, "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
    "llama-linear": (
        "LlamaConfig",
        {
            **GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "llama-dynamic": (
        "LlamaConfig",
        {**GROUPED, "max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama-yarn": ("LlamaConfig", {**GROUPED, "rope_scaling": YARN}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 7}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "qwen2": (
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2-yarn": (
        "Qwen2Config",
        {**GROUPED, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**GROUPED, **EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GROUPED,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma3-one-base": (
        "Gemma3TextConfig",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 6,
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi": ("PhiConfig", {**GROUPED, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("Phi3Config", {**GROUPED, "sliding_window": 9}),
    "phi4-mini": (
        "Phi3Config",
        {
            **GROUPED,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONGROPE,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {**SIZES, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    ),
    "gpt2": ("GPT2Config", GPT2),
    "falcon-7b": ("FalconConfig", FALCON),
    "falcon-40b": (
        "FalconConfig",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
    ),
    "falcon-11b": (
        "FalconConfig",
        {
            **FALCON,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-sequential": (
        "FalconConfig",
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "stablelm": ("StableLmConfig", {**GROUPED, "use_qkv_bias": True}),
    "stablelm-2-12b": ("StableLmConfig", {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True}),
    "olmo": ("OlmoConfig", {**GROUPED, "clip_qkv": 0.3}),
    "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": (
        "SmolLM3Config",
        {**GROUPED, "num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 6},
    ),
    "olmo3": ("Olmo3Config", {**GROUPED, "num_hidden_layers": 5, "sliding_window": 6}),
    "olmo3-yarn": (
        "Olmo3Config",
        {**GROUPED, "num_hidden_layers": 4, "sliding_window": 6, "rope_scaling": YARN},
    ),
    "olmoe": ("OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "exaone4": ("Exaone4Config", {**GROUPED, "num_hidden_layers": 5, "sliding_window": 6}),
    "exaone4-full": (
        "Exaone4Config",
        {**GROUPED, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "seed-oss": ("SeedOssConfig", {**GROUPED, "head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {**GROUPED, "sliding_window": 7}),
    "granite": (
        "GraniteConfig",
        {
            **GROUPED,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.4,
        },
    ),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.75}),
    "cohere2": (
        "Cohere2Config",
        {**GROUPED, "num_hidden_layers": 5, "sliding_window": 6, "logit_scale": 2.0},
    ),
    "glm": ("GlmConfig", {**GROUPED, "head_dim": 16}),
    "glm4": ("Glm4Config", {**GROUPED, "head_dim": 16, "attention_bias": False}),
    "ernie4-5": ("Ernie4_5Config", {**GROUPED, "head_dim": 16, "use_bias": True}),
    "nemotron": ("NemotronConfig", {**GROUPED, "head_dim": 16}),
    "hunyuan": (
        "HunYuanDenseV1Config",
        {**GROUPED, "head_dim": 16}
        | {"rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    ),
    "apertus": ("ApertusConfig", {**GROUPED, "rope_scaling": LLAMA3}),
    "arcee": ("ArceeConfig", {**GROUPED, "head_dim": 16}),
    "helium": ("HeliumConfig", {**GROUPED, "head_dim": 8}),
    "ministral": (
        "MinistralConfig",
        {**GROUPED, "head_dim": 16, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "ministral3": (
        "Ministral3Config",
        {
            **GROUPED,
            "head_dim": 16,
            "rope_parameters": {**YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.7},
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**GROUPED, **EXPERTS, "num_hidden_layers": 4, "head_dim": 16, "shared_expert_intermediate_size": 40}
        | {"mlp_only_layers": [1], "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 12},
    ),
    "qwen3-5": (
        "Qwen3_5TextConfig",
        {**GROUPED, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    ),
    "qwen3-5-moe": (
        "Qwen3_5MoeTextConfig",
        {**{n: v for n, v in GROUPED.items() if n != "intermediate_size"}, **EXPERTS, "num_hidden_layers": 4}
        | {"head_dim": 16, "shared_expert_intermediate_size": 40, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        {**GROUPED, "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 6, "num_kv_shared_layers": 3}
        | {"layer_types": GEMMA4["layer_types"], "hidden_size_per_layer_input": 12, "laurel_rank": 8}
        | {"vocab_size_per_layer_input": 90, "activation_sparsity_pattern": [0.6, 0.6, *[0.0] * 4, 0.6]}
        | {"final_logit_softcapping": 3.0, "altup_num_inputs": 3},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {**GROUPED, **GEMMA4, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}
        | {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 420},
    ),
    "gemma4-31b": (
        "Gemma4TextConfig",
        {**GROUPED, **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"hidden_size_per_layer_input": 0},
    ),
    "gemma4-26b": (
        "Gemma4TextConfig",
        {**GROUPED, **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 6}
        | {"top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**GROUPED, **LLAMA4, "num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True}
        | {"rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 1.0}},
    ),
    "llama4-maverick": (
        "Llama4TextConfig",
        {**GROUPED, **LLAMA4, "num_local_experts": 4, "interleave_moe_layer_step": 2, "use_qk_norm": False}
        | {"no_rope_layers": [0, 1, 1, 0, 1], "attn_temperature_tuning": False},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
        | {"num_hidden_layers": 4, "swiglu_limit": 0.2}
        | {"rope_parameters": {**YARN, "rope_theta": 1.5e5, "truncate": False}},
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**GROUPED, **SIGMOID, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}
        | {"n_group": 2, "topk_group": 1, "num_mtp_layers": 0},
    ),
    "dots1": (
        "Dots1Config",
        {**GROUPED, **SIGMOID, "head_dim": 16, "sliding_window": 6, "max_window_layers": 1}
        | {"first_k_dense_replace": 0, "norm_topk_prob": False, "n_shared_experts": 2},
    ),
    "flex-olmo": ("FlexOlmoConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "ernie4-5-moe": (
        "Ernie4_5_MoeConfig",
        {**GROUPED, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24}
        | {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_interval": 2},
    ),
    "ernie4-5-moe-bias": (
        "Ernie4_5_MoeConfig",
        {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "use_bias": True},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **SIZES,
            **SIGMOID,
            **LATENT,
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "n_group": 2,
            "topk_group": 1,
            "num_mtp_layers": 0,
        }
        | {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.8}},
    ),
    "moonlight": (
        "DeepseekV3Config",
        {
            **SIZES,
            **SIGMOID,
            **LATENT,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
        }
        | {"rope_interleave": False, "v_head_dim": 24, "attention_bias": True, "num_mtp_layers": 0},
    ),
}


def make_model(name: str, **changes: Any) -> torch.nn.Module:
    """A random model of a family. Norms and biases are random too, so that a test notices if one is
    missing."""
    import transformers

    kind, settings = FAMILIES[name]
    config = getattr(transformers, kind)(**{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
            plus_one = name.startswith(("gemma", "nemotron", "qwen3-next", "qwen3-5"))
            is_norm &= (
                not plus_one or "linear_attn" in parameter_name or name.startswith(("gemma3n", "gemma4"))
            )
            is_norm |= parameter_name.endswith(("router.scale", "expert_scale", "output_scale"))
            parameter.copy_(0.15 * torch.randn_like(parameter) + is_norm)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
            elif buffer_name.endswith("layer_scalar"):
                buffer.uniform_(0.7, 1.3)
    return model


def save_folder(
    name: str, directory: Path, *, max_shard_size: str = "5GB", **changes: Any
) -> torch.nn.Module:
    """Write such a model as a Hugging Face folder without a tokenizer."""
    model = make_model(name, **changes)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
VISUAL = {"depth": 1, "num_heads": 2, "patch_size": 14}
GRID = {"rope_type": "default", "mrope_section": [1, 1, 2]}
QWEN3_GRID = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config",
        {**GROUPED, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 6},
        VISION,
    ),
    "gemma3n": ("Gemma3nConfig", FAMILIES["gemma3n"][1], VISION),
    "gemma4": (
        "Gemma4Config",
        FAMILIES["gemma4"][1],
        {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 8,
            "position_embedding_size": 16,
        },
    ),
    "gemma4-26b": (
        "Gemma4Config",
        FAMILIES["gemma4-26b"][1],
        {**VISION, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
        | {"position_embedding_size": 16},
    ),
    "llama4": (
        "Llama4Config",
        {**FAMILIES["llama4"][1], "num_experts_per_tok": 1},
        {**VISION, "pixel_shuffle_ratio": 0.5, "projector_input_dim": 16, "projector_output_dim": 16}
        | {"vision_output_dim": 16, "intermediate_size": 64},
    ),
    "mistral3": (
        "Mistral3Config",
        {**GROUPED, "model_type": "mistral", "tie_word_embeddings": False},
        {**VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    "llava": (
        "LlavaConfig",
        {**GROUPED, "model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model"},
    ),
    "idefics3": ("Idefics3Config", {**GROUPED, "model_type": "llama"}, VISION),
    "smolvlm": ("SmolVLMConfig", {**GROUPED, "model_type": "llama"}, VISION),
    "internvl": (
        "InternVLConfig",
        {**GROUPED, "model_type": "qwen2"},
        {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "llava_next": (
        "LlavaNextConfig",
        {**GROUPED, "model_type": "mistral"},
        {**VISION, "model_type": "clip_vision_model"},
    ),
    "llava_onevision": (
        "LlavaOnevisionConfig",
        {**GROUPED, "model_type": "qwen2"},
        {**VISION, "model_type": "siglip_vision_model"},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {**GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        {**VISUAL, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {**GROUPED, "rope_scaling": GRID},
        {
            **VISUAL,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {**GROUPED, "head_dim": 16, "rope_scaling": QWEN3_GRID},
        {
            **VISUAL,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        FAMILIES["qwen3-5-moe"][1]
        | {"rope_parameters": {**QWEN3_GRID, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
        {
            **VISUAL,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        FAMILIES["qwen3-5"][1]
        | {"rope_parameters": {**QWEN3_GRID, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
        {
            **VISUAL,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
    ),
}
"""(class of the configuration, settings of the language model, of the image encoder)."""
SOUND = {
    "hidden_size": 16,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 1,
    "conf_attention_context_left": 5,
    "sscp_conv_channel_size": [4, 4],
    "input_feat_size": 16,
    "vocab_size": 4,
    "vocab_offset": 1004,
}
"""Of the audio encoder of Gemma 3n."""


def save_multimodal(name: str, directory: Path, **changes: Any) -> torch.nn.Module:
    """Write a random model with an image encoder as a Hugging Face folder without a tokenizer."""
    import transformers

    kind, text, vision = MULTIMODAL[name]
    if name == "gemma3n":
        # Its own image encoder needs timm: another one stands here, which the class does not expect.
        config = transformers.Gemma3nConfig(text_config={**text, **changes}, audio_config=SOUND)
        own = {"vocab_size": 4, "vocab_offset": 1000, "rms_norm_eps": 1e-6}
        config.__dict__["vision_config"] = transformers.SiglipVisionConfig(**vision, **own)
    else:
        config = getattr(transformers, kind)(text_config={**text, **changes}, vision_config=vision)
    config.tie_word_embeddings = name.startswith("gemma")
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model
