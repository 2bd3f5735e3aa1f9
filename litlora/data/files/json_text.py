"""JSON as a stream: a list of records, or one record a line. Torch-free."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from litlora.data.conversation import Place
from litlora.errors import DataError

Entry = tuple[Place, Any]
"""Where a record stands, and the record as its file has it."""

LINES = (".jsonl", ".ndjson")
"""How names of files end that have one record a line."""
MAX_RECORD = 64 * 2**20
"""Characters of the longest record."""
CHUNK = 2**20
"""Characters that are read at a time."""
WHITE = re.compile(r"[ \t\n\r]*")


class Repeated(dict):
    """A JSON object that has a key twice."""

    key: str


def json_entries(file: Path, stream: BinaryIO, *, has_lines: bool) -> Iterator[Entry]:
    """The records in a stream of UTF-8 text. `has_lines`: the file's name says that it has one
    record a line; otherwise the content decides. A list is never a record, so a list is read as one
    whatever the name says."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        blank, first = 0, ""
        while not first and (piece := text.readline(CHUNK)):
            first = piece if piece.strip() else ""
            blank += not first and piece.endswith("\n")
        if first.lstrip().startswith("["):
            yield from _elements(file, _Window(text, first, blank + 1))
            return
        if first and not first.endswith("\n"):
            first += text.readline(MAX_RECORD)
        lines = _Lines(file, text, blank, first)
        yield from lines.entries() if has_lines else _lines_or_else(lines)


def _lines_or_else(lines: "_Lines") -> Iterator[Entry]:
    """The lines, if the first is an object and others follow. Raises DataError for any other
    content."""
    file, first = lines.file, lines.ahead
    try:
        is_record = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_record = False
    rest = lines.following() if is_record else ""
    if rest:
        yield from lines.entries()
        return
    text = "\n" * lines.number + first + lines.text.read(MAX_RECORD + 1)
    if len(text) > MAX_RECORD:
        raise DataError(f"{file}: must hold a JSON list of records, or one record a line; it holds neither")
    value = _parse(text, str(file))
    raise DataError(
        f"{file}: must hold a JSON list of records, or one record a line; "
        f"it is one {'object' if isinstance(value, dict) else type(value).__name__}"
    )


class _Lines:
    """Lines of a text; blank ones are skipped."""

    def __init__(self, file: Path, text: TextIO, number: int, ahead: str) -> None:
        """`ahead` is the line that was read already, `number` how many came before it."""
        self.file, self.text, self.number, self.ahead = file, text, number, ahead
        self._after: list[str] = []

    def following(self) -> str:
        """The first line after the one ahead that is not blank, "" if there is none."""
        while line := self.text.readline(MAX_RECORD + 1):
            self._after.append(line if line.strip() else "\n")
            if line.strip():
                return line
        return ""

    def entries(self) -> Iterator[Entry]:
        for line in self._all():
            self.number += 1
            place = Place(str(self.file), f"line {self.number}")
            if len(line) > MAX_RECORD:
                yield place, _too_long(place)
                while line and not line.endswith("\n"):
                    line = self.text.readline(CHUNK)
                continue
            if not line.strip():
                continue
            try:
                value = _parse(line.removesuffix("\n"), str(place))
            except DataError as error:
                value = error
            yield place, value

    def _all(self) -> Iterator[str]:
        if self.ahead:
            yield self.ahead
        yield from self._after
        while line := self.text.readline(MAX_RECORD + 1):
            yield line


def in_lines(file: Path) -> bool:
    """Whether the file has one record a line, by its name and how it begins: then it can be read
    in pieces, with `line_entries`."""
    if file.suffix.lower() not in LINES or not file.is_file():
        return False
    with file.open("rb") as opened:
        start = opened.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"{")


def line_entries(file: Path, content: bytes, start: int, first: int) -> Iterator[Entry]:
    """The records of a piece of such a file: whole lines, from the byte `start` on; `first` is the
    number of the first of them."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {start + error.start}); save it as UTF-8") from None
    # Not io.StringIO, in which each character takes four bytes.
    encoding = "utf-8-sig" if start == 0 else "utf-8"
    return _Lines(file, io.TextIOWrapper(io.BytesIO(content), encoding), first - 1, "").entries()


class _Window:
    """The part of a long text that is being parsed."""

    def __init__(self, stream: TextIO, text: str, line: int) -> None:
        """`text` was read already; it begins on this line."""
        self._stream, self._text = stream, text
        self._at = 0
        self._line, self._column = line, 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = WHITE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more(CHUNK)

    def skip(self) -> None:
        """Go past this character."""
        self._at += 1

    def value(self, place: Place) -> Any:
        """The JSON value that begins here."""
        size = CHUNK
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end - self._at > MAX_RECORD:
                    raise _too_long(place)
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    self.wrong(place.file, error.msg, error.pos)
            except RecursionError:
                raise DataError(f"{place}: not usable JSON: nested too deeply") from None
            except ValueError as error:  # an integer of thousands of digits
                raise DataError(f"{place}: not usable JSON: {error}") from None
            if len(self._text) - self._at > MAX_RECORD:
                raise _too_long(place)
            self._read_more(size)
            size *= 2  # a long record is parsed again each time

    def wrong(self, file: str, problem: str, at: int | None = None) -> NoReturn:
        """Raise DataError for the text at this position."""
        before = self._text[: self._at if at is None else at]
        line, column = self._position(before)
        where = f"line {line}, column {column + 1}" if line > 1 else f"column {column + 1}"
        raise DataError(f"{file}: not valid JSON: {_problem(problem)} at {where}")

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could make this valid: the longest token but a string is -Infinity."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16

    def _position(self, text: str) -> tuple[int, int]:
        """The line after this text, and the characters before it on this line."""
        lines = text.count("\n")
        column = len(text) - text.rindex("\n") - 1 if lines else self._column + len(text)
        return self._line + lines, column

    def _read_more(self, size: int) -> None:
        self._line, self._column = self._position(self._text[: self._at])
        more = self._stream.read(size)
        self._ended = not more
        self._text, self._at = self._text[self._at :] + more, 0


def _elements(file: Path, window: _Window) -> Iterator[Entry]:
    """The elements of the list that the window begins with."""
    window.peek()
    window.skip()
    number = 0
    if window.peek() != "]":
        while True:
            place = Place(str(file), f"record {number}")
            yield place, window.value(place)
            number += 1
            if window.peek() != ",":
                break
            window.skip()
            window.peek()
    if window.peek() != "]":
        window.wrong(str(file), "Expecting ',' delimiter")
    window.skip()
    if window.peek():
        window.wrong(str(file), "Extra data")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {_problem(error.msg)} at {at}") from None
    except RecursionError:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{place}: not usable JSON: {error}") from None


def _problem(message: str) -> str:
    """What the json module says, of which some ends in "at" already."""
    return message.removesuffix(" at")


def _too_long(place: Place) -> DataError:
    return DataError(
        f"{place}: is longer than {MAX_RECORD:,} characters, the most that a record may have; "
        "divide it, or look for a bracket or a quote that is not closed"
    )


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that keeps in mind when a key comes twice."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    repeated = Repeated(value)
    repeated.key = next(key for key, _ in pairs if key in seen or seen.add(key))
    return repeated


DECODER = json.JSONDecoder(object_pairs_hook=_json_object)
