"""Which memory of mapped files is in use: reading it before it is needed, and giving it back after."""

import ctypes
import mmap
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

MAX_HELD = 128 << 20
"""Bytes of mapped tensors that are read before their memory is given back."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python has no name for: read, and fill the page table."""


@dataclass
class Pages:
    """Keeps the memory of memory-mapped tensors small: pages that were read count as the process's
    memory until they are given back.

    Pages that are needed again are read again, from the file or its cache. Only Linux tells what is
    mapped; elsewhere nothing is done.
    """

    _read: list[Tensor] = field(default_factory=list)
    _held: int = 0

    def done_with(self, *tensors: Tensor) -> None:
        """These tensors have been read and will not be needed soon."""
        self._read += tensors
        self._held += sum(tensor.nbytes for tensor in tensors)
        if self._held > MAX_HELD:
            self.release()

    def release(self) -> None:
        """Give back the pages of all tensors that have been read, if they belong to a mapped
        file."""
        for tensor in mapped(self._read):
            if tensor.is_contiguous():
                release(tensor)
        self._read.clear()
        self._held = 0


class ReadAhead:
    """Reads mapped tensors in a thread of its own, while others are computed with."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def read(self, tensor: Tensor, needed: Callable[[], bool]) -> None:
        """Read it soon, unless `needed` says by then that it is not needed any more."""
        self._pool.submit(lambda: read(tensor) if needed() else None)

    def release(self, tensor: Tensor) -> None:
        """Give its pages back, after what was asked for before."""
        self._pool.submit(release, tensor)


def read(tensor: Tensor) -> None:
    """Read a mapped tensor in large pieces, and fill the page table: a tenth of the time that its
    first use would take page by page. Does nothing for one that is in memory."""
    first, last = _span(tensor)
    first, last = first // mmap.PAGESIZE * mmap.PAGESIZE, -(-last // mmap.PAGESIZE) * mmap.PAGESIZE
    # Not after MADV_WILLNEED: it leaves the file in the page cache in pieces of a page, each of which is
    # then entered into the page table and taken out by itself.
    if not _advise(first, last, _POPULATE_READ):
        _advise(first, last, mmap.MADV_WILLNEED)


def release(tensor: Tensor) -> None:
    """Give back the pages of a tensor of a mapped file, but those that it shares with others. What
    the tensor holds does not change: its next use reads the file, or the cache of it."""
    first, last = _span(tensor)
    first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(first, last, mmap.MADV_DONTNEED)


def mapped(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that lie in memory-mapped files: giving back the pages of any other would lose it."""
    maps = _file_mappings()
    spans = ((tensor, *_span(tensor)) for tensor in tensors)
    return [tensor for tensor, first, last in spans if any(a <= first and last <= b for a, b in maps)]


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and behind its last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize


def _advise(first: int, last: int, advice: int) -> bool:
    """Whether the kernel took it. One that does not know the advice reads when the memory is used."""
    if first >= last:
        return True
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) == 0


def _file_mappings() -> list[tuple[int, int]]:
    """The addresses at which this process has mapped files that are not libraries."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = [re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s+(/.*)?", line) for line in lines]
    return [
        (int(one[1], 16), int(one[2], 16))
        for one in found
        if one and one[3] != "0" and ".so" not in (one[4] or "")
    ]
