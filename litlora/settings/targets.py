"""What settings call a layer: a preset, a name or the end of one, a pattern. Torch-free."""

import re
from collections.abc import Mapping
from typing import Any

from litlora.errors import UserError, setting
from litlora.storage.patterns import Patterns

PRESETS = ("qv", "attention", "mlp", "experts", "all-linear")
OUTPUT_HEAD = "lm_head"
MOST_LAYERS = 10_000
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_SUFFIXES = {
    "qv": ("q_proj", "v_proj", "q_b_proj", "kv_b_proj"),
    "attention": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    ),
    "mlp": (
        *("gate_proj", "up_proj", "down_proj"),
        *("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
        *("linear_left", "linear_right", "altup_projections", "altup_unembed_projections"),
    ),
}
_EXPERTS = re.compile(r"(?:.*\.)?experts\.\d+\.[^.]+")


def in_preset(name: str, preset: str) -> bool:
    """Whether a preset means the layer of this name."""
    leaf = _leaf(name)
    if preset == "experts":
        return _EXPERTS.fullmatch(name) is not None
    if preset == "attention" and ".linear_attn." in name:
        return True
    return leaf != OUTPUT_HEAD if preset == "all-linear" else leaf in _SUFFIXES[preset]


def kind_of(name: str) -> str:
    """What layers of this name are called whatever their number: q_proj, experts.up_proj."""
    leaf = _leaf(name)
    if _EXPERTS.fullmatch(name):
        return f"experts.{leaf}"
    shared = next((part for part in ("shared_expert", "shared_experts") if f".{part}." in name), None)
    return leaf if shared is None else f"{shared}.{leaf}"


def _leaf(name: str) -> str:
    """The last part of a name that is not a number: altup_projections of altup_projections.0."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), name)


def embedding_among(targets: str | list[str]) -> str | None:
    """The first of the targets that names an embedding, such as embed_tokens."""
    names = [targets] if isinstance(targets, str) else targets
    return next((name for name in names if name.rpartition(".")[2].startswith("embed_")), None)


def layer_numbers(given: int | str | list[int | str]) -> list[int]:
    """The numbers that layers_to_transform means, in order: numbers and ranges such as 20-31. Raises
    UserError for anything else."""
    numbers: set[int] = set()
    for entry in given if isinstance(given, list) else [given]:
        found = _RANGE.fullmatch(str(entry))
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < MOST_LAYERS:
            raise UserError(
                f"{setting('layers_to_transform')} {entry}: must be a number from 0, or a range such as 20-31"
            )
        numbers |= {*range(first, last + 1)}
    if not numbers:
        raise UserError(
            f"{setting('layers_to_transform')} is empty: an adapter without layers trains nothing"
        )
    return sorted(numbers)


def layer_number(name: str) -> int | None:
    """The number of the layer that a module's name is in: 3 of model.layers.3.mlp.experts.1."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


class ByTarget:
    """Values for some layers: {target: value}; the first target that means a layer counts, but its
    full name before all others."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises ValueError for a pattern that cannot be matched in bounded time."""
        self._values = values
        self._numbers = {target: number for number, target in enumerate(values)}
        self._presets = [target for target in PRESETS if target in values]
        self._patterns = Patterns([target for target in values if target not in PRESETS], ends=False)

    def value(self, name: str, default: Any) -> Any:
        """The value for the layer of this name."""
        if name in self._values:  # an imported adapter may name every layer: no search then
            return self._values[name]
        meant = [preset for preset in self._presets if in_preset(name, preset)]
        ends = (name[place + 1 :] for place, character in enumerate(name) if character == ".")
        meant += [end for end in ends if end in self._values and end not in PRESETS]
        if (pattern := self._patterns.first(name)) is not None:
            meant.append(pattern)
        return self._values[min(meant, key=self._numbers.__getitem__)] if meant else default
