"""The fields of a record: checked, and the messages about them. Torch-free."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from litlora.data.conversation import Place
from litlora.data.files import Repeated
from litlora.errors import DataError, setting

THOUGHTS = ("reasoning_content", "thinking")
MESSAGE_FIELDS = (
    *("role", "content", "name", "tool_calls", "function_call", "tool_call_id"),
    *(*THOUGHTS, "train", "weight"),
)
"""All that is used of a message, by OpenAI's names. No form has a field of its own by one of them."""


class Unused(NamedTuple):
    """A field that nothing would use."""

    place: Place
    used: tuple[str, ...]
    """The fields that are used there."""


@dataclass
class Record:
    """The fields of a record by the names that its form has for them, without those to ignore."""

    fields: dict[str, Any]
    place: Place
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the file calls a field of the form, or of its messages, where that is another name."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Which role those have who speak in messages, where their names are not known."""
    ignore: tuple[str, ...] = ()
    """Fields to leave out; those of messages as "messages.id"."""
    unused: dict[str, Unused] = field(default_factory=dict)
    """Fields that nothing would use, by the name that `ignore` takes."""

    def named(self, name: str) -> str:
        """What the file calls a field."""
        return self.columns.get(name, name)

    def text(self, name: str, optional: bool = False) -> str:
        """A field that must be text; one that may be missing or null is then empty."""
        value = self.fields.get(name)
        return "" if optional and value is None else text(value, quoted(self.named(name)), self.place)

    def used(self, fields: Mapping[str, Any], known: tuple[str, ...], path: str = "") -> dict[str, Any]:
        """These fields without those that are null, which says nothing, and, below the record
        itself, without those to ignore. `path` is where they stand in the record. What is not known
        is noted as unused."""
        prefix = f"{path}." if path else ""
        kept = {}
        for name, value in fields.items():
            if value is None or (prefix and self.ignore and prefix + name in self.ignore):
                continue
            if name in known:
                kept[name] = value
            else:
                self.unused.setdefault(prefix + name, Unused(self.place, known))
        return kept

    def wrong(self, problem: str) -> NoReturn:
        """Raise DataError for this record."""
        raise DataError(f"{self.place}: {problem}")


def read_record(
    value: Any,
    place: Place,
    columns: Mapping[str, str],
    ignore: tuple[str, ...],
    needed: Collection[str],
    roles: Mapping[str, str] | None = None,
) -> Record:
    """What a file holds as a record, which must be an object. `needed` are the form's fields that
    the message names."""
    if isinstance(value, DataError):  # a line that is not JSON
        raise value
    if not isinstance(value, dict):
        needs = f"an object with {' and '.join(needed)}" if needed else "an object of fields"
        raise DataError(f"{place}: must be {needs}, not {type(value).__name__}")
    mapping(value, "", place)
    fields = {name: content for name, content in value.items() if name not in ignore}
    shadowed: dict[str, Any] = {}
    if ours := {theirs: name for name, theirs in columns.items() if name not in MESSAGE_FIELDS}:
        renamed = set(ours.values()) - ours.keys()
        shadowed = {name: content for name, content in fields.items() if name in renamed}
        fields = {ours.get(name, name): fields[name] for name in fields if name not in shadowed}
    record = Record(fields, place, columns, roles or {}, ignore)
    record.used(shadowed, tuple(ours))
    return record


def mapping(value: Any, name: str, place: Place) -> dict[str, Any]:
    """A value that must be an object, with no key twice; `name` is what messages call it."""
    of = f"{name} " if name else ""
    if not isinstance(value, dict):
        raise DataError(f"{place}: {of}must be an object, not {type(value).__name__}")
    if isinstance(value, Repeated):
        raise DataError(f"{place}: {of}has {quoted(value.key)} twice; keep one of them")
    return value


def text(value: Any, name: str, place: Place) -> str:
    """A value that must be text; `name` is what messages call it."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: {name} holds half a character (a lone surrogate, \\ud800 to \\udfff)"
        ) from None
    return value


def parsed(value: str, name: str, place: Place) -> Any:
    """JSON that stands in a text, with no key twice. NaN and Infinity are not JSON."""
    try:
        return json.loads(
            text(value, name, place), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise DataError(f"{place}: {name} must be JSON, and is not: {reason}") from None


def plain(value: Any, name: str, place: Place) -> Any:
    """Any JSON value, whose texts and keys must be whole characters and whose objects have no key
    twice. NaN and Infinity are not JSON."""
    if isinstance(value, dict):
        mapping(value, name, place)
        for key, content in value.items():
            text(key, f"a key of {name}", place)
            plain(content, f"{name}.{key}", place)
    elif isinstance(value, list):
        for number, content in enumerate(value):
            plain(content, f"{name}[{number}]", place)
    elif isinstance(value, str):
        text(value, name, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: {name} is {value}, which JSON has no number for")
    return value


def unknown_fields(unknown: Mapping[str, Unused]) -> str:
    """The message about fields that nothing would use, with the first place of each."""
    names = list(unknown)
    place, known = unknown[names[0]]
    one = len(names) == 1
    shown = f"[{', '.join(map(_yaml_name, names))}]" if len(names) <= 6 else "[NAME, ...]"
    return (
        f"{place}: has {'a field' if one else 'fields'} that training would not use: "
        f"{some([quoted(name) for name in names])}; used are {', '.join(known)}; "
        f"if {'it is' if one else 'they are'} not needed: {setting('ignore')} '{shown}'"
    )


def in_yaml(names: Mapping[str, str]) -> str:
    """A mapping of names, as a command line takes it."""
    return f"{{{', '.join(f'{_yaml_name(name)}: {_yaml_name(other)}' for name, other in names.items())}}}"


def _yaml_name(name: str) -> str:
    """A name as YAML reads it as text: bare, if that is text."""
    words = ("yes", "no", "on", "off", "y", "n", "true", "false", "null")
    is_plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name) is not None and name.lower() not in words
    return name if is_plain else json.dumps(name)


def quoted(name: Any) -> str:
    """A field's name, or a value, for a message."""
    return json.dumps(name, ensure_ascii=False)


def some(names: list[str]) -> str:
    """Six names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it has {quoted(key)} twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}")
