"""Data sources to conversations. Torch-free.

To add a source, give it a settings dataclass in `litlora/settings` and a reader in READERS below: a
function from these settings to a `Dataset`.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.other_files import refuse_other_files
from litlora.errors import DataError, setting
from litlora.settings import JSON, Alpaca, DataSource

SAMPLE_FILE = Path(__file__).with_name("alpaca_sample.json")
TIMEOUT = 30
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True)
class Dataset:
    """What a source holds, and the source as it was resolved."""

    conversations: list[Conversation]
    source: DataSource
    notice: str | None = None
    """What the user must know about where the conversations come from."""


def read_dataset(source: DataSource) -> Dataset:
    """Everything that a source holds. Raises DataError, naming the file and the record, for
    anything that cannot be trained on."""
    if isinstance(source, JSON):
        refuse_other_files(Path(source.path))
    found = READERS[type(source)](source)
    if not found.conversations:
        name = getattr(source, "path", source.name)
        raise DataError(f"{name}: holds no records; there is nothing to train on")
    return found


def _read_alpaca(source: Alpaca) -> Dataset:
    file = Path(source.download_dir) / "alpaca_data.json"
    if source.source == "sample":
        return _sample(source, "the built-in sample")
    if not file.is_file():
        try:
            _download(source.url, file)
        except OSError as error:
            reason = f"{source.url} could not be downloaded ({_reason(error)})"
            if source.source == "full":
                raise DataError(
                    f"{reason}; put the file at {file}, or train on the built-in sample with "
                    f"{setting('source')} sample"
                ) from None
            return _sample(source, f"the built-in sample, not the full Alpaca data: {reason}")
    return Dataset(_read_file(file), replace(source, source="full"))


def _sample(source: Alpaca, notice: str) -> Dataset:
    return Dataset(_read_file(SAMPLE_FILE), replace(source, source="sample"), notice)


def _read_json(source: JSON) -> Dataset:
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no .json or .jsonl file")
    return Dataset([record for file in files for record in _read_file(file)], source)


READERS: dict[type[DataSource], Callable[[Any], Dataset]] = {Alpaca: _read_alpaca, JSON: _read_json}


def _read_file(file: Path) -> list[Conversation]:
    """The records of one .json file (a list of objects) or .jsonl file (one object a line)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    entries = _lines(file, text) if file.suffix == ".jsonl" else _elements(file, text)
    return [alpaca_conversation(value, place) for place, value in entries]


def _elements(file: Path, text: str) -> Iterator[tuple[Place, Any]]:
    values = _parse(text, str(file))
    if not isinstance(values, list):
        raise DataError(
            f"{file}: must hold a JSON list of records; a file with one record a line needs the suffix .jsonl"
        )
    yield from ((Place(str(file), f"record {index}"), value) for index, value in enumerate(values))


def _lines(file: Path, text: str) -> Iterator[tuple[Place, Any]]:
    # not splitlines(): U+2028 may stand inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = Place(str(file), f"line {number}")
            yield place, _parse(line, str(place))


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg} at {at}") from None
    except RecursionError:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{place}: not usable JSON: {error}") from None


def alpaca_conversation(value: Any, place: Place) -> Conversation:
    """A record of `instruction`, `input` (optional) and `output` as a conversation of two messages,
    the second one learned."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: must be an object with instruction and output, not {type(value).__name__}")
    fields = {}
    for name in ("instruction", "input", "output"):
        text = value.get(name)
        if text is None and name == "input":
            text = ""
        if name not in value and name != "input":
            raise DataError(f'{place}: has no "{name}"; it has {", ".join(map(repr, value)) or "nothing"}')
        if not isinstance(text, str):
            raise DataError(f'{place}: "{name}" must be text, not {type(text).__name__}')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f'{place}: "{name}" holds half a character (a lone surrogate, \\ud800 to \\udfff)'
            ) from None
        fields[name] = text
    question = Message("user", fields["instruction"], input=fields["input"])
    return Conversation((question, Message("assistant", fields["output"], train=True)), place)


def _download(url: str, file: Path) -> None:
    """Fetch a JSON list into `file`, which appears complete or not at all. Raises OSError."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
        if not isinstance(json.loads(content), list):
            raise OSError("the answer is not a JSON list")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, file)
    except ValueError as error:  # a malformed address, or an answer that is not JSON
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(getattr(cause, "strerror", None) or cause)
