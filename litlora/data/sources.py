"""Data sources to conversations. Torch-free.

To add a source, give it a settings dataclass in `litlora/settings` and a reader in READERS below: a
function from these settings to a `Dataset`.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litlora import console
from litlora.data.conversation import Conversation
from litlora.data.downloads import HUB, download, download_all, file_name, needs_login, reason
from litlora.data.files import Entry, data_files, entries
from litlora.data.records import RecordReader, choose_form
from litlora.errors import DataError, setting
from litlora.settings import JSON, Alpaca, DataSource, KnownSet

SAMPLE_FILE = Path(__file__).with_name("alpaca_sample.json")


@dataclass(frozen=True)
class Records:
    """The records of some files. Each iteration reads them anew, as conversations."""

    files: tuple[Path, ...]
    reader: RecordReader

    def entries(self) -> Iterator[Entry]:
        """The records as the files have them."""
        for file in self.files:
            yield from entries(file)

    def __iter__(self) -> Iterator[Conversation]:
        return self.read()

    def read(self, skipped: list[DataError] | None = None) -> Iterator[Conversation]:
        """The conversations; a bad record is raised, or added to `skipped`, as the reader says."""
        return self.reader.read(self.entries(), skipped)


@dataclass(frozen=True)
class Dataset:
    """What a source holds, and the source as it was resolved."""

    conversations: list[Conversation]
    source: DataSource
    notice: str | None = None
    """What the user must know about where the conversations come from."""
    notices: tuple[str, ...] = ()
    """What else is said when training begins: the form of the records, and what was left out."""


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
            _download_list(source.url, file)
        except OSError as error:
            why = f"{source.url} could not be downloaded ({reason(error)})"
            if source.source == "full":
                raise DataError(
                    f"{why}; put the file at {file}, or train on the built-in sample with "
                    f"{setting('source')} sample"
                ) from None
            return _sample(source, f"the built-in sample, not the full Alpaca data: {why}")
    return _read_files([file], replace(source, source="full"), form="alpaca")


def _download_list(url: str, file: Path) -> None:
    """Fetch a JSON list into `file`, which appears complete or not at all. Raises OSError."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        download(url, partial, console.say)
        if not isinstance(json.loads(partial.read_bytes()), list):
            raise OSError("the answer is not a JSON list")
        os.replace(partial, file)
    except ValueError as error:
        raise OSError(str(error)) from None
    finally:
        partial.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _read_known(source: KnownSet) -> Dataset:
    directory = Path(source.data_dir or f"data/{source.name}")
    addresses = source.urls or source.ADDRESSES
    missing = [address for address in addresses if not _found(address, directory)]
    if missing:
        try:
            download_all(missing, directory, console.say)
        except OSError as error:
            raise DataError(_not_downloaded(error, missing[0], directory)) from None
    found = [file for address in addresses for file in _found(address, directory)]
    files = [file for path in found for file in data_files(path)]
    columns, ignore = {**source.COLUMNS, **source.columns}, (*source.UNUSED, *source.ignore)
    read = _read_files(files, replace(source, columns=columns, ignore=ignore), form=source.FORM)
    return replace(read, source=source)


def _found(address: str, directory: Path) -> list[Path]:
    return sorted(directory.glob(file_name(address)))


def _not_downloaded(error: OSError, address: str, directory: Path) -> str:
    if needs_login(error):
        page = address.removeprefix(HUB).rpartition("/")[0]
        return (
            f"{address}: its terms must be accepted first, on the hub's page of {page}; then log in with "
            f"`hf auth login`, or give a token as HF_TOKEN"
        )
    return (
        f"{address}: could not be downloaded ({reason(error)}); put its files into {directory}, or name "
        f"other places with {setting('urls')}"
    )


def _sample(source: Alpaca, notice: str) -> Dataset:
    return replace(_read_files([SAMPLE_FILE], replace(source, source="sample"), form="alpaca"), notice=notice)


def _read_json(source: JSON) -> Dataset:
    return _read_files(data_files(Path(source.path)), source)


READERS: dict[type[DataSource], Callable[[Any], Dataset]] = {
    Alpaca: _read_alpaca,
    JSON: _read_json,
    **dict.fromkeys(KnownSet.__subclasses__(), _read_known),
}


def _read_files(files: list[Path], source: DataSource, form: str | None = None) -> Dataset:
    """The records of the files, in the form that is set, else in the given one, else in the one that
    they show."""
    every = itertools.chain.from_iterable(map(entries, files))
    known = source.format or form
    form = choose_form(every, known, source.columns, source.ignore)
    if form is None:
        return Dataset([], source)
    reader = RecordReader(form, source.ignore, source.columns, source.on_bad, source.learn, source.system)
    skipped: list[DataError] = []
    conversations = list(Records(tuple(files), reader).read(skipped))
    if skipped and not conversations:
        raise DataError(f"{skipped[0].args[0]}; and no other record can be trained on")
    notices = [] if known else [f"the records are of the form {form}"]
    if skipped:
        notices.append(skipped_notice(skipped))
    return Dataset(conversations, source, notices=tuple(notices))


def skipped_notice(skipped: list[DataError]) -> str:
    """How many records were left out, with the first three places and reasons."""
    number = len(skipped)
    reasons = [str(error) for error in skipped[:3]] + [f"and {number - 3:,} more"] * (number > 3)
    return f"{number:,} {'record was' if number == 1 else 'records were'} left out: {' | '.join(reasons)}"
