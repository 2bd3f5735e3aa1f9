"""ModelConfig: the facts of an architecture, as `model_config.yaml` stores them. Torch-free.

The names are those of Hugging Face's `config.json`, wherever it has one for the thing.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from litlora.errors import CheckpointError

CONFIG_FILE = "model_config.yaml"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one GPT; `CheckpointError` if the sizes contradict each other."""

    vocab_size: int
    """Rows of the embedding; a tokenizer may use fewer."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the MLP."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Grouped-query attention: each key/value head serves num_attention_heads / num_key_value_heads queries."""
    head_dim: int
    """Width of one head; hidden_size / num_attention_heads unless the architecture says otherwise."""
    max_position_embeddings: int
    """Context length in tokens."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    mlp: Literal["gated", "plain"] = "gated"
    """gated: down(act(gate(x)) · up(x)); plain: down(act(up(x)))."""
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding's frequencies."""
    attention_bias: bool = False
    """Biases in the query, key, value and output projections."""
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    """The output head is the embedding matrix itself; the checkpoint then stores it once."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), _TYPES[field.name]
            if choices := get_args(kind):
                if value not in choices:
                    raise CheckpointError(f"{field.name} is {value!r}; it must be one of {', '.join(choices)}")
            elif kind is float and type(value) is int:  # YAML writes 10000.0 and 10000 alike
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not kind:
                raise CheckpointError(f"{field.name} is {value!r}; it must be of type {kind.__name__}")
            if kind in (int, float) and not (getattr(self, field.name) > 0 and math.isfinite(value)):
                raise CheckpointError(f"{field.name} is {value!r}; it must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Raises CheckpointError for a missing, unknown or ill-typed field: nothing is guessed."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, values.keys() - names)):
            raise CheckpointError(f"unknown field(s) {', '.join(unknown)}; this version of litlora does not know them")
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise CheckpointError(f"field(s) {', '.join(missing)} missing")
        return cls(**values)

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read a `model_config.yaml`. Raises CheckpointError with the file's path in front."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a checkpoint directory needs its {CONFIG_FILE}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: must hold a mapping of field names to values")
        try:
            return cls.from_dict(values)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


_TYPES = get_type_hints(ModelConfig)
