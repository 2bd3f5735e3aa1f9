"""Files of records: which files a path means, and the records in them. Torch-free.

- `find.py` finds the files: one, a folder's, those of a pattern, a saved data set's;
- `hub.py` fetches those of a data set on the Hugging Face Hub;
- `kinds.py` says what a file is, by its content and its name;
- `json_text.py` reads JSON, `tables.py` CSV, Parquet and Arrow: all as streams;
- `other_files.py` refuses what is not read.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from litlora.data.files.find import Found, find_files
from litlora.data.files.json_text import (
    LINES,
    MAX_RECORD,
    Entry,
    Repeated,
    in_lines,
    json_entries,
    line_entries,
)
from litlora.data.files.kinds import Kind, kind_of
from litlora.data.files.tables import arrow_entries, csv_entries, parquet_bytes, parquet_entries
from litlora.data.files.unpacked import unpacked
from litlora.data.skipped import reading_files
from litlora.errors import DataError
from litlora.storage.untrusted import require_file


def entries(file: Path, ignore: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The records of a file, in order; memory does not grow with the file. A table leaves out the
    columns in `ignore`.

    Raises DataError, with the place, where the file is broken; the record of a line of JSON that is
    broken by itself is that error, which `RecordReader.read` raises or skips.
    """
    try:
        require_file(file)
        kind = kind_of(file)
        if kind.name == "parquet":
            yield from parquet_entries(file, ignore)
        elif kind.name == "arrow":
            yield from arrow_entries(file, ignore)
        else:
            with unpacked(file, kind.compression) as stream:
                if kind.name == "json":
                    has_lines = kind.suffix in LINES
                    yield from json_entries(file, stream, has_lines=has_lines)
                else:
                    yield from csv_entries(file, stream, "\t" if kind.name == "tsv" else ",", ignore)
    except UnicodeDecodeError:
        raise DataError(f"{file}: {_not_utf8(file, kind)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be unpacked, it may be incomplete: {error}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def entries_of(files: Iterable[Path], on_bad: str, ignore: tuple[str, ...] = ()) -> Iterator[Entry]:
    """The records of several files, as `entries` gives them; `on_bad` as for RecordReader."""
    with reading_files(on_bad):
        for file in files:
            yield from entries(file, ignore)


def bytes_in_memory(file: Path, most: int) -> int:
    """About how much text a file holds, counted up to `most`: packed files and Parquet hold more
    than they are long, by any factor."""
    kind, size = kind_of(file), file.stat().st_size
    if size > most:
        return size
    if kind.name == "parquet":
        return max(4 * size, parquet_bytes(file))
    if kind.compression is None:
        return size
    size = 0
    with suppress(DataError, OSError, EOFError, zlib.error), unpacked(file, kind.compression) as stream:
        while size <= most and (more := stream.read(2**20)):  # reading says what is wrong
            size += len(more)
    return size


def _not_utf8(file: Path, kind: Kind) -> str:
    """What is wrong with a text that is not UTF-8: the first byte that is not, where the file can be
    read again."""
    with unpacked(file, kind.compression) as stream:
        if not file.is_file():
            return "is not UTF-8 text"
        done = 0
        rest = b""
        while chunk := stream.read(2**20):
            try:
                (rest + chunk).decode()
                done, rest = done + len(rest) + len(chunk), b""
            except UnicodeDecodeError as error:
                text = rest + chunk
                if len(text) - error.start >= 4:  # else a character may go on in the next chunk
                    return f"is not UTF-8 text (byte {done + error.start}); save it as UTF-8"
                done, rest = done + error.start, text[error.start :]
    return f"is not UTF-8 text (byte {done}); save it as UTF-8"


__all__ = [
    "MAX_RECORD",
    "Entry",
    "Found",
    "Repeated",
    "bytes_in_memory",
    "entries",
    "entries_of",
    "find_files",
    "in_lines",
    "line_entries",
]
