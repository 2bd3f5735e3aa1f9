"""Models with images or sound beside their language model: where a config.json has the settings of
the language model, and what its weights are called. Torch-free.

Only the language model is read. Its tokens have plain positions where there is text alone: rotary
embeddings over time, height and width (M-RoPE) are then the usual ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from litlora.formats.families.table import FAMILIES


@dataclass(frozen=True)
class Spelling:
    """How the names of the language model's tensors begin."""

    decoder: str
    """In the place of `model.`."""
    head: str = "lm_head."
    """In the place of `lm_head.`."""

    def inner(self, name: str) -> str | None:
        """The name of a tensor in the language model alone; None if it is not a part of it."""
        for outside, inside in ((self.decoder, "model."), (self.head, "lm_head."), ("lm_head.", "lm_head.")):
            if name.startswith(outside):
                return inside + name.removeprefix(outside)
        return None

    def outer(self, name: str) -> str:
        """The inverse of `inner`. A name that begins in another way stays."""
        for outside, inside in ((self.decoder, "model."), (self.head, "lm_head.")):
            if name.startswith(inside):
                return outside + name.removeprefix(inside)
        return name


_NEW = Spelling("model.language_model.")
_BEFORE_2025 = Spelling("language_model.model.", "language_model.lm_head.")
_SPLIT = (_NEW, _BEFORE_2025)


@dataclass(frozen=True)
class Multimodal:
    """One multimodal family: the name of its architecture and its language model."""

    architecture: str
    text: str
    """The model_type of the language model where `text_config` names none."""
    spellings: tuple[Spelling, ...] = _SPLIT
    """The names in files; the first are those of the modules in transformers 5, which PEFT uses."""
    tied: bool = False
    """The family's default of tie_word_embeddings."""
    flat: bool = False
    """Files of 2024 have the settings of the language model beside the others."""

    def spelling(self, names: Iterable[str]) -> Spelling | None:
        """How a file with these names spells the language model's; None if it has none."""
        names = list(names)
        return next((s for s in self.spellings if any(n.startswith(s.decoder) for n in names)), None)


_QWEN = (_NEW, Spelling("model."))
_TEXT_MODEL = (Spelling("model.text_model."),)
# fmt: off
MULTIMODAL = {
    "gemma3": Multimodal("Gemma3ForConditionalGeneration", "gemma3_text", tied=True),
    "gemma3n": Multimodal("Gemma3nForConditionalGeneration", "gemma3n_text", (_NEW,), tied=True),
    "gemma4": Multimodal("Gemma4ForConditionalGeneration", "gemma4_text", (_NEW,), tied=True),
    "llama4": Multimodal("Llama4ForConditionalGeneration", "llama4_text", (_BEFORE_2025,)),
    "mistral3": Multimodal("Mistral3ForConditionalGeneration", "mistral", tied=True),
    "llava": Multimodal("LlavaForConditionalGeneration", "llama"),
    "llava_next": Multimodal("LlavaNextForConditionalGeneration", "llama"),
    "llava_onevision": Multimodal("LlavaOnevisionForConditionalGeneration", "qwen2"),
    "internvl": Multimodal("InternVLForConditionalGeneration", "qwen2", tied=True),
    "idefics3": Multimodal("Idefics3ForConditionalGeneration", "llama", _TEXT_MODEL),
    "smolvlm": Multimodal("SmolVLMForConditionalGeneration", "llama", _TEXT_MODEL),
    "qwen2_vl": Multimodal("Qwen2VLForConditionalGeneration", "qwen2_vl_text", _QWEN, flat=True),
    "qwen2_5_vl": Multimodal("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", _QWEN,
                             flat=True),
    "qwen3_vl": Multimodal("Qwen3VLForConditionalGeneration", "qwen3_vl_text", (_NEW,)),
    "qwen3_5": Multimodal("Qwen3_5ForConditionalGeneration", "qwen3_5_text", (_NEW,)),
    "qwen3_5_moe": Multimodal("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", (_NEW,)),
}
# fmt: on
"""By the `model_type` of the whole."""
TEXT_ALONE = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""Language models that exist only inside, and the family that computes the same of text."""
_GRID = ("mrope_section", "mrope_interleaved")

DEFAULTS = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
    },
    "llama4_text": {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "num_local_experts": 16,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
}
"""What an absent setting of a `text_config` means: released files leave out what was the default."""


def text_part(outer: Multimodal, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """("text_config" or "", the settings of the language model as they stand in a config.json)."""
    text = values.get("text_config")
    if isinstance(text, dict):
        return "text_config", text
    return ("", values) if outer.flat else ("text_config", {})


def text_settings(outer: Multimodal, values: dict[str, Any]) -> dict[str, Any] | None:
    """The language model's settings, as its own config.json would have them; None if its family is
    not covered."""
    _, text = text_part(outer, values)
    kind = text.get("model_type") or outer.text
    kind = TEXT_ALONE.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in FAMILIES:
        return None
    tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings", outer.tied))
    own = {name: value for name, value in text.items() if name not in ("architectures", "vision_config")}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := own.get(name), dict):
            own[name] = _without_grid(rope)
    return {
        **DEFAULTS.get(kind, {}),
        **own,
        "model_type": kind,
        "tie_word_embeddings": tied,
        "quantization_config": values.get("quantization_config") or text.get("quantization_config"),
    }


def _without_grid(rope: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings without how they divide over time, height and width."""
    kept = {name: value for name, value in rope.items() if name not in _GRID}
    return {name: "default" if value == "mrope" else value for name, value in kept.items()}


def with_vocabulary(
    outer: Multimodal, values: dict[str, Any], vocab_size: int, *, tied: bool
) -> dict[str, Any]:
    """A config.json whose language model has that many tokens, and a tied head or its own."""
    place, text = text_part(outer, values)
    kept = {name: value for name, value in text.items() if name != "quantization_config"}
    changed = {**kept, "vocab_size": vocab_size}
    if not place:
        return {**changed, "tie_word_embeddings": tied}
    if "tie_word_embeddings" in text:
        changed["tie_word_embeddings"] = tied
    beside = {"vocab_size": vocab_size} if "vocab_size" in values else {}
    return {**values, **beside, place: changed, "tie_word_embeddings": tied}
