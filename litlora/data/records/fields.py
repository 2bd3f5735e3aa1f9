"""The fields of a record: checked, and the messages about them. Torch-free."""

import json
import re
from typing import Any

from litlora.data.conversation import Place
from litlora.data.files import Repeated
from litlora.errors import DataError, setting


def record_fields(value: Any, place: Place, required: tuple[str, ...]) -> dict[str, Any]:
    """A record, which must be an object with these fields."""
    if not isinstance(value, dict):
        needed = " and ".join(required)
        raise DataError(f"{place}: must be an object with {needed}, not {type(value).__name__}")
    if isinstance(value, Repeated):
        raise DataError(f"{place}: has {quoted(value.key)} twice; keep one of them")
    for name in required:
        if name not in value:
            has = some(list(map(repr, value))) or "nothing"
            raise DataError(f'{place}: has no "{name}"; it has {has}')
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


def unknown_fields(unknown: dict[str, Place], known: tuple[str, ...]) -> str:
    """The message about fields that nothing would use, with the first place of each."""
    names = list(unknown)
    place = unknown[names[0]]
    one = len(names) == 1
    plain = [name if _is_plain(name) else json.dumps(name) for name in names]
    listed = f"[{', '.join(plain)}]" if len(names) <= 6 else "[NAME, ...]"
    return (
        f"{place}: has {'a field' if one else 'fields'} that training would not use: "
        f"{some([quoted(name) for name in names])}; used are {', '.join(known)}; "
        f"if {'it is' if one else 'they are'} not needed: {setting('ignore')} '{listed}'"
    )


def _is_plain(name: str) -> bool:
    """Whether YAML reads the bare name as text."""
    words = ("yes", "no", "on", "off", "y", "n", "true", "false", "null")
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None and name.lower() not in words


def quoted(name: str) -> str:
    """A field's name for a message."""
    return json.dumps(name, ensure_ascii=False)


def some(names: list[str]) -> str:
    """Six names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
