"""How much memory the system can still provide, and whether it has run out. Torch-free."""

import ctypes
import errno
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""The limit of a control group, what it uses, and the part of that which the page cache can give
back."""


def free_ram(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still take, or None without /proc.

    That is the machine's free memory, or less where a control group sets a limit. `root` is the
    directory of proc and sys. What the files of a group fill of the page cache counts as free, as
    the kernel gives it back.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    free = [field_of(meminfo, "MemAvailable:") * 1024, *_free_in_groups(root)]
    return max(0, min(free))


def _free_in_groups(root: Path) -> Iterator[int]:
    """The free bytes in each control group of this process that has a limit."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        # A limit holds for all groups below it. In a container the mount is the group itself.
        place = mount / group.strip("/")
        for directory in (place, *place.parents):
            limit, used = directory / names[0], directory / names[1]
            if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
                cached = field_of(directory / "memory.stat", names[2])
                yield int(limit.read_text()) - int(used.read_text()) + cached
            if directory == mount:
                break


def return_freed_memory() -> None:
    """Let the C library give blocks of a megabyte and more back to the system when they are freed.

    glibc learns to keep blocks of up to 32 MB: a process that fetches weights from others, again and
    again, would hold several times what it uses at once. This is for the whole process, which a
    command that trains has for itself. Other C libraries stay as they are.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, 2**20)
        library.mallopt(_MMAP_THRESHOLD, 2**20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's, torch's or the system's says that memory ran out."""
    if isinstance(error, SystemError):  # of C code that took a failed allocation for a success
        return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(error, OSError):
        # linecache takes a MemoryError for an empty file, and inspect then says this without a number.
        return error.errno == errno.ENOMEM or str(error) == "could not get source code"
    marks = ("DefaultCPUAllocator", "out of memory", "Cannot allocate memory", "can't start new thread")
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in marks)


def field_of(file: Path, name: str) -> int:
    """The number after a name in a file of lines `name number ...`, or 0."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)
