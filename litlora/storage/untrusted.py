"""Small files that anybody may have written: read within bounds, checked to be plain values, and
shown without harm. Torch-free.

A checkpoint is often somebody else's. What its JSON and YAML files can do is limited here, in one
place: how much is read, how deep it is nested, which numbers and which text it holds. Tensors'
files have their own guard, `litlora/storage/torch_check.py`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from litlora.errors import CheckpointError

LARGEST_JSON = 16 * 2**20
"""Bytes; the index of a model of 100,000 tensors has 10 MB."""
LARGEST_YAML = 256 * 2**10
"""Bytes; a model_config.yaml has some thousand, and pyyaml reads some 50 KB a second."""
DEEPEST = 32
"""Levels of nested values."""
LARGEST_NUMBER = 10**300
"""Of whole numbers: a float can hold it. Python's may have millions of digits, which cannot be
printed."""
HUB_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""What the hub's cache calls the files that the links in its model folders lead to."""


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """The text of a file. Raises FileNotFoundError, and CheckpointError for one that is too large
    or cannot be read as text."""
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise CheckpointError(
                f"{path}: has more than {largest:,} bytes; no such file of a model is that large"
            )
        return data.decode("utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read as text: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileNotFoundError, and CheckpointError for all else that is
    wrong."""
    text = read_text(path)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None


def parse_json(text: str) -> Any:
    """What JSON says, plain values. Raises ValueError or RecursionError."""
    return _plain(json.loads(text))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, without tags and aliases. Raises FileNotFoundError, and
    CheckpointError likewise."""
    text = read_text(path, LARGEST_YAML)
    try:
        return _plain(yaml.load(text, _PlainLoader))
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # pyyaml meets dates, numbers and merges that it cannot make sense of with whatever Python
        # raises
        raise CheckpointError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())[:300]}"
        ) from None


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: some hundred bytes of them can stand for billions of values."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it uses the alias *{self.peek_event().anchor}, which is not read")
        self.level += 1
        if self.level > DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _plain(value: Any) -> Any:
    """The value, if a message can show it and a file can hold it. Raises ValueError for depth, huge
    numbers and half characters."""
    level = [value]
    for _ in range(DEEPEST):
        for entry in level:
            if isinstance(entry, str) and not entry.isascii():
                entry.encode()  # a lone surrogate, as "\\ud800" in JSON, raises UnicodeEncodeError, a ValueError
            if isinstance(entry, int) and not -LARGEST_NUMBER < entry < LARGEST_NUMBER:
                raise ValueError("it holds a number that is too large")
        inner: list[Any] = []
        for entry in level:
            inner += (
                [*entry.keys(), *entry.values()]
                if isinstance(entry, dict)
                else entry
                if isinstance(entry, list | tuple | set)
                else []
            )
        if not inner:
            return value
        level = inner
    raise ValueError("it is nested too deeply")


def own_file(path: Path) -> Path:
    """The path, unless it is a link to something of another name: copied on, that would give away
    what is none of the model's.

    Links to a file of the same name, as `gpt2_tokenizer.json` is for `tokenizer.json`, are common,
    and so are those of the hub's cache.
    """
    if path.is_symlink():
        target = path.resolve()
        if not target.name.endswith(path.name) and not (
            target.parent.name == "blobs" and HUB_BLOB.fullmatch(target.name)
        ):
            raise CheckpointError(
                f"{path}: is a link to {target}, which has another name; put the file itself there"
            )
    return path


def check_pattern(pattern: Any) -> None:
    """Raise ValueError for a regular expression, of names of layers, that could take for ever:
    Python's have no limit of time."""
    if not isinstance(pattern, str) or len(pattern) > 1000:
        raise ValueError(f"{str(pattern)[:60]!r} is not the name of a layer")
    plain = re.sub(r"\\.|\[[^]]*\]", "x", pattern)  # without what is escaped and sets of characters
    if re.search(r"\)\s*[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > 4:
        raise ValueError(f"the pattern {pattern[:60]!r} repeats more than names of layers need")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern {pattern[:60]!r} is no regular expression ({error})") from None


def read_json_object(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for whatever else the file holds, and for
    one that is not there; `hint` then says what needs it."""
    return _mapping(read_json, path, "a JSON object", hint)


def read_yaml_mapping(path: Path, hint: str = "") -> dict[str, Any]:
    """The mapping in a YAML file. Raises CheckpointError likewise."""
    return _mapping(read_yaml, path, "a mapping of names to values", hint)


def _mapping(read: Callable[[Path], Any], path: Path, what: str, hint: str) -> dict[str, Any]:
    try:
        value = read(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file{hint and f'; {hint}'}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold {what}")
    return value
