"""What an architecture that is not one of litlora's own needs: it may run through transformers, from
a folder; here stands why the one GPT cannot compute it. From a table of families, or from what its
config.json says. Torch-free."""

from typing import Any

from litlora.formats.families.hf_config import ACTIVATIONS
from litlora.formats.families.multimodal import MULTIMODAL, text_part
from litlora.formats.families.table import FAMILIES
from litlora.frozen.methods import METHODS, method_of

_LATENT = "multi-head latent attention"
_STATE_SPACE = "state-space layers"
_CODE = "its own remote code, which is never run"
_GEMMA4 = "norms of the values, layers with different head sizes, and in some models per-layer embeddings"
_GRID = "rotary embeddings over time, height and width"
_ROUTER = "a sigmoid router with a correction bias"
_BERT = "an encoder's layer with norms after the residual sums"
_TOKENS = "image tokens, which its language model reads and writes"

NEEDS = {
    "baichuan": _CODE,
    "bamba": _STATE_SPACE,
    "bert-generation": _BERT,
    "biogpt": "learned positions with an offset",
    "bitnet": "ternary weights, and norms inside attention and MLP",
    "bloom": "ALiBi positions and a norm after the embedding",
    "chameleon": _TOKENS,
    "chatglm": _CODE,
    "codegen": "a reader of its fused weights in four parts",
    "cohere2_moe": "a reader of its experts",
    "ctrl": "sinusoidal positions",
    "cwm": "a reader of its settings (Llama's layers, most of them with a sliding window)",
    "dbrx": "its fused experts",
    "deepseek_v2": f"{_LATENT}, and experts with a router of their own",
    "diffllama": "differential attention",
    "emu3": _TOKENS,
    "falcon_h1": f"{_STATE_SPACE} beside attention, and multipliers",
    "falcon_mamba": _STATE_SPACE,
    "fuyu": "image patches as tokens",
    "gemma4_unified": "image and audio encoders",
    "gemma4_unified_text": _GEMMA4,
    "glm4v_moe_text": f"{_GRID}, and experts with {_ROUTER}",
    "glm4v_text": f"interleaved {_GRID}",
    "gpt_bigcode": "its fused multi-query layout",
    "gpt_neo": "local attention, and attention scores without scaling",
    "gptj": "a reader of its settings (interleaved rotary embeddings, a plain MLP)",
    "granite_swa": "attention sinks",
    "granitemoe": "a reader of its fused experts",
    "granitemoehybrid": "state-space layers in most models, and a reader of its fused experts",
    "granitemoeshared": "a reader of its fused experts",
    "hunyuan_v1_moe": "a reader of its experts",
    "hyperclovax": "a reader of its settings (Granite's multipliers)",
    "internlm3": "a reader of its settings (Llama's layers)",
    "iquestcoder": "a reader of its settings (Llama's layers)",
    "jamba": _STATE_SPACE,
    "jetmoe": "a mixture of experts in attention",
    "lfm2": "short convolutions in place of attention in most layers",
    "lfm2_moe": f"short convolutions in place of attention in most layers, and experts with {_ROUTER}",
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "minimax": "linear attention (lightning attention)",
    "minimax_m2": f"experts with {_ROUTER}",
    "mllama_text_model": "layers with cross-attention to the image",
    "modernbert-decoder": "a norm after the embedding",
    "mpt": "ALiBi positions",
    "nanochat": "RMS norms without weights",
    "openai-gpt": "norms after the residual sums",
    "opt": "learned positions with an offset",
    "persimmon": "a reader of its settings (GPT-NeoX's layers with norms of queries and keys)",
    "phi3_v": "an image encoder",
    "phi3small": "block-sparse attention",
    "phi4_multimodal": "image and audio encoders",
    "phimoe": "its router (sparsemixer) and layer norms with experts",
    "qwen2_5_omni_text": _GRID,
    "qwen3_omni_moe_text": f"{_GRID}, and a reader of its experts",
    "qwen3_vl_moe_text": f"{_GRID}, and a reader of its experts",
    "recurrent_gemma": "recurrent layers (RG-LRU)",
    "reformer": "hashed attention and reversible layers",
    "RefinedWeb": f"{_CODE} (the later FalconForCausalLM is covered)",
    "RefinedWebModel": f"{_CODE} (the later FalconForCausalLM is covered)",
    "rwkv": "recurrent layers (RWKV)",
    "vaultgemma": "a reader of its settings (Gemma 2's layers without the norms after attention and MLP)",
    "xglm": "sinusoidal positions",
    "xlm": _BERT,
    "xlnet": "permutation language modelling with relative positions",
    "xlstm": "recurrent layers (xLSTM)",
    "zamba": _STATE_SPACE,
    "zamba2": _STATE_SPACE,
}
"""By `model_type`: what the one GPT of this project lacks, or what nobody has written yet."""

_PARTS = {
    "vision_config": "an image encoder",
    "mm_vision_tower": "an image encoder",
    "audio_config": "an audio encoder",
    "qformer_config": "a query transformer",
    "vq_config": "an image tokenizer",
}
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_KINDS_OF_LAYERS = {
    "linear_attention": "linear attention",
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "conv": "short convolutions",
    "chunked_attention": "chunked attention",
    "recurrent": "recurrent layers",
}
_SIGNS = {
    "kv_lora_rank": _LATENT,
    "index_topk": "sparse attention with an indexer",
    "linear_conv_kernel_dim": "linear attention",
    "mamba_d_state": _STATE_SPACE,
    "ssm_state_size": _STATE_SPACE,
    "conv_L_cache": "short convolutions",
    "attention_chunk_size": "chunked attention",
    "alibi": "ALiBi positions",
    "hidden_size_per_layer_input": "per-layer embeddings",
    "type_vocab_size": "token-type embeddings",
    "is_encoder_decoder": "an encoder",
    "encoder_layers": "an encoder",
}
"""A setting that is neither absent, null, 0 nor false -> what it asks for."""
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_SCALES = ("logits_scaling", "logit_scale", "scale_emb", "scale_depth")


def why_not_covered(kind: Any, named: str | None, values: dict[str, Any]) -> str:
    """What the architecture of a config.json needs, and what would work instead."""
    if isinstance(kind, str) and kind in FAMILIES:
        return f"of the family {kind} only {FAMILIES[kind].architecture} is covered"
    if not isinstance(kind, str):
        return f"config.json names no model_type; {_covered()}"
    if kind in MULTIMODAL:
        if named not in (None, MULTIMODAL[kind].architecture):
            return f"of the family {kind} only {MULTIMODAL[kind].architecture} is covered"
        text = text_part(MULTIMODAL[kind], values)[1]
        text_kind = text.get("model_type") or MULTIMODAL[kind].text
        return f"it needs {_lacks(text_kind, text)} in its language model ({text_kind!r}); {_covered()}"
    found = next((name for name in _TEXT_PARTS if isinstance(values.get(name), dict)), None)
    parts = list(dict.fromkeys(what for name, what in _PARTS.items() if values.get(name)))
    if found is None and not parts:
        return f"it needs {_lacks(kind, values)}; {_covered()}"
    needs = " and ".join(parts) or NEEDS.get(kind) or "parts beside its language model"
    text = values[found] if found else {}
    text_kind = text.get("model_type") or f"{kind}_text"
    if isinstance(text_kind, str) and text_kind in FAMILIES:
        alone = f"{FAMILIES[text_kind].architecture}, model_type {text_kind}"
        return f"it needs {needs}; a folder of its language model alone is covered ({alone})"
    if not found and not (isinstance(text_kind, str) and text_kind in NEEDS):
        return f"it needs {needs}; {_covered()}"
    return f"it needs {needs}, and its language model needs {_lacks(text_kind, text)}; {_covered()}"


def has_parts(values: dict[str, Any]) -> bool:
    """Whether a config.json tells of parts beside a language model, such as an image encoder."""
    inside = any(isinstance(values.get(name), dict) for name in _TEXT_PARTS)
    return inside or any(values.get(name) for name in _PARTS)


def _covered() -> str:
    names = [family.architecture for family in (*FAMILIES.values(), *MULTIMODAL.values())]
    return f"covered: {', '.join(names[:6])} and {len(names) - 6} more, which docs/formats.md lists"


def _lacks(kind: Any, values: dict[str, Any]) -> str:
    """What a language model needs: the table's words, or the signs in its settings."""
    if isinstance(kind, str) and kind in NEEDS:
        return NEEDS[kind]
    return ", ".join(_signs(values)) or "a reader of its settings, which do not tell how its layers differ"


def _signs(values: dict[str, Any]) -> list[str]:
    found = [what for name, what in _SIGNS.items() if values.get(name)]
    found += _layer_kinds(values.get("layer_types"))
    for name, value in values.items():
        scales = name in _SCALES or (name.endswith("_multiplier") and "ffn" not in name)
        if scales and isinstance(value, int | float) and value != 1:
            found.append(f"{name} ({value})")
        if "sink" in name and value:
            found.append("attention sinks")
    experts = next((values[name] for name in _EXPERTS if isinstance(values.get(name), int)), 0)
    if experts > 1:
        found.append(f"a reader of its mixture of experts ({experts} experts)")
    if values.get("position_embedding_type") == "alibi":
        found.append("ALiBi positions")
    activation = values.get("hidden_act")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        found.append(f"the activation {activation!r}")
    if values.get("auto_map"):
        found.append(_CODE)
    method = method_of(values.get("quantization_config"))
    if method not in (None, *METHODS):
        found.append(f"weights quantized by {method!r}")
    return list(dict.fromkeys(found))


def _layer_kinds(kinds: Any) -> list[str]:
    """What the entries of `layer_types` ask for, six at most."""
    if not isinstance(kinds, list):
        return []
    others = dict.fromkeys(
        str(kind) for kind in kinds if kind not in ("full_attention", "sliding_attention", "attention")
    )
    return [_KINDS_OF_LAYERS.get(kind, f"layers of type {kind[:40]!r}") for kind in list(others)[:6]]
