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

from litlora.data.alpaca import alpaca_conversations, json_object
from litlora.data.conversation import Conversation, Place
from litlora.data.other_files import refuse_other_files
from litlora.errors import DataError, setting
from litlora.settings import JSON, Alpaca, DataSource
from litlora.storage.untrusted import require_file

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
    return Dataset(_read_files([file], source), replace(source, source="full"))


def _sample(source: Alpaca, notice: str) -> Dataset:
    return Dataset(_read_files([SAMPLE_FILE], source), replace(source, source="sample"), notice)


def _read_json(source: JSON) -> Dataset:
    path = Path(source.path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if not path.is_dir():
        if _is_apple_double(path):
            raise DataError(
                f"{path}: holds what macOS stores about a file, not records; "
                f"{setting('path')} {path.with_name(path.name[2:])} is the file itself"
            )
        return Dataset(_read_files([path], source), source)
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".json", ".jsonl")]
    files = [file for file in files if not _is_apple_double(file)]
    if not files:
        raise DataError(f"{path}: holds no .json or .jsonl file")
    return Dataset(_read_files(files, source), source)


READERS: dict[type[DataSource], Callable[[Any], Dataset]] = {Alpaca: _read_alpaca, JSON: _read_json}


def _read_files(files: list[Path], source: DataSource) -> list[Conversation]:
    """The records of files: of each a JSON list of objects, or one object a line."""
    entries = (entry for file in files for entry in _entries(file))
    return list(alpaca_conversations(entries, source.ignore))


def _is_apple_double(file: Path) -> bool:
    """Whether this is `._NAME`, which macOS writes beside NAME on disks of other systems: the
    Finder's notes, none of the content."""
    if not file.name.startswith("._") or not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"\x00\x05\x16\x07"


def _entries(file: Path) -> Iterator[tuple[Place, Any]]:
    try:
        require_file(file)
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    # A list is never a record, so the content decides, whatever the name ends in.
    is_list = text.lstrip()[:1] == "["
    has_lines = file.suffix.lower() == ".jsonl" or _begins_with_a_record(text)
    return _lines(file, text) if has_lines and not is_list else _elements(file, text)


def _begins_with_a_record(text: str) -> bool:
    """Whether the first line is a JSON object, and others follow."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _elements(file: Path, text: str) -> Iterator[tuple[Place, Any]]:
    values = _parse(text, str(file))
    if not isinstance(values, list):
        raise DataError(
            f"{file}: must hold a JSON list of records, or one record a line; "
            f"it is one {'object' if isinstance(values, dict) else type(values).__name__}"
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
        return json.loads(text, object_pairs_hook=json_object)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg} at {at}") from None
    except RecursionError:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{place}: not usable JSON: {error}") from None


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
