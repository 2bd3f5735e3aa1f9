"""The architecture of a model that is not one of litlora's own: its config.json, as transformers
reads it. Imports neither torch nor transformers before it is asked for what only these know.

`model_config.yaml` holds it under one entry, `transformers`, which versions without it refuse.
"""

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError, MissingExtraError
from litlora.facts import LARGEST
from litlora.storage.untrusted import read_yaml_mapping

ENTRY = "transformers"
NOTICE = "this architecture is not one of litlora's own: it runs through transformers, without packing"
UNLIMITED = 2**20
"""The context of a model whose config.json names none: one with a recurrent state, or with positions
that reach anywhere (ALiBi)."""
_NOT_FACTS = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "eos_token_id"),
    *("return_dict", "output_attentions", "output_hidden_states", "_commit_hash", "auto_map"),
    *("_attn_implementation", "_attn_implementation_internal", "attn_implementation"),
    *("_experts_implementation", "experts_implementation", "task_specific_params", "id2label", "label2id"),
)
"""Settings that do not change what the weights mean. An implementation of attention may name a
repository of code, and auto_map does."""
_LONGEST = 10_000
"""Entries of a list or a mapping in a config.json, at most."""


@dataclass(frozen=True)
class TransformersConfig:
    """The settings of a config.json that are facts of the architecture. Raises CheckpointError for
    values that no model has."""

    settings: dict[str, Any]

    def __post_init__(self) -> None:
        kept = {name: value for name, value in self.settings.items() if name not in _NOT_FACTS}
        object.__setattr__(self, "settings", _checked("config.json", kept, depth=0))
        if not isinstance(self.model_type, str):
            raise CheckpointError(f"model_type is {self.model_type!r}; it must be a name")

    @property
    def model_type(self) -> str:
        return self.settings.get("model_type")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for YAML."""
        return {ENTRY: self.settings}

    @property
    def least_modules(self) -> int:
        """Modules with weights that such a model has at least."""
        return self.num_hidden_layers

    def facts(self) -> dict[str, Any]:
        """The facts that two models are compared by."""
        return self.settings

    @cached_property
    def built(self) -> Any:
        """The `PreTrainedConfig`, for reading only. Raises CheckpointError for settings that
        transformers cannot use."""
        library()
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING as kinds

        if self.model_type not in kinds:
            raise CheckpointError(f"transformers knows no model_type {self.model_type!r}")
        try:
            kind = kinds[self.model_type]
            named = {field.name: field.default for field in _fields(kind)}
            named = {name: type(value)(0) for name, value in named.items() if _is_rate(name, value)}
            return kind.from_dict({**named, **_readable(self.settings)})
        except Exception as error:  # its classes check their settings in their own ways
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"not a usable configuration ({type(error).__name__}: {reason})") from None

    def _fact(self, name: str, default: int) -> int:
        try:
            value = getattr(self.built, name, None)
        except RuntimeError:  # its layers differ in it: the most of them all
            value = max(getattr(layer, name, 0) for layer in self.built.per_layer_config)
        return value if type(value) is int and value > 0 else default

    @property
    def vocab_size(self) -> int:
        return self._fact("vocab_size", 1)

    @property
    def hidden_size(self) -> int:
        return self._fact("hidden_size", 1)

    @property
    def num_hidden_layers(self) -> int:
        return self._fact("num_hidden_layers", 1)

    @property
    def num_attention_heads(self) -> int:
        return self._fact("num_attention_heads", 1)

    @property
    def max_position_embeddings(self) -> int:
        return self._fact("max_position_embeddings", UNLIMITED)

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(getattr(self.built, "tie_word_embeddings", False))

    num_experts = None
    """Experts are one tensor a layer here, and not layers of their own."""
    rope_scaling = None
    """What it does is transformers' own affair: no sequence is padded or packed beside another."""
    final_logit_softcapping = None
    """The head applies whatever the architecture has."""

    def untied(self) -> "TransformersConfig":
        """The same architecture with an output head of its own."""
        return dataclasses.replace(self, settings={**self.settings, "tie_word_embeddings": False})


Architecture = ModelConfig | TransformersConfig


def load_architecture(path: Path) -> Architecture:
    """Read a `model_config.yaml`. The message of a CheckpointError begins with the file's path."""
    values = read_yaml_mapping(path, f"a checkpoint directory needs its {path.name}")
    if ENTRY not in values:
        return ModelConfig.load(path)
    settings = values[ENTRY]
    if len(values) > 1 or not isinstance(settings, dict):
        raise CheckpointError(f"{path}: {ENTRY} must be its only entry, and hold the settings of config.json")
    try:
        return TransformersConfig(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def library() -> Any:
    """The module `transformers`. Raises MissingExtraError if it is missing."""
    is_first = "transformers" not in sys.modules
    if is_first:
        # Its kernels are compiled code from a hub, which it loads where the package `kernels` is.
        os.environ["USE_HUB_KERNELS"] = "0"
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "this architecture is not one of litlora's own, and transformers, through which it would run, "
            f"cannot be imported ({str(error).splitlines()[0]}): pip install 'litlora[transformers]'"
        ) from None
    if is_first:  # what it logs would stand before the messages of a command
        transformers.logging.set_verbosity_error()
    return transformers


def causal_class(kind: str) -> str | None:
    """The class of transformers that AutoModelForCausalLM builds for a model_type; None if none."""
    library()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    found = names.get(kind)
    return found[0] if isinstance(found, tuple | list) else found


def _fields(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _is_rate(name: str, value: Any) -> bool:
    """Whether a setting is a rate of dropout."""
    return type(value) in (int, float) and ("dropout" in name or name.endswith(("pdrop", "layerdrop")))


def _readable(value: Any) -> Any:
    """Settings with transformers' way to write an infinite number as JSON read, and without dropout: it
    is not a fact of the weights, and training has its own setting."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {
            name: type(entry)(0) if _is_rate(name, entry) else _readable(entry)
            for name, entry in value.items()
        }
    return [_readable(entry) for entry in value] if isinstance(value, list) else value


def _checked(name: str, value: Any, depth: int) -> Any:
    """A plain value of a sane size. Raises CheckpointError for any other, before it reaches code that
    would allocate by it."""
    if value is None or isinstance(value, bool | str):
        if isinstance(value, str) and len(value) > _LONGEST:
            raise CheckpointError(f"{name}: has {len(value):,} characters; no setting is that long")
        return value
    if isinstance(value, int | float):
        if not math.isfinite(value) or abs(value) > LARGEST and type(value) is int:
            raise CheckpointError(f"{name} is {value}; no model is that large")
        return value
    if not isinstance(value, dict | list | tuple) or depth > 6:
        raise CheckpointError(f"{name} is not a plain value")
    if len(value) > _LONGEST:
        raise CheckpointError(f"{name}: has {len(value):,} entries; no model has that many")
    if isinstance(value, dict):
        return {str(key): _checked(f"{name}.{key}", entry, depth + 1) for key, entry in value.items()}
    return [_checked(f"{name}[{number}]", entry, depth + 1) for number, entry in enumerate(value)]
