"""What a torch file claims, checked before torch reads it; and its content, checked afterwards.

`torch.load(weights_only=True)` runs no code from a file, but it trusts the sizes that a file
claims, and it accepts more types than a checkpoint needs. So the archive's directory and its pickle
are checked first. A file that names anything but tensors and plain values, or claims more bytes
than it has, is refused.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from litlora.storage.pickle_walk import MAX_DEPTH, Forbidden, Malformed, plain_value, storages

MAX_PICKLE_BYTES = 64 * 2**20
"""The pickle without the data of the tensors."""
MAX_VALUES = 4_000_000
"""Values in a file, tensors included; each reference to a value counts."""
MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a torch file of before 2020 is this number."""


def check_torch_file(file: Path) -> bool:
    """Whether a torch file is an archive, which can be mapped. Raises Forbidden, Malformed or
    OSError. Reads no tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) == b"PK\3\4":
            _check_archive(stream, size)
            return True
        stream.seek(0)
        _check_old(stream, size)
        return False


# ---- archives


def _check_archive(stream: IO[bytes], size: int) -> None:
    """Raise Malformed unless every record is stored uncompressed, overlaps no other, and has the
    size that the pickle claims."""
    entries, directory = _directory(stream, size)
    records = _records(stream, entries, directory)
    if "data.pkl" not in records:
        raise Malformed("it has no data.pkl: it is not a torch file")
    end, size = records["data.pkl"]
    if size > MAX_PICKLE_BYTES:
        raise Malformed(f"its data.pkl has {size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    stream.seek(end - size)
    _check_storages(storages(_Bounded(stream, size)), records)


def _directory(stream: IO[bytes], size: int) -> tuple[list[zipfile.ZipInfo], int]:
    """(the archive's records in the order of the file, where its directory begins)."""
    stream.seek(max(0, size - 22))
    end = stream.read(22)
    # With a comment, or data behind the directory, other readers could find a different directory.
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise Malformed("it is cut short, or not a torch file")
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            start = archive.start_dir
            if (claimed := struct.unpack("<I", end[16:20])[0]) not in (start, 2**32 - 1):
                raise ValueError(f"it begins at {start}, not at {claimed}")
    except (zipfile.BadZipFile, ValueError, struct.error, RuntimeError) as error:
        # RuntimeError: a kind of archive that zipfile does not support
        raise Malformed(f"its directory cannot be read ({error})") from None
    return entries, start


def _records(stream: IO[bytes], entries: list[zipfile.ZipInfo], directory: int) -> dict[str, tuple[int, int]]:
    """{name of a record, in lower case: (where it ends, its bytes)}."""
    if len({entry.filename.partition("/")[0] for entry in entries}) != 1:
        raise Malformed("its records are not in one folder")
    records: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in entries:
        name = entry.filename.partition("/")[2]
        is_stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
        if not is_stored or entry.flag_bits & 1:
            raise Malformed(f"its record {name!r} is compressed or encrypted; torch does neither")
        stream.seek(entry.header_offset)
        header = stream.read(30)
        if entry.header_offset < end or len(header) < 30 or header[:4] != b"PK\3\4":
            raise Malformed(f"its record {name!r} is not where the directory says, or overlaps another")
        end = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])) + entry.file_size
        if end > directory:
            raise Malformed(f"its record {name!r} reaches beyond the end of the data")
        if name.lower() in records:
            raise Malformed(f"it has two records {name!r}")
        records[name.lower()] = end, entry.file_size
    return records


def _check_storages(claimed: Mapping[str, int], records: Mapping[str, tuple[int, int]]) -> None:
    for key, size in claimed.items():
        _, there = records.get(f"data/{key}".lower(), (0, None))
        if there != size:
            has = "there is none" if there is None else f"it has {there:,}"
            raise Malformed(f"it says that tensor data {key!r} has {size:,} bytes; {has}")


# ---- files of before 2020


def _check_old(stream: IO[bytes], size: int) -> None:
    """Check four pickles (a number, a version, the system, the content), the order of the data, and
    the size of the data."""
    start = _Bounded(stream, MAX_PICKLE_BYTES)
    if plain_value(start, max_steps=10) != MAGIC:
        raise Malformed("it is cut short, or not a torch file")
    storages(start, max_steps=10)
    storages(start, max_steps=1000)
    claimed = storages(start)
    storages(start)
    if sum(need + 8 for need in claimed.values()) > size - stream.tell():
        raise Malformed("it is cut short: it says that its tensors need more bytes than it has")


class _Bounded:
    """The next `size` bytes of a stream, as a stream of their own."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int) -> bytes:
        found = self._stream.read(min(size, self._left))
        self._left -= len(found)
        return found

    def readline(self) -> bytes:
        found = self._stream.readline(self._left)
        self._left -= len(found)
        return found


# ---- after torch has read it


def check_content(content: Any) -> None:
    """Raise Forbidden or Malformed unless a file's content is a tree of tensors and plain
    values."""
    from torch import Tensor, nn

    left = MAX_VALUES
    pending = [iter([content])]
    while pending:
        for value in pending[-1]:
            left -= 1
            if left < 0 or len(pending) > MAX_DEPTH:
                raise Malformed("its values are nested too deeply, or refer to each other without end")
            if isinstance(value, dict):
                pending.append(iter([*value.keys(), *value.values()]))
                break
            if type(value) in (list, tuple):
                pending.append(iter(value))
                break
            if type(value) in (Tensor, nn.Parameter):
                check_tensor(value)
            elif value is not None and type(value) not in (str, int, float, bool):
                raise Forbidden(type(value).__name__)
        else:
            pending.pop()


def check_tensor(tensor: Any) -> None:
    """Raise Malformed for a tensor that is not dense and on the CPU, or that is larger than its
    storage."""
    import torch

    kind = None
    if tensor.is_quantized:
        kind = "quantized"
    elif tensor.is_complex():
        kind = "complex"
    elif tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = f"{tensor.layout} on {tensor.device}"
    if kind:
        raise Malformed(f"it holds a tensor that is not an ordinary one ({kind})")
    if tensor.nbytes > (there := tensor.untyped_storage().nbytes()):
        raise Malformed(
            f"it holds a tensor of shape {tuple(tensor.shape)}, but only {there:,} bytes of its data"
        )
