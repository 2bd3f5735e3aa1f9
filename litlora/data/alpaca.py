"""Records of Alpaca's form to conversations: instruction, input and output, and LLaMA-Factory's
system and history. Torch-free."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from litlora.data.conversation import Conversation, Message, Place
from litlora.errors import DataError, setting

FIELDS = ("instruction", "input", "output", "system", "history")
REQUIRED = ("instruction", "output")


class Repeated(dict):
    """A JSON object that has a key twice."""

    key: str


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that keeps in mind when a key comes twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    repeated = Repeated(value)
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))
    return repeated


def alpaca_conversations(
    entries: Iterable[tuple[Place, Any]], ignore: Iterable[str] = ()
) -> Iterator[Conversation]:
    """One conversation a record. Raises DataError at the end for fields that are neither known nor
    in `ignore`, all of them together."""
    ignored = frozenset(ignore)
    unknown: dict[str, Place] = {}
    for place, value in entries:
        fields = _fields(value, place, ignored)
        for name, content in fields.items():
            if name not in FIELDS and content is not None:  # null says nothing
                unknown.setdefault(name, place)
        yield _conversation(fields, place)
    if unknown:
        raise DataError(_unknown_fields(unknown))


def _fields(value: Any, place: Place, ignored: frozenset[str]) -> dict[str, Any]:
    """The fields of a record that count."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be an object with instruction and output, not {type(value).__name__}")
    if isinstance(value, Repeated):
        raise DataError(f"{place}: has {_quoted(value.key)} twice; keep one of them")
    for name in REQUIRED:
        if name not in value:
            has = _some(list(map(repr, value))) or "nothing"
            raise DataError(f'{place}: has no "{name}"; it has {has}')
    return {name: content for name, content in value.items() if name not in ignored}


def _conversation(fields: dict[str, Any], place: Place) -> Conversation:
    """System message, earlier turns, and the instruction with its output; every answer is
    learned."""

    def text(name: str) -> str:
        content = fields.get(name)
        return "" if content is None and name not in REQUIRED else _text(content, f'"{name}"', place)

    messages = [Message("system", system)] if (system := text("system")) else []
    for question, answer in _history(fields.get("history"), place):
        messages += [Message("user", question), Message("assistant", answer, train=True)]
    messages.append(Message("user", text("instruction"), input=text("input")))
    messages.append(Message("assistant", text("output"), train=True))
    return Conversation(tuple(messages), place)


def _history(value: Any, place: Place) -> Iterator[tuple[str, str]]:
    """The pairs of an earlier question and its answer."""
    if value is None:
        return
    if not isinstance(value, list):
        raise DataError(
            f'{place}: "history" must be a list of [question, answer] pairs, not {type(value).__name__}'
        )
    for number, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            what = f"a list of {len(pair)}" if isinstance(pair, list) else type(pair).__name__
            raise DataError(
                f'{place}: "history" must be a list of [question, answer] pairs; its entry {number} is {what}'
            )
        question, answer = (_text(part, f'"history", entry {number}', place) for part in pair)
        yield question, answer


def _text(value: Any, name: str, place: Place) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: {name} holds half a character (a lone surrogate, \\ud800 to \\udfff)"
        ) from None
    return value


def _unknown_fields(unknown: dict[str, Place]) -> str:
    names = list(unknown)
    place = unknown[names[0]]
    one = len(names) == 1
    plain = [name if _is_plain(name) else json.dumps(name) for name in names]
    listed = f"[{', '.join(plain)}]" if len(names) <= 6 else "[NAME, ...]"
    return (
        f"{place}: has {'a field' if one else 'fields'} that training would not use: "
        f"{_some([_quoted(name) for name in names])}; used are {', '.join(FIELDS)}; "
        f"if {'it is' if one else 'they are'} not needed: {setting('ignore')} '{listed}'"
    )


def _is_plain(name: str) -> bool:
    """Whether YAML reads the bare name as text."""
    words = ("yes", "no", "on", "off", "y", "n", "true", "false", "null")
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None and name.lower() not in words


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _some(names: list[str]) -> str:
    """Six names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
