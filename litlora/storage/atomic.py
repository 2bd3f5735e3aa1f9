"""Files and directories that appear complete or not at all, whatever kills the process or the
machine. Torch-free.

Beside a target NAME there may lie, while it is being written and after a crash:

    .NAME.PID.new     being filled; of no use without its writer
    .NAME.PID.old     the former NAME, complete, out of the way for the moment between two renames
    .NAME.PID.gone    being removed
    .NAME.PID.aside   the former NAME, complete, until it is known whether it is still wanted
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVERS = (".*.new", ".*.old", ".*.gone", ".*.aside")
"""These, as glob patterns."""


@contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """A fresh directory to fill that takes the name `directory` when the block ends well, and
    vanishes when it does not.

    Every file is on the disk before the name changes, so that a crash leaves the old directory or
    the new one. A directory cannot be renamed onto another, so the old one is moved away first: a
    crash in between is mended by `settle`.
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
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(staging, ignore_errors=True)
    if old.exists():
        _remove(old, directory)


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """The same for a file: a path to write to that takes the name `file` when the block ends
    well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    settle(file.parent, file.name)
    staging = _beside(file, "new")
    try:
        yield staging
        _sync(staging)
        staging.replace(file)
        _sync(file.parent)
    finally:
        staging.unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """Remove a directory such that nobody ever finds half of it under its name."""
    _remove(directory, directory)


@contextmanager
def setting_aside(paths: list[Path]) -> Iterator[Callable[[], None]]:
    """Move files and directories out of the way. What is yielded removes them, in this order; a
    block that fails before puts them back."""
    aside = {path: _beside(path, "aside") for path in paths}

    def forget() -> None:
        for path in list(aside):
            _remove(aside.pop(path), path)

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
    """Raise OSError if nothing can be made in `folder`. Permissions alone do not tell: a disk may
    be read-only."""
    settle(folder, "probe")
    probe = _beside(folder / "probe", "new")
    probe.mkdir()
    probe.rmdir()


def settle(folder: Path, name: str | None = None) -> None:
    """Finish or undo, in `folder`, what processes that are no more left half done to `name`, or to
    all and put back what was aside."""
    for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
        found = re.fullmatch(r"\.(.+)\.(\d+)\.(new|old|gone|aside)", path.name)
        if (
            found is None
            or _is_alive(int(found[2]))
            or (name is not None and (found[1] != name or found[3] == "aside"))
        ):
            continue
        target = folder / found[1]
        if found[3] in ("old", "aside") and not target.exists():  # killed between the two renames
            path.rename(target)
        else:
            _remove(path, target)


def _remove(path: Path, target: Path) -> None:
    """Remove what was `target`, or would have become it."""
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
    """Whether another process has this id. Our own is no other: in a container every run may have
    the same."""
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
