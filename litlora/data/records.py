"""Records of `instruction`, `input` (optional) and `output`, read from the data sources.
Torch-free.

To add a source: give it a settings dataclass in `litlora/settings.py` and a reader in READERS
below.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litlora.errors import DataError
from litlora.settings import JSON, Alpaca, DataSource

SAMPLE_FILE = Path(__file__).with_name("alpaca_sample.json")
TIMEOUT = 30
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True)
class Record:
    """One example as a person writes it."""

    instruction: str
    input: str
    output: str
    place: str
    """Where it was read, for messages: file and index or line."""


@dataclass(frozen=True)
class Records:
    """What a source gave, and the source as it was resolved."""

    records: list[Record]
    source: DataSource
    notice: str | None = None
    """What the user must know about where the records came from."""


def read_records(source: DataSource) -> Records:
    """All records of a source. Raises DataError, naming file and record, for anything that is not
    usable."""
    found = READERS[type(source)](source)
    if not found.records:
        raise DataError(
            f"{getattr(source, 'path', source.name)}: holds no record; there is nothing to train on"
        )
    return found


def _read_alpaca(source: Alpaca) -> Records:
    file = Path(source.download_dir) / "alpaca_data.json"
    if source.source == "sample":
        return _sample(source, "the built-in sample")
    if not file.is_file():
        try:
            _download(source.url, file)
        except OSError as error:
            reason = f"{source.url} could not be downloaded ({_reason(error)})"
            if source.source == "full":
                raise DataError(f"{reason}; put the file at {file}, or use --data.source sample") from None
            return _sample(source, f"the built-in sample, not the full Alpaca data: {reason}")
    return Records(_read_file(file), replace(source, source="full"))


def _sample(source: Alpaca, notice: str) -> Records:
    return Records(_read_file(SAMPLE_FILE), replace(source, source="sample"), notice)


def _read_json(source: JSON) -> Records:
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no .json or .jsonl file")
    return Records([record for file in files for record in _read_file(file)], source)


READERS: dict[type[DataSource], Callable[[Any], Records]] = {Alpaca: _read_alpaca, JSON: _read_json}


def _read_file(file: Path) -> list[Record]:
    """The records of one .json file (a list of objects) or .jsonl file (an object a line)."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return [
        _record(value, place)
        for place, value in (_lines(file, text) if file.suffix == ".jsonl" else _elements(file, text))
    ]


def _elements(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    values = _parse(text, str(file))
    if not isinstance(values, list):
        raise DataError(f"{file}: must hold a JSON list of records; for one record a line, name it .jsonl")
    yield from ((f"{file}, record {index}", value) for index, value in enumerate(values))


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # not splitlines(): U+2028 may stand inside a string
        if line.strip():
            yield f"{file}, line {number}", _parse(line, f"{file}, line {number}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg} at {at}") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{place}: not usable JSON: {error}") from None


def _record(value: Any, place: str) -> Record:
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
    return Record(**fields, place=place)


def _download(url: str, file: Path) -> None:
    """Fetch a JSON list into `file`, which appears complete or not at all. Raises OSError."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
        if not isinstance(json.loads(content), list):
            raise OSError("the answer is no JSON list")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, file)
    except ValueError as error:  # a malformed address, or an answer that is no JSON
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return (
        f"HTTP status {error.code}"
        if isinstance(error, urllib.error.HTTPError)
        else str(getattr(cause, "strerror", None) or cause)
    )
