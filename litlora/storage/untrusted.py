"""Small files from untrusted sources, read within bounds. Torch-free.

A checkpoint often comes from somebody else. This module limits what its JSON and YAML files can do:
how much is read, how deep it is nested, and which numbers and text it holds. Files of tensors are
checked in `litlora/storage/torch_check.py`.
"""

import copy
import errno
import functools
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from litlora.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
"""The index of a model of 100,000 tensors has 10 MB."""
MAX_YAML_BYTES = 256 * 2**10
"""A model_config.yaml has a few thousand; pyyaml reads about 50 KB a second."""
KNOWN_YAML = 16 * 2**10
"""Characters that a YAML text may have at most to be remembered with its values."""
MAX_DEPTH = 32
"""Levels of nested values."""
MAX_NUMBER = 10**300
"""Of whole numbers: a float can hold it. Python's whole numbers may have millions of digits, and
printing them fails."""
HUB_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Names of the files in the hub's cache that the links in its model folders point to."""


def require_file(path: Path) -> None:
    """Raise OSError for a pipe, a device or a socket: reading it could wait for ever, or never end.

    A pipe that the command line itself opened, as `<(...)` in a shell or stdin, has a writer.
    """
    mode = path.stat().st_mode
    opened = stat.S_ISFIFO(mode) and str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or opened):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, not a file", str(path))


def has_file(path: Path) -> bool:
    """Whether there is a file of that name, which may be left out. Raises CheckpointError for anything
    else under it: a directory, a pipe, a device, a link that leads nowhere."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which is not there; remove it, or put the file "
                "there"
            ) from None
        return False
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise CheckpointError(f"{path}: cannot be read: it is {what}, not a file; remove it")
    return True


def read_text(path: Path, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The text of a file. Raises FileNotFoundError for a missing file, and CheckpointError for one
    that is too large or is not text."""
    try:
        require_file(path)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise CheckpointError(
                f"{path}: has more than {max_bytes:,} bytes; a model's file of this kind is smaller"
            )
        return data.decode("utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read as text: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileNotFoundError for a missing file, and CheckpointError for
    one that cannot be used."""
    text = read_text(path)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None


def parse_json(text: str) -> Any:
    """The plain values of a JSON text. Raises ValueError or RecursionError."""
    return _plain(json.loads(text))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, without tags and aliases. Raises what `read_json`
    raises."""
    text = read_text(path, MAX_YAML_BYTES)
    try:
        return copy.deepcopy(_known_yaml(text)) if len(text) <= KNOWN_YAML else _parse_yaml(text)
    except YAML_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: cannot be read as YAML: {reason}") from None


YAML_ERRORS = (
    *(yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)
"""pyyaml raises any of these for dates, numbers and merges that it cannot interpret."""


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases: a few hundred bytes of them can stand for billions of values."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it uses the alias *{self.peek_event().anchor}; aliases are not supported")
        self.level += 1
        if self.level > MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


def _parse_yaml(text: str) -> Any:
    return _plain(yaml.load(text, _PlainLoader))


_known_yaml = functools.lru_cache(maxsize=64)(_parse_yaml)
"""A command reads the same few files several times, to find out what a directory is, to open it and
to compare it, and pyyaml is slow."""


def _plain(value: Any) -> Any:
    """The value, if a message can show it and a file can hold it.

    Raises ValueError for deep nesting, huge numbers and lone surrogates.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, str) and not entry.isascii():
                # A lone surrogate, as "\\ud800" in JSON, raises UnicodeEncodeError, a ValueError.
                entry.encode()
            elif isinstance(entry, int) and not -MAX_NUMBER < entry < MAX_NUMBER:
                raise ValueError("it holds a number that is too large")
            elif isinstance(entry, dict):
                inner += [*entry.keys(), *entry.values()]
            elif isinstance(entry, list | tuple | set):
                inner += entry
        if not inner:
            return value
        level = inner
    raise ValueError("it is nested too deeply")


def own_file(path: Path) -> Path:
    """The path of a file that is to be copied. Raises CheckpointError if it is a link to anything that
    may not belong to the model: copying that could publish a secret.

    A link may lead to a file in the directory of its own, or into the hub's cache, as the files of a
    downloaded model do. It must then lead to what its name says.
    """
    if not path.is_symlink():
        return path
    target, here = path.resolve(), path.parent.resolve()
    in_cache = target.parent.name == "blobs" and HUB_BLOB.fullmatch(target.name)
    in_cache = in_cache and (target.parent.parent / "snapshots").is_dir()
    if not target.is_relative_to(here) and not in_cache:
        raise CheckpointError(
            f"{path}: is a link to {target}, which is outside its own directory and may not belong to the "
            "model; replace the link by the file"
        )
    # The tokenizer is larger than other files, and is read in full by whoever loads it.
    if path.suffix == ".json" and path.name != "tokenizer.json":
        read_json_object(path)
    elif path.suffix in (".yaml", ".jinja", ".txt"):
        read_text(path)
    return path


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
