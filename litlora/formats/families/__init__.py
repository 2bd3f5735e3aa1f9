"""Hugging Face's `config.json` -> ModelConfig and back, one entry for each model family.
Torch-free.

A family is known by its `model_type`. Its entry in `table.py` reads and writes the same settings;
`write_config` reads its own result again and refuses a result that is not the same model. Dropout
is not read: it is not a fact of the weights, and training has its own setting.
"""

from pathlib import Path
from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.hf_config import HFConfig, standard_settings
from litlora.formats.families.missing import has_parts, why_not_covered
from litlora.formats.families.multimodal import MULTIMODAL, Multimodal, text_settings, with_vocabulary
from litlora.formats.families.table import FAMILIES
from litlora.frozen.methods import Storage
from litlora.storage.untrusted import read_json_object

__all__ = [
    "FAMILIES",
    "HF_CONFIG_FILE",
    "architecture_of",
    "is_own",
    "why_not_covered",
    "adapt_config",
    "load_config",
    "load_storage",
    "multimodal_of",
    "read_config",
    "write_config",
]

HF_CONFIG_FILE = "config.json"


def read_config(values: dict[str, Any]) -> tuple[str, ModelConfig]:
    """(model_type, ModelConfig) of a config.json; of a multimodal model, those of its language
    model. Raises CheckpointError for an architecture or a setting that is not covered, naming it,
    with what is missing."""
    values = _language_model(values)
    kind, named = values.get("model_type"), architecture_of(values)
    covered = isinstance(kind, str) and kind in FAMILIES
    if not covered or (named is not None and named != FAMILIES[kind].architecture):
        why = why_not_covered(kind, named, values)
        raise CheckpointError(f"architecture {named or kind!r} (model_type {kind!r}) is not covered: {why}")
    Storage.parse(values.get("quantization_config"))
    source = HFConfig(values)
    try:
        # "vision": among the tokens of an image alone
        if values.get("use_bidirectional_attention") not in (None, False, "vision"):
            source.only("use_bidirectional_attention", False, False)
        return kind, ModelConfig(**FAMILIES[kind].read(source))
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        # values of unexpected types
        raise CheckpointError(f"not a usable configuration: {error}") from None


def _language_model(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model in a config.json: all of them, or a part."""
    outer = multimodal_of(values)
    text = None if outer is None else text_settings(outer, values)
    return values if text is None else text


def multimodal_of(values: dict[str, Any]) -> Multimodal | None:
    """The multimodal family of a config.json whose language model can be read; None if it has none."""
    kind = values.get("model_type")
    outer = MULTIMODAL.get(kind) if isinstance(kind, str) else None
    return outer if outer is not None and architecture_of(values) in (None, outer.architecture) else None


def architecture_of(values: dict[str, Any]) -> str | None:
    architectures = values.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else None


def is_own(values: dict[str, Any]) -> bool:
    """Whether a config.json is for litlora's own model, if it can be read at all: others go through
    transformers. A model with parts beside its language model never does."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind in FAMILIES or kind in MULTIMODAL:
        return True
    return has_parts(values)


def load_config(directory: Path) -> tuple[str, ModelConfig]:
    """(model_type, ModelConfig) of the config.json in a directory. The message of a CheckpointError
    begins with the file's path."""
    path = directory / HF_CONFIG_FILE
    values = read_json_object(path, "a Hugging Face folder needs it")
    try:
        return read_config(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_storage(directory: Path) -> Storage:
    """How the weights beside a config.json, which `load_config` has read, are stored."""
    values = read_json_object(directory / HF_CONFIG_FILE, "a Hugging Face folder needs it")
    return Storage.parse(_language_model(values).get("quantization_config"))


def write_config(config: ModelConfig, model_type: str | None = None) -> dict[str, Any]:
    """The config.json of a model, in the family named, or in the first that can express it.

    Raises CheckpointError if none can: the settings are read back and must give the same
    ModelConfig.
    """
    for kind in [model_type] if model_type else FAMILIES:
        family = FAMILIES[kind]
        standard = standard_settings(config)
        values = {
            "architectures": [family.architecture],
            "model_type": kind,
            **{name: value for name, value in standard.items() if name not in family.without},
            **family.write(config),
        }
        try:
            if read_config(values)[1] == config:
                return values
        except CheckpointError:
            continue
    what = f"architecture {FAMILIES[model_type].architecture}" if model_type else "any covered architecture"
    raise CheckpointError(f"this model cannot be expressed as {what}")


def adapt_config(values: dict[str, Any], config: ModelConfig) -> dict[str, Any] | None:
    """A base's own config.json for a model made from it, or None if it describes another model.

    A fine-tune may change what belongs to the vocabulary: the rows of the embedding, and whether
    the head is tied to it.
    """
    # auto_map names code beside the base, which is not copied; the weights written are not
    # quantized.
    dropped = ("auto_map", "quantization_config")
    values = {name: value for name, value in values.items() if name not in dropped}
    if "num_nextn_predict_layers" in values:  # their weights are not read
        values["num_nextn_predict_layers"] = 0
    size, tied = config.vocab_size, config.tie_word_embeddings
    adapted = {**values, "vocab_size": size, "tie_word_embeddings": tied}
    if (outer := multimodal_of(values)) is not None:
        adapted = with_vocabulary(outer, values, size, tied=tied)
    try:
        return adapted if read_config(adapted)[1] == config else None
    except CheckpointError:
        return None
