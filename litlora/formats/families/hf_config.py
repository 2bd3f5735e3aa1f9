"""The settings of one config.json, and the fields that most families read and write alike.
Torch-free."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.rope import rope_fields, rope_settings

MAX_LAYERS = 10_000
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


class HFConfig:
    """The settings of one config.json. An absent setting has the family's default; a setting that
    is null is None."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def need(self, *names: str) -> Any:
        """The value under the first of several names. Raises CheckpointError if none has one."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        raise CheckpointError(f"{names[0]} missing")

    def replace(self, **changes: Any) -> "HFConfig":
        """The same settings with some of them changed."""
        return HFConfig({**self.values, **changes})

    def only(self, name: str, allowed: Any, default: Any) -> None:
        """Refuse a value that changes what the model computes and is not implemented."""
        if (value := self.get(name, default)) != allowed:
            raise CheckpointError(f"{name} is {value!r}; only {allowed!r} is implemented")

    @property
    def layers(self) -> range:
        """The layer numbers. Their count is bounded because lists are built from it."""
        count = self.need("num_hidden_layers", "n_layer")
        if type(count) is not int or not 0 < count <= MAX_LAYERS:
            raise CheckpointError(
                f"num_hidden_layers is {count!r}; it must be a whole number from 1 to {MAX_LAYERS}"
            )
        return range(count)


@dataclass(frozen=True)
class Family:
    """One model family: the name of its architecture, and how its settings are read and written."""

    architecture: str
    read: Callable[[HFConfig], dict[str, Any]]
    """Returns the fields of ModelConfig."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Returns the settings that `standard_settings` lacks, or that have another name here."""
    without: tuple[str, ...] = ()
    """The settings of `standard_settings` that this family does not have."""


# ---- what nearly all families share


def common_fields(
    c: HFConfig,
    *,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    activation: tuple[str, str] = ("hidden_act", "silu"),
    tied: bool = False,
    head_dim: int | None = None,
    **rope: Any,
) -> dict[str, Any]:
    """The fields of ModelConfig that nearly all families read alike.

    `eps` and `activation` are (the setting's name, the family's default); `tied` and `head_dim` are
    the family's defaults; `rope` goes to `rope_fields`.
    """
    hidden, heads = c.need("hidden_size", "n_embd"), c.need("num_attention_heads", "n_head")
    return {
        "vocab_size": c.need("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": c.get("intermediate_size"),
        "num_hidden_layers": len(c.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or head_dim or _even_share(hidden, heads),
        "max_position_embeddings": c.need("max_position_embeddings", "n_positions"),
        "norm_eps": c.get(*eps),
        "hidden_act": _activation(c, *activation),
        "tie_word_embeddings": c.get("tie_word_embeddings", tied),
        **rope_fields(c, **rope),
    }


def _even_share(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise CheckpointError(f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})")
    return hidden // heads


def _activation(c: HFConfig, name: str, default: str) -> str:
    value = c.get(name)
    value = default if value is None else value
    if value not in ACTIVATIONS:
        raise CheckpointError(f"{name} {value!r} is not implemented; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def standard_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings that nearly all families write alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_settings(config),
        # These are not facts of the architecture, but the defaults of some families lie outside a
        # smaller vocabulary.
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    }


def activation_name(config: ModelConfig, tanh: str = "gelu_pytorch_tanh") -> str:
    """The activation's name in a config.json; `tanh` is the family's name for the tanh form of
    GELU."""
    return tanh if config.hidden_act == "gelu_tanh" else config.hidden_act


# ---- sliding windows


def window_fields(c: HFConfig, window: int | None, slides: Callable[[int], bool]) -> dict[str, Any]:
    """The fields of sliding windows, from `layer_types` if the file has it. Otherwise
    `slides(layer)` is the family's own rule."""
    layers = c.layers
    kinds = c.get("layer_types") or [
        "sliding_attention" if slides(layer) else "full_attention" for layer in layers
    ]
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise CheckpointError(f"layer_types: {', '.join(unknown)} is not implemented")
    if len(kinds) != len(layers):
        raise CheckpointError(f"layer_types has {len(kinds)} entries; there are {len(layers)} layers")
    if window is None or "sliding_attention" not in kinds:
        return {}
    full = tuple(layer for layer in layers if kinds[layer] == "full_attention")
    return {"sliding_window": window, "full_attention_layers": full}


def layer_types(config: ModelConfig) -> list[str]:
    """The kind of attention in each layer, as `layer_types` names it."""
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def optional_window_settings(config: ModelConfig) -> dict[str, Any]:
    """Sliding windows as the Qwen families and SmolLM 3 write them."""
    kinds = layer_types(config)
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": kinds,
    }
