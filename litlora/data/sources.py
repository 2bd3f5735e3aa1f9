"""Data sources to conversations. Torch-free.

To add a source, give it a settings dataclass in `litlora/settings` and a reader in READERS below: a
function from these settings to a `Dataset`.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from litlora import console
from litlora.data.dataset import Dataset, Mixture, Records, settled
from litlora.data.downloads import HUB, download, download_all, file_name, needs_login, reason
from litlora.data.files import entries_of, find_files
from litlora.data.records import Learns, RecordReader, check_form, choose_form
from litlora.errors import DataError, setting
from litlora.settings import JSON, Alpaca, DataSource, Files, KnownSet, Mix
from litlora.storage.atomic import replacing_file

SAMPLE_FILE = Path(__file__).with_name("alpaca_sample.json")


def read_dataset(source: DataSource, learns: Learns = "answers") -> Dataset:
    """Everything that a source holds: conversations, or pairs of them, or labelled ones; the latter
    two all in memory. Raises DataError, naming the file and the record, for anything that cannot be
    trained on; of a stream, when it is read."""
    if learns != "answers" and source.cache:
        return replace(read_dataset(replace(source, cache=False), learns), source=source)
    found = READERS[type(source)](source)
    validation = None
    if source.val_path is not None:
        own = READERS[Files](source.of_files(source.val_path))
        validation = own.conversations
        others = [f"{source.val_path}: {said}" for said in own.notices if said not in found.notices]
        notices = (*found.notices, *others)
        found = replace(found, notices=notices, read_once=found.read_once or own.read_once)
    for records in (*found.conversations.parts, *(() if validation is None else validation.parts)):
        for first in islice(records.entries(), 1):
            check_form(records.reader, first, learns)
    return settled(found, validation)


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
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        with replacing_file(file) as staging:
            download(url, staging, console.say)
            if not isinstance(json.loads(staging.read_bytes()), list):
                raise OSError("the answer is not a JSON list")
    except ValueError as error:
        raise OSError(str(error)) from None
    finally:
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
    files = [file for path in found for file in find_files(str(path)).files]
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


def _read_paths(source: Files) -> Dataset:
    found = find_files(source.path)
    read = _read_files(found.files, source)
    return replace(read, notices=(*found.notices, *read.notices))


def _read_mix(source: Mix) -> Dataset:
    sources = source.parts()
    found = [READERS[type(part)](part) for part in sources]
    records = tuple(records for part in found for records in part.conversations.parts)
    return Dataset(
        Mixture(records),
        source,
        notice="; ".join(part.notice for part in found if part.notice) or None,
        notices=tuple(
            f"{getattr(one, 'path', one.name)}: {notice}"
            for one, part in zip(sources, found, strict=True)
            for notice in part.notices
        ),
        read_once=next((part.read_once for part in found if part.read_once), None),
    )


READERS: dict[type[DataSource], Callable[[Any], Dataset]] = {
    Alpaca: _read_alpaca,
    Files: _read_paths,
    JSON: _read_paths,
    Mix: _read_mix,
    **dict.fromkeys(KnownSet.__subclasses__(), _read_known),
}
"""Each gives a Dataset of `Records`, which are not read yet."""


def _read_files(files: Sequence[Path], source: DataSource, form: str | None = None) -> Dataset:
    """The records of the files, in the form that is set, else in the given one, else in the one that
    they show."""
    every = entries_of(files, source.on_bad)
    held = None
    once = next((file for file in files if not file.is_file()), None)
    if once is not None:
        held = every = tuple(every)
    known = source.format or form
    looked_at = islice(every, None if source.shuffle else source.max_examples)
    form = choose_form(looked_at, known, source.columns, source.ignore)
    if form is None:
        form, files = "alpaca", ()  # no records at all, as `settled` says
    reader = RecordReader(
        *(form, source.ignore, source.columns, source.on_bad, source.learn, source.system, source.roles)
    )
    notices = () if known or not files else (f"the records are of the form {form}",)
    return Dataset(Records(tuple(files), reader, held=held), source, notices=notices, read_once=once)
