"""Large data, tokenised once: a directory of stores (`data/store.py`), each under the hash of all
that its examples depend on. Torch-free.

    HASH/           a store
    HASH.lock       locked by who writes that store
    HASH.sha256     the content of a file, under the hash of its path, size and times: so a file is
                    not read again to find out whether it has changed
"""

import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from litlora.data.parallel import Progress, encoded, num_processes
from litlora.data.parts import Setup
from litlora.data.sources import Records
from litlora.data.store import HEADER, Broken, Store, StoreWriter
from litlora.errors import DataError, UserError, setting
from litlora.report.console import duration
from litlora.storage.atomic import replacing_directory, replacing_file

KEPT_DAYS = 30
"""How long what no run uses is kept."""
PLACE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT),
}
"""What is wrong with a place that cannot be written."""
SETTLED = 2
"""Seconds after which a file's time tells whether it has changed: its clock is coarse."""


def default_place() -> Path:
    """Where tokenised data is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "litlora/data"
    except RuntimeError:
        raise UserError(f"there is no home directory to keep tokenised data in; {_remedy()}") from None


class DataCache:
    """The stores in a directory."""

    def __init__(self, place: Path, say: Callable[[str], None]) -> None:
        """`say` tells the user what takes long."""
        self.place, self._say = place, say

    def key(self, records: Records, setup: Setup) -> str:
        """A hash of all that the examples depend on."""
        facts = {
            "files": [
                [_suffixes(file), self._content(file)]
                for part in records.parts
                if part.held is None  # else they are among the facts, and a pipe is read only once
                for file in part.files
            ],
            "records": [_chosen_by(part) for part in records.parts],
            "tokenizer": setup.tokenizer.fingerprint,
            "style": [setup.style_name, setup.template.fingerprint if setup.template else None],
            "max_seq_length": setup.max_seq_length,
            "code": _code(),
            "byteorder": sys.byteorder,
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def get(self, key: str, records: Records, setup: Setup) -> Store:
        """The store of these records, which is made if there is none. Raises DataError for the
        first record that cannot be used, and UserError if the place cannot be written."""
        if (found := self._open(key)) is not None:
            self._say(f"data: tokenised before, in {found.directory}")
            return found
        with self.locked(key):
            return self.make(key, records, setup)

    def make(self, key: str, records: Records, setup: Setup) -> Store:
        """The same for who has locked the store: another run may have made it before."""
        return self._open(key, broken=self._say) or self._make(key, records, setup)

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """A block that one process at a time is in. Where a file system has no locks, several write
        the same store, each beside its place."""
        with self._reporting():
            self.place.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.place / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say("data: another process is tokenising the same data; this one waits for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                pass
            yield
        finally:
            os.close(handle)

    def _open(self, key: str, broken: Callable[[str], None] | None = None) -> Store | None:
        """A store that is whole, if there is one; `broken` is told of one that is not."""
        try:
            store = Store(self.place / key)
        except Broken as error:
            if broken is not None:
                broken(f"data: {error}; it is made anew")
            return None
        except OSError:
            return None
        with suppress(OSError):  # it may be read-only
            os.utime(store.directory / HEADER)
        return store

    def _make(self, key: str, records: Records, setup: Setup) -> Store:
        started, directory = time.monotonic(), self.place / key
        num_bytes = sum(file.stat().st_size for file in _files(records))
        self._say(
            f"data: tokenising {num_bytes / 1e6:,.0f} MB, once, in {num_processes(num_bytes)} processes; "
            f"the result stays in {directory}"
        )
        with self._reporting():
            self._remove_unused()
            with replacing_directory(directory) as staging:
                written = self._write(staging, records, setup, num_bytes)
                if self.key(records, setup) != key:
                    raise DataError(
                        f"{_files(records)[0]}: the data was changed while it was read; start again"
                    )
        self._say(f"data: {written:,} records tokenised in {duration(time.monotonic() - started)}")
        return Store(directory)

    def _write(self, staging: Path, records: Records, setup: Setup, num_bytes: int) -> int:
        """Fill a store; returns the number of conversations."""
        progress = Progress(num_bytes, self._say)
        parts = encoded(records, setup, num_bytes)
        try:
            with StoreWriter(staging) as writer:
                for size, part in parts:
                    writer.add(part)
                    progress.add(size, part.num_conversations)
                    if part.source is not None:
                        records.parts[part.source].note(part.hashes)
                if writer.skipped and not writer.num_conversations:
                    raise DataError(f"{writer.skipped[0]}; and no other record can be trained on")
                if not writer.num_conversations:
                    raise DataError(f"{_files(records)[0]}: holds no records; there is nothing to train on")
                writer.finish()
                for part in records.parts:
                    if part.in_lines():
                        part.noted()
                return writer.num_conversations
        finally:
            parts.close()  # now, not when it is collected: it ends the processes
            progress.close()

    def _content(self, file: Path) -> str:
        """The sha256 of a file."""
        facts = _facts_of(file)
        name = hashlib.sha256(repr((str(file.absolute()), facts)).encode()).hexdigest()
        remembered = self.place / f"{name}.sha256"
        with suppress(OSError):
            known = remembered.read_text()
            if re.fullmatch("[0-9a-f]{64}", known):
                os.utime(remembered)
                return known
        now = time.time()
        try:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
        if now - file.stat().st_ctime > SETTLED and _facts_of(file) == facts:
            with suppress(OSError), replacing_file(remembered) as staging:
                staging.write_text(found)
        return found

    def _remove_unused(self) -> None:
        """Remove what no run has used for a while; nothing but what has our names."""
        oldest = time.time() - KEPT_DAYS * 24 * 3600
        for path in self.place.iterdir():
            if re.fullmatch(r"\.?[0-9a-f]{64}(\.lock|\.sha256|\.\d+\.(new|old|gone))?", path.name):
                with suppress(OSError):
                    header = path / HEADER
                    if (header if header.is_file() else path).stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Errors of writing, as one line that says where else the data may be kept."""
        try:
            yield
        except OSError as error:
            if error.errno not in PLACE_ERRORS:
                raise
            reason = error.strerror or error
            raise UserError(
                f"{self.place}: tokenised data cannot be kept there ({reason}); {_remedy()}"
            ) from None


def _remedy() -> str:
    return (
        f"choose another place with {setting('cache_dir')}, or keep the data in memory with "
        f"{setting('cache')} false"
    )


def _facts_of(file: Path) -> tuple[int, ...]:
    """What changes with the content of a file."""
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _files(records: Records) -> list[Path]:
    return [file for part in records.parts for file in part.files]


def _chosen_by(part: Records) -> list[str]:
    """What says which records of the files are taken, and how they are read."""
    names = [field.name for field in dataclasses.fields(part) if field.name not in ("files", "survey")]
    return [f"{name}={getattr(part, name)!r}" for name in names] + [str(len(part.files))]


def _suffixes(file: Path) -> str:
    """The end of a name, which may say how a file is read."""
    return "".join(file.suffixes[-2:]).lower()


def _code() -> str:
    """A hash of the code that makes examples of records, so that no store outlives a change of it."""
    root = Path(__file__).parent.parent
    files = [path for folder in ("data", "prompts") for path in (root / folder).rglob("*") if path.is_file()]
    files += [*root.glob("tokenizer*.py"), root / "sentencepiece.py"]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.suffix in (".py", ".jinja")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    for library in ("tokenizers", "jinja2"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()
