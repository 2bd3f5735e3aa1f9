"""Groups of facts that YAML stores: dataclasses whose fields are checked against their types.
Torch-free."""

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from litlora.errors import CheckpointError

LARGEST = 2**28
"""No size or count of a real model is larger. A product of two still fits into 64 bits."""


class Facts:
    """What the dataclasses here share: fields that are checked against their types, and reading and
    writing of plain values."""

    def __post_init__(self) -> None:
        for name, kind in _types(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for YAML, without the fields that are None."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Facts):
                plain[field.name] = value.to_dict()
            elif value is not None:
                plain[field.name] = list(value) if isinstance(value, tuple) else value
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """Read plain values. Raises CheckpointError for a missing, unknown or ill-typed field."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, values.keys() - names)):
            raise CheckpointError(
                f"unknown field(s) {', '.join(unknown)}; this version of litlora does not support them"
            )
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise CheckpointError(f"field(s) {', '.join(missing)} missing")
        return cls(**values)


def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value, converted to its type where that loses nothing. Raises CheckpointError if it has
    another type."""
    if get_origin(kind) in (types.UnionType, Union):  # every union here is "or None"
        return None if value is None else _checked(name, value, get_args(kind)[0])
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise CheckpointError(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise CheckpointError(f"{name} is {value!r}; it must be a list")
        return tuple(_checked(name, entry, get_args(kind)[0]) for entry in value)
    if isinstance(kind, type) and issubclass(kind, Facts) and isinstance(value, dict):
        return kind.from_dict(value)
    if kind is float and type(value) is int:  # YAML writes 10000.0 and 10000 alike
        return float(value)
    if type(value) is not kind:
        raise CheckpointError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return value


def check_size(name: str, value: int | float) -> None:
    if not is_positive(value):
        raise CheckpointError(f"{name} is {value!r}; it must be positive")
    if type(value) is int and value > LARGEST:
        raise CheckpointError(f"{name} is {value}; no model is that large")


def is_positive(value: int | float) -> bool:
    return value > 0 and math.isfinite(value)
