"""torch's zip files, written one tensor at a time: no more than a block of one tensor needs to be
in memory.

The layout is that of `torch.save` since torch 1.6: stored (never compressed) records under one
folder, the bytes of the tensors as `data/0`, `data/1`, ..., each from a multiple of 64 bytes on, so
that they can be mapped; `data.pkl`, which says what they are; `version` and `byteorder`.
`torch.save` writes `data.pkl` first; here it is last, so that it can tell of what was written.
"""

import io
import mmap
import pickle
import struct
import sys
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litlora.storage.stream import WAITING, Background, OutputStream

FOLDER = "archive"
ALIGNMENT = 64
LARGE = 1 << 30
"""Records above this size get zip's 64-bit fields, which those above 2 GiB need."""
BLOCK_BYTES = 2 << 20
"""About how much is read, computed or written at a time: what the caches hold."""
WRITE_BYTES = 1 << 20
"""How much is summed up (for the checksum) and handed to the system at a time, while it is in the
cache."""


class LazyTensor(ABC):
    """A tensor that is computed while it is written, a block of rows at a time."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def blocks(self, memory: "Memory | None" = None) -> Iterator[Tensor]:
        """The tensor in order, some rows (of the first axis) at a time; computed in `memory` if
        that is given."""


@dataclass(frozen=True)
class Written:
    """A tensor in an unfinished file: it takes its place in what `finish` is given."""

    key: str
    shape: torch.Size
    dtype: torch.dtype


class TorchFile:
    """An unfinished torch file. Leaving the `with` block without `finish` leaves a file that
    nothing can read."""

    def __init__(self, path: Path, *, cached: bool = False) -> None:
        """`cached`: the file will be read as soon as it is written."""
        self._path = path
        self._stream = OutputStream(path, cached=cached)
        self._zip = zipfile.ZipFile(self._stream, "w")
        self._count = 0
        self._offsets: dict[str, int] = {}
        """Where the bytes of each tensor begin in the file, by its key."""
        self._open_record: Any = None
        self._writer = Background()
        # A block is computed while WAITING others wait and one is being written.
        self._memory = Memory(WAITING + 2)

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.close(cancel=kind is not None)
            if kind is None:
                self._zip.close()
            self._zip.fp = None  # after a failure there is nothing to end: its end would be written, now or when it is forgotten
        finally:
            self._stream.close(cancel=kind is not None)

    def add(self, tensor: Tensor | LazyTensor) -> Written:
        """Have a tensor's bytes written, in the background: it must stay as it is until `finish`,
        and a failure to write may be raised by any later call."""
        key, count = str(self._count), 0
        self._count += 1
        self._writer.run(self._open, key, tensor.shape.numel() * tensor.dtype.itemsize)
        with one_thread():
            for block in (
                tensor.blocks(self._memory) if isinstance(tensor, LazyTensor) else row_blocks(tensor)
            ):
                assert block.dtype == tensor.dtype
                count += block.numel()
                self._writer.run(
                    self._write, block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                )
        self._writer.run(self._close)
        assert count == tensor.shape.numel()
        return Written(key, torch.Size(tensor.shape), tensor.dtype)

    def read(self, written: Written) -> Tensor:
        """A tensor of this file, memory-mapped."""
        self._writer.wait()
        self._stream.flush()
        size, offset = written.shape.numel() * written.dtype.itemsize, self._offsets[written.key]
        if size == 0:
            return torch.empty(written.shape, dtype=written.dtype)
        before = offset % mmap.ALLOCATIONGRANULARITY  # a map begins at a page
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=offset - before)
        mapped.madvise(mmap.MADV_RANDOM)  # a few bytes here and there, which may have to come from the disk
        return torch.frombuffer(mapped, dtype=torch.uint8)[before:].view(written.dtype).view(written.shape)

    def finish(self, content: Any) -> None:
        """Write what the file holds: plain values, with a Written wherever one of its tensors
        belongs."""
        self._writer.wait()
        stream = io.BytesIO()
        _Pickler(stream, protocol=2).dump(content)
        for name, data in (
            ("data.pkl", stream.getvalue()),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
        ):
            with self._record(name, len(data)) as record:
                record.write(data)
        self._zip.close()

    def _open(self, key: str, size: int) -> None:
        """Begin a tensor's record."""
        self._open_record = self._record(f"data/{key}", size)
        self._offsets[key] = self._stream.tell()

    def _write(self, data: np.ndarray) -> None:
        for start in range(0, data.size, WRITE_BYTES):
            self._open_record.write(data[start : start + WRITE_BYTES])

    def _close(self) -> None:
        """End it."""
        self._open_record.close()

    def _record(self, name: str, size: int) -> Any:
        """A record to be filled with `size` bytes, which begin at a multiple of ALIGNMENT."""
        info = zipfile.ZipInfo(
            f"{FOLDER}/{name}"
        )  # with the format's own zero hour: equal tensors make equal files
        info.file_size = size
        large = size > LARGE
        padding = -(self._stream.tell() + 30 + len(info.filename) + (20 if large else 0) + 4) % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        return self._zip.open(info, "w", force_zip64=large)


def save(path: Path, content: Any) -> None:
    """What torch.save does, for dicts, lists, tuples, tensors and plain values. A full disk is an
    OSError here, as for every file."""
    with TorchFile(path) as file:

        def written(value: Any) -> Any:
            if isinstance(value, Tensor):
                return file.add(value)
            if isinstance(value, dict):
                return {name: written(entry) for name, entry in value.items()}
            return type(value)(map(written, value)) if isinstance(value, (list, tuple)) else value

        file.finish(written(content))


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks are too small to be worth sharing among cores, and the last bit of a product depends
    on how many share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Memory:
    """Room for the last few blocks, used again and again: fresh memory costs more than what is
    computed in it."""

    def __init__(self, count: int) -> None:
        self._rooms = deque(torch.empty(0, dtype=torch.uint8) for _ in range(count))

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, which is good until `count` others have been asked for."""
        size = shape.numel() * dtype.itemsize
        room = self._rooms.popleft()
        self._rooms.append(room if room.numel() >= size else torch.empty(size, dtype=torch.uint8))
        return self._rooms[-1][:size].view(dtype).view(shape)


def row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in pieces of about BLOCK_BYTES, in order; views of it."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(BLOCK_BYTES // tensor.dtype.itemsize)
    else:
        yield from tensor.split(rows_at_a_time(tensor.shape, tensor.dtype.itemsize))


def rows_at_a_time(shape: torch.Size, itemsize: int) -> int:
    """How many rows (of the first axis) of a tensor are about BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // max(1, shape[1:].numel() * itemsize))


_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""What `data.pkl` calls the storage of a dtype; the younger dtypes have a storage of bytes."""


@dataclass(frozen=True)
class _Storage:
    """What `data.pkl` calls the bytes of a tensor."""

    kind: type
    key: str
    size: int


class _Pickler(pickle.Pickler):
    """Describes written tensors as torch describes those in memory."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Written):
            return NotImplemented
        # How torch makes a tensor of this dtype again, and from what kind of storage, is for torch
        # to say.
        rebuild, (storage, _, _, _, *rest) = torch.empty(0, dtype=obj.dtype).__reduce_ex__(2)
        if isinstance(storage, torch.UntypedStorage):
            reference = _Storage(torch.UntypedStorage, obj.key, obj.shape.numel() * obj.dtype.itemsize)
        else:
            reference = _Storage(_STORAGES[obj.dtype], obj.key, obj.shape.numel())
        strides = torch.empty(obj.shape, device="meta").stride()
        return rebuild, (reference, 0, tuple(obj.shape), strides, *rest)

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None
