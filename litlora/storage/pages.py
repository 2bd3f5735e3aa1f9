"""Giving back the memory of mapped files that have been read."""

import ctypes
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

_MAX_HELD = 128 << 20
"""Bytes of mapped tensors that are read before their memory is given back."""


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
        if self._held > _MAX_HELD:
            self.release()

    def release(self) -> None:
        """Give back the pages of all tensors that have been read, if they belong to a mapped
        file."""
        mapped = _file_mappings()
        for tensor in self._read:
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            is_mapped = any(start <= first and last <= end for start, end in mapped)
            if is_mapped and first < last and tensor.is_contiguous():
                address, size = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
                ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED)
        self._read.clear()
        self._held = 0


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
