"""torch's zip files, written block by block: no more than a block of one tensor needs to be in
memory.

The layout is that of `torch.save` since torch 1.6: uncompressed records in one folder. The bytes of
the tensors are `data/0`, `data/1`, ...; each begins at a multiple of 64 bytes, so that it can be
mapped. `data.pkl` describes them; `version` and `byteorder` are constants. `torch.save` writes
`data.pkl` first; here it comes last, so that it can describe what has been written.
"""

import io
import mmap
import pickle
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litlora.storage.blocks import LazyTensor, Memory, one_thread, row_blocks
from litlora.storage.pages import Pages
from litlora.storage.stream import WAITING, Background, OutputStream

FOLDER = "archive"
ALIGNMENT = 64
LARGE = 1 << 30
"""Records above this size get zip's 64-bit fields, which records above 2 GiB need."""
WRITE_BYTES = 1 << 20
"""How much is added to the checksum and handed to the system at a time, while it is in the
cache."""


@dataclass(frozen=True)
class Written:
    """A tensor in an unfinished file. In the content that `finish` takes, it stands for the
    tensor."""

    key: str
    shape: torch.Size
    dtype: torch.dtype


class TorchFile:
    """An unfinished torch file. Without a call of `finish`, the `with` block leaves a file that
    cannot be read."""

    def __init__(self, path: Path, *, cached: bool = False) -> None:
        """`cached`: the file will be read soon after it is written."""
        self._path = path
        self._stream = OutputStream(path, cached=cached)
        self._zip = zipfile.ZipFile(self._stream, "w")
        self._count = 0
        self._offsets: dict[str, int] = {}
        """Where the bytes of each tensor begin in the file, by the tensor's key."""
        self._open_record: Any = None
        self._pages = Pages()
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
            # After a failure zipfile must not write the archive's end, now or when it is deleted.
            self._zip.fp = None
        finally:
            self._stream.close(cancel=kind is not None)

    def add(self, tensor: Tensor | LazyTensor) -> Written:
        """Write a tensor's bytes in the background. It must not change until `finish`. Any later
        call may raise the error of a failed write."""
        key, count = str(self._count), 0
        self._count += 1
        self._writer.run(self._open, key, tensor.shape.numel() * tensor.dtype.itemsize)
        with one_thread():
            is_lazy = isinstance(tensor, LazyTensor)
            for block in tensor.blocks(self._memory) if is_lazy else row_blocks(tensor):
                assert block.dtype == tensor.dtype
                count += block.numel()
                data = block.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                self._writer.run(self._write, data)
        self._writer.run(self._close)
        if is_lazy:
            self._pages.done_with(*tensor.sources())
        assert count == tensor.shape.numel()
        return Written(key, torch.Size(tensor.shape), tensor.dtype)

    def read(self, written: Written) -> Tensor:
        """A tensor of this file, memory-mapped."""
        self._writer.wait()
        self._stream.flush()
        size, offset = written.shape.numel() * written.dtype.itemsize, self._offsets[written.key]
        if size == 0:
            return torch.empty(written.shape, dtype=written.dtype)
        before = offset % mmap.ALLOCATIONGRANULARITY  # a map begins at a page boundary
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=offset - before)
        mapped.madvise(mmap.MADV_RANDOM)  # a few scattered bytes are read, possibly from the disk
        return torch.frombuffer(mapped, dtype=torch.uint8)[before:].view(written.dtype).view(written.shape)

    def finish(self, content: Any) -> None:
        """Write the file's content: plain values, with a Written in place of each tensor."""
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
        """End a tensor's record."""
        self._open_record.close()

    def _record(self, name: str, size: int) -> Any:
        """A new record for `size` bytes, which begin at a multiple of ALIGNMENT."""
        # With the format's earliest time, not the current one: equal tensors make equal files.
        info = zipfile.ZipInfo(f"{FOLDER}/{name}")
        info.file_size = size
        large = size > LARGE
        padding = -(self._stream.tell() + 30 + len(info.filename) + (20 if large else 0) + 4) % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        return self._zip.open(info, "w", force_zip64=large)


def save(path: Path, content: Any) -> None:
    """What torch.save does, for dicts, lists, tuples, tensors, lazy ones and plain values. A full disk raises
    OSError, as for any other file."""
    with TorchFile(path) as file:

        def written(value: Any) -> Any:
            if isinstance(value, Tensor | LazyTensor):
                return file.add(value)
            if isinstance(value, dict):
                return {name: written(entry) for name, entry in value.items()}
            return type(value)(map(written, value)) if isinstance(value, (list, tuple)) else value

        file.finish(written(content))


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
"""The storage of a dtype in `data.pkl`; newer dtypes have a storage of bytes."""


@dataclass(frozen=True)
class _Storage:
    """How `data.pkl` refers to the bytes of a tensor."""

    kind: type
    key: str
    size: int


class _Pickler(pickle.Pickler):
    """Describes written tensors as torch describes tensors in memory."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Written):
            return NotImplemented
        # torch itself tells how it rebuilds a tensor of this dtype, and from what kind of storage.
        rebuild, (storage, _, _, _, *rest) = torch.empty(0, dtype=obj.dtype).__reduce_ex__(2)
        if isinstance(storage, torch.UntypedStorage):
            reference = _Storage(torch.UntypedStorage, obj.key, obj.shape.numel() * obj.dtype.itemsize)
        else:
            reference = _Storage(_STORAGES[obj.dtype], obj.key, obj.shape.numel())
        strides = torch.empty(obj.shape, device="meta").stride()
        return rebuild, (reference, 0, tuple(obj.shape), strides, *rest)

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None
