"""Data sources to conversations. Torch-free.

To add a source, give it a settings dataclass in `litlora/settings` and a reader in READERS below: a
function from these settings to a `Dataset`.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.data.dataset import Dataset, Mixture, Records, settled
from litlora.data.files import find_files
from litlora.data.records import RecordReader
from litlora.errors import DataError, setting
from litlora.settings import JSON, Alpaca, DataSource, Files, Mix

SAMPLE_FILE = Path(__file__).with_name("alpaca_sample.json")
TIMEOUT = 30
"""Seconds without an answer after which a download is given up."""


def read_dataset(source: DataSource) -> Dataset:
    """Everything that a source holds. Raises DataError, naming the file and the record, for
    anything that cannot be trained on; of a stream, when it is read."""
    found = READERS[type(source)](source)
    validation = None
    if source.val_path is not None:
        own = READERS[Files](source.of_files(source.val_path))
        validation = own.conversations
        found = replace(found, notices=(*found.notices, *own.notices))
    return settled(found, validation)


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
    return _read_files([file], replace(source, source="full"))


def _sample(source: Alpaca, notice: str) -> Dataset:
    return replace(_read_files([SAMPLE_FILE], replace(source, source="sample")), notice=notice)


def _read_paths(source: Files) -> Dataset:
    found = find_files(source.path)
    return replace(_read_files(found.files, source), notices=found.notices)


def _read_mix(source: Mix) -> Dataset:
    found = [READERS[type(part)](part) for part in source.parts()]
    records = tuple(records for part in found for records in part.conversations.parts)
    return Dataset(
        Mixture(records),
        source,
        notice="; ".join(part.notice for part in found if part.notice) or None,
        notices=tuple(notice for part in found for notice in part.notices),
    )


READERS: dict[type[DataSource], Callable[[Any], Dataset]] = {
    Alpaca: _read_alpaca,
    Files: _read_paths,
    JSON: _read_paths,
    Mix: _read_mix,
}
"""Each gives a Dataset of `Records`, which are not read yet."""


def _read_files(files: Sequence[Path], source: DataSource) -> Dataset:
    return Dataset(Records(tuple(files), RecordReader("alpaca", source.ignore)), source)


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
