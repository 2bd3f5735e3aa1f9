"""Files of records: which files a path means, and the records in them. Torch-free.

A file holds a JSON list of records, or one record a line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litlora.data.conversation import Place
from litlora.data.other_files import refuse_other_files
from litlora.errors import DataError, setting
from litlora.storage.untrusted import require_file

Entry = tuple[Place, Any]
"""Where a record stands, and the record as its file has it."""


class Repeated(dict):
    """A JSON object that has a key twice."""

    key: str


def data_files(path: Path) -> list[Path]:
    """The files of records that a path means: itself, or those in a directory. Raises DataError if
    there are none."""
    refuse_other_files(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if not path.is_dir():
        if _is_apple_double(path):
            raise DataError(
                f"{path}: holds what macOS stores about a file, not records; "
                f"{setting('path')} {path.with_name(path.name[2:])} is the file itself"
            )
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in (".json", ".jsonl")]
    files = [file for file in files if not _is_apple_double(file)]
    if not files:
        raise DataError(f"{path}: holds no .json or .jsonl file")
    return files


def entries(file: Path) -> Iterator[Entry]:
    """The records of a file, in order. Raises DataError, with the place, where it is broken."""
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


def in_lines(file: Path) -> bool:
    """Whether the file has one record a line, by its name and how it begins: then it can be read
    in pieces, with `line_entries`."""
    if file.suffix.lower() != ".jsonl" or not file.is_file():
        return False
    with file.open("rb") as opened:
        start = opened.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return bool(start) and not start.startswith(b"[")


def line_entries(file: Path, content: bytes, start: int, first: int) -> Iterator[Entry]:
    """The records of a piece of such a file: whole lines, from the byte `start` on; `first` is the
    number of the first of them."""
    try:
        text = content.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {start + error.start})") from None
    return _lines(file, text.replace("\r\n", "\n").replace("\r", "\n"), first)


def _lines(file: Path, text: str, first: int = 1) -> Iterator[tuple[Place, Any]]:
    # not splitlines(): U+2028 may stand inside a string
    for number, line in enumerate(text.split("\n"), start=first):
        if line.strip():
            place = Place(str(file), f"line {number}")
            yield place, _parse(line, str(place))


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg} at {at}") from None
    except RecursionError:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{place}: not usable JSON: {error}") from None


def _is_apple_double(file: Path) -> bool:
    """Whether this is `._NAME`, which macOS writes beside NAME on disks of other systems: the
    Finder's notes, none of the content."""
    if not file.name.startswith("._") or not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"\x00\x05\x16\x07"


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that keeps in mind when a key comes twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    repeated = Repeated(value)
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))
    return repeated
