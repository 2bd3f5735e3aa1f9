"""Files and directories that appear complete or not at all, even if the process or the machine
crashes. Torch-free.

While a target NAME is being written, and after a crash, these may exist beside it:

    .NAME.PID.new     being filled; useless without its writer
    .NAME.PID.old     the former NAME, complete, moved away between two renames
    .NAME.PID.gone    being removed
    .NAME.PID.aside   the former NAME, complete, until its fate is decided
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVERS = (".*.new", ".*.old", ".*.gone", ".*.aside")
"""Glob patterns of these names."""
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """A new directory to fill. It takes the name `directory` when the block succeeds, and is
    removed when it fails.

    Every file is on the disk before the rename, so that a crash leaves the old directory or the new
    one. A directory cannot be renamed onto another, so the old one is moved away first; after a
    crash in between, `settle` moves it back.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    settle(directory.parent, directory.name)
    staging, old = _beside(directory, "new"), _beside(directory, "old")
    staging.mkdir()
    try:
        yield staging
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        if directory.exists():
            directory.rename(old)
        staging.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        _name(error, directory)
        raise
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(staging, ignore_errors=True)
    if old.exists():
        _remove(old, directory)


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """The same for a file: a path to write to. The result takes the name `file` when the block
    succeeds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    settle(file.parent, file.name)
    staging = _beside(file, "new")
    try:
        yield staging
        _sync(staging)
        staging.replace(file)
        _sync(file.parent)
    except OSError as error:
        _name(error, file)
        raise
    finally:
        staging.unlink(missing_ok=True)


def _name(error: OSError, target: Path) -> None:
    """Let the error of a full disk name what was to be written: a failed write names nothing."""
    if error.errno in _NO_ROOM:
        error.filename = str(target)


def remove_directory(directory: Path) -> None:
    """Remove a directory. Nobody ever finds a part of it under its name."""
    _remove(directory, directory)


@contextmanager
def setting_aside(paths: list[Path]) -> Iterator[Callable[[], None]]:
    """Move files and directories out of the way, and put them back if the block fails.

    The function that is yielded removes them, in this order; so does the end of the block. What it
    has removed is not put back.
    """
    aside = {path: _beside(path, "aside") for path in paths}

    def forget() -> None:
        for path in list(aside):
            old = aside.pop(path)
            if old.exists():  # else it went with the whole directory
                _remove(old, path)

    try:
        for path, old in aside.items():
            path.rename(old)
        yield forget
    except BaseException:
        for path, old in aside.items():
            if old.exists():
                old.replace(path)
        raise
    forget()


def check_writable(folder: Path) -> None:
    """Raise OSError if nothing can be created in `folder`. Permissions are not enough to tell: the
    disk may be read-only."""
    settle(folder, "probe")
    probe = _beside(folder / "probe", "new")
    probe.mkdir()
    probe.rmdir()


def settle(folder: Path, name: str | None = None) -> None:
    """Finish or undo what processes that have ended left unfinished in `folder`.

    With a `name`, only what belongs to that target, and without what was set aside.
    """
    for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
        found = re.fullmatch(r"\.(.+)\.(\d+)\.(new|old|gone|aside)", path.name)
        if found is None or _is_alive(int(found[2])):
            continue
        if name is not None and (found[1] != name or found[3] == "aside"):
            continue
        target = folder / found[1]
        if found[3] in ("old", "aside") and not target.exists():  # killed between the two renames
            path.rename(target)
        else:
            _remove(path, target)


def _remove(path: Path, target: Path) -> None:
    """Remove `path`, which was `target` or would have become it."""
    if not path.is_dir():
        path.unlink()
        return
    gone = _beside(target, "gone")
    if path != gone:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def _is_alive(pid: int) -> bool:
    """Whether another process has this id. In a container every run may have the same id, so our
    own does not count."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
