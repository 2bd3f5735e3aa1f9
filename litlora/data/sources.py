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

from litlora.data.conversation import Conversation
from litlora.data.files import Entry, data_files, entries, in_lines
from litlora.data.records import RecordReader
from litlora.errors import DataError, setting
from litlora.settings import JSON, Alpaca, DataSource

SAMPLE_FILE = Path(__file__).with_name("alpaca_sample.json")
LARGE = 16 * 2**20
"""Bytes of files above which their records stay on the disk: see `data/cache.py`."""
TIMEOUT = 30
"""Seconds without an answer after which a download is given up."""


@dataclass(frozen=True)
class Records:
    """The records of some files. Each iteration reads them anew, as conversations."""

    files: tuple[Path, ...]
    reader: RecordReader

    def entries(self) -> Iterator[Entry]:
        """The records as the files have them."""
        for file in self.files:
            yield from entries(file)

    @property
    def parts(self) -> tuple["Records", ...]:
        """The records of each source, with a reader of their own."""
        return (self,)

    def in_lines(self) -> bool:
        """Whether every file has one record a line, so that they can be read in pieces."""
        return all(map(in_lines, self.files))

    def __iter__(self) -> Iterator[Conversation]:
        return self.reader.read(self.entries())


@dataclass(frozen=True)
class Dataset:
    """What a source holds, and the source as it was resolved."""

    conversations: list[Conversation] | Records
    """In memory, or large data as it stands in its files: it is never in memory as a whole."""
    source: DataSource
    notice: str | None = None
    """What the user must know about where the conversations come from."""
    validation: list[Conversation] | Records | None = None
    """Of the source's own, instead of some of the conversations."""


def read_dataset(source: DataSource) -> Dataset:
    """Everything that a source holds. Raises DataError, naming the file and the record, for
    anything that cannot be trained on."""
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
    return Dataset(_read_files(data_files(Path(source.path)), source), source)


READERS: dict[type[DataSource], Callable[[Any], Dataset]] = {Alpaca: _read_alpaca, JSON: _read_json}


def _read_files(files: list[Path], source: DataSource) -> list[Conversation] | Records:
    records = Records(tuple(files), RecordReader("alpaca", source.ignore))
    size = sum(file.stat().st_size for file in files if file.is_file())
    return records if source.cache and size > LARGE else list(records)


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
