"""torch's zip files, written one tensor at a time: no more than a block of one tensor needs to be in memory.

The layout is that of `torch.save` since torch 1.6: stored (never compressed) records under one folder, the bytes of the tensors
as `data/0`, `data/1`, ..., each from a multiple of 64 bytes on, so that they can be mapped; `data.pkl`, which says what they
are; `version` and `byteorder`. `torch.save` writes `data.pkl` first; here it is last, so that it can tell of what was written.
"""

import io
import os
import pickle
import struct
import sys
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = "archive"
ALIGNMENT = 64
LARGE = 1 << 30
"""Records above this size get zip's 64-bit fields, which those above 2 GiB need."""
BLOCK_BYTES = 4 << 20
"""About how much is read, computed or written at a time: what the caches hold."""
WRITE_BYTES = 256 << 10
"""How much is summed up (for the checksum) and handed to the system at a time, while it is in the cache."""
WAITING = 8
"""Blocks that may wait to be written."""
FLUSH_BYTES = 256 << 20
"""How much is written before the disk is asked to take it."""


class LazyTensor(ABC):
    """A tensor that is computed while it is written, a block of rows at a time."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """The tensor in order, some rows (of the first axis) at a time."""


@dataclass(frozen=True)
class Written:
    """A tensor in an unfinished file: it takes its place in what `finish` is given."""

    key: str
    shape: torch.Size
    dtype: torch.dtype


class TorchFile:
    """An unfinished torch file. Leaving the `with` block without `finish` leaves a file that nothing can read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w")
        self._count = 0
        self._offsets: dict[str, int] = {}
        """Where the bytes of each tensor begin in the file, by its key."""
        self._open_record: Any = None
        self._flushed = 0
        self._writer, self._flusher = _Background(), _Background()

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for background in (self._writer, self._flusher):
                background.close(cancel=kind is not None)
            if self._open_record is not None:  # which a failure left open
                self._open_record.close()
            self._zip.close()
        finally:
            self._file.close()

    def add(self, tensor: Tensor | LazyTensor) -> Written:
        """Have a tensor's bytes written, in the background: it must stay as it is until `finish`, and a failure to write may be raised
        by any later call."""
        key, count = str(self._count), 0
        self._count += 1
        self._writer.run(self._open, key, tensor.shape.numel() * tensor.dtype.itemsize)
        with one_thread():
            for block in tensor.blocks() if isinstance(tensor, LazyTensor) else row_blocks(tensor):
                assert block.dtype == tensor.dtype
                count += block.numel()
                self._writer.run(self._write, block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self._writer.run(self._close)
        assert count == tensor.shape.numel()
        return Written(key, torch.Size(tensor.shape), tensor.dtype)

    def read(self, written: Written) -> Tensor:
        """A tensor of this file, memory-mapped."""
        self._writer.wait()
        self._file.flush()
        offset = self._offsets[written.key]
        end = offset + written.shape.numel() * written.dtype.itemsize
        storage = torch.UntypedStorage.from_file(str(self._path), False, end)
        return torch.empty(0, dtype=written.dtype).set_(storage[offset:end], 0, written.shape)

    def finish(self, content: Any) -> None:
        """Write what the file holds: plain values, with a Written wherever one of its tensors belongs."""
        self._writer.wait()
        stream = io.BytesIO()
        _Pickler(stream, protocol=2).dump(content)
        for name, data in (("data.pkl", stream.getvalue()), ("byteorder", sys.byteorder.encode()), ("version", b"3\n")):
            with self._record(name, len(data)) as record:
                record.write(data)
        self._zip.close()

    def _open(self, key: str, size: int) -> None:
        """Begin a tensor's record."""
        self._open_record = self._record(f"data/{key}", size)
        self._offsets[key] = self._file.tell()

    def _write(self, data: np.ndarray) -> None:
        for start in range(0, data.size, WRITE_BYTES):
            self._open_record.write(data[start : start + WRITE_BYTES])

    def _close(self) -> None:
        """End it, and let the disk take what there is: the checkpoint is synced at its end, and then waits for the last part only."""
        self._open_record.close()
        if self._file.tell() - self._flushed >= FLUSH_BYTES:
            self._flushed = self._file.tell()
            self._file.flush()
            self._flusher.run(os.fsync, self._file.fileno())

    def _record(self, name: str, size: int) -> Any:
        """A record to be filled with `size` bytes, which begin at a multiple of ALIGNMENT."""
        info = zipfile.ZipInfo(f"{FOLDER}/{name}")  # with the format's own zero hour: equal tensors make equal files
        info.file_size = size
        large = size > LARGE
        padding = -(self._file.tell() + 30 + len(info.filename) + (20 if large else 0) + 4) % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        return self._zip.open(info, "w", force_zip64=large)


def save(path: Path, content: Any) -> None:
    """What torch.save does, for dicts, lists, tuples, tensors and plain values. A full disk is an OSError here, as for every file."""
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
    """Blocks are too small to be worth sharing among cores, and the last bit of a product depends on how many share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Background:
    """Runs calls one after the other in a thread of its own, a few at most waiting: one block is written while the next is computed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def wait(self) -> None:
        """Until all is done. Raises what a call raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self, *, cancel: bool) -> None:
        """End the thread, without what still waits if asked to. Raises what a call raised unless that is so."""
        self._pool.shutdown(cancel_futures=cancel)
        if not cancel:
            self.wait()

    def run(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Raises what an earlier call raised."""
        if len(self._waiting) == WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))


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
        # How torch makes a tensor of this dtype again, and from what kind of storage, is for torch to say.
        rebuild, (storage, _, _, _, *rest) = torch.empty(0, dtype=obj.dtype).__reduce_ex__(2)
        if isinstance(storage, torch.UntypedStorage):
            reference = _Storage(torch.UntypedStorage, obj.key, obj.shape.numel() * obj.dtype.itemsize)
        else:
            reference = _Storage(_STORAGES[obj.dtype], obj.key, obj.shape.numel())
        strides = torch.empty(obj.shape, device="meta").stride()
        return rebuild, (reference, 0, tuple(obj.shape), strides, *rest)

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None
