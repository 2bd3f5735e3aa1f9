"""What a torch file says of itself, checked before torch reads it, and once more after.

`torch.load(weights_only=True)` runs no code that a file brings, but it believes what a file says of
sizes, and it knows more kinds of things than a checkpoint needs. So the archive's directory and the
pickle in it are read here first, step by step and without building anything: whatever names another
thing than tensors and plain values, or promises more bytes than there are, is refused.
"""

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MOST_STEPS = 5_000_000
"""Steps of a pickle, about 30 a tensor; each costs some 100 bytes at worst."""
LARGEST_PICKLE = 64 * 2**20
"""Bytes of the pickle beside the tensors' own."""
MOST_VALUES = 4_000_000
"""Values in a file, tensors included, counted wherever they are referred to."""
DEEPEST = 32
"""Levels of nested containers."""
MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a torch file of before 2020 is this number."""
STORAGES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{
        "LongStorage": 8,
        "IntStorage": 4,
        "ShortStorage": 2,
        "CharStorage": 1,
        "ByteStorage": 1,
        "BoolStorage": 1,
    },
    "UntypedStorage": 1,
}
"""Bytes an element."""
KNOWN = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    *(
        ("torch", name) for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
    ),  # for _rebuild_tensor_v3
    *((module, name) for name in STORAGES for module in ("torch", "torch.cuda", "torch.storage")),
}
"""All that a pickle may name: what makes up a tensor, and an ordered dict."""
CALLED = {"OrderedDict", "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"}
"""Those of them that it may call."""


class Forbidden(Exception):
    """A pickle names something beyond tensors and plain values."""


class Lying(Exception):
    """A file is not what it says."""


def check_torch_file(file: Path) -> bool:
    """Whether a file is an archive of torch's, which can be mapped. Raises Forbidden, Lying or
    OSError; reads no tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) == b"PK\3\4":
            _check_archive(stream, size)
            return True
        stream.seek(0)
        _check_old(stream, size)
        return False


def _check_archive(stream: IO[bytes], size: int) -> None:
    """Every record is stored as it is, has a place of its own, and holds what the pickle says."""
    stream.seek(max(0, size - 22))
    end = stream.read(22)
    if (
        end[:4] != b"PK\5\6" or end[20:] != b"\0\0"
    ):  # else other readers might find another directory than ours
        raise Lying("it is cut short, or no torch file")
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            directory = archive.start_dir
            if (said := struct.unpack("<I", end[16:20])[0]) not in (directory, 2**32 - 1):
                raise ValueError(f"at {said}, or at {directory}?")
    except (
        zipfile.BadZipFile,
        ValueError,
        struct.error,
        RuntimeError,
    ) as error:  # of a kind of archive that zipfile does not know
        raise Lying(f"its directory cannot be read ({error})") from None
    records: dict[str, int] = {}
    tops = {entry.filename.partition("/")[0] for entry in entries}
    if len(tops) != 1:
        raise Lying("its records are not in one folder")
    place = 0
    for entry in entries:
        name = entry.filename.partition("/")[2]
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.file_size != entry.compress_size
            or entry.flag_bits & 1
        ):
            raise Lying(
                f"its record {name!r} is compressed or encrypted; torch stores its records as they are"
            )
        stream.seek(entry.header_offset)
        header = stream.read(30)
        if entry.header_offset < place or len(header) < 30 or header[:4] != b"PK\3\4":
            raise Lying(f"its record {name!r} is not where the directory says, or overlaps another")
        place = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:])) + entry.file_size
        if place > directory:
            raise Lying(f"its record {name!r} reaches beyond the end of the data")
        if name.lower() in records:
            raise Lying(f"it has two records {name!r}")
        records[name.lower()] = entry.file_size
        if name == "data.pkl":
            pickle_end = place
    if "data.pkl" not in records:
        raise Lying("it has no data.pkl: it is no torch file")
    if records["data.pkl"] > LARGEST_PICKLE:
        raise Lying(
            f"its data.pkl has {records['data.pkl']:,} bytes; {LARGEST_PICKLE:,} are the most that is read"
        )
    stream.seek(pickle_end - records["data.pkl"])
    for key, need in _walk(_Bounded(stream, records["data.pkl"])).items():
        there = records.get(f"data/{key}".lower())
        if there != need:
            has = "there is none" if there is None else f"it has {there:,}"
            raise Lying(f"it says that tensor data {key!r} has {need:,} bytes; {has}")


def _check_old(stream: IO[bytes], size: int) -> None:
    """Four pickles (a number, a version, the system, the content), the order of the data, and the
    data."""
    start = _Bounded(stream, LARGEST_PICKLE)
    if _walk(start, most=10, result=True) != MAGIC:
        raise Lying("it is cut short, or no torch file")
    _walk(start, most=10)
    _walk(start, most=1000)
    needs = _walk(start)
    _walk(start)
    if sum(need + 8 for need in needs.values()) > size - stream.tell():
        raise Lying("it is cut short: it says that its tensors need more bytes than it has")


class _Bounded:
    """The next so many bytes of a stream, as a file of their own."""

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


def _steps(stream: Any, most: int) -> Iterator[tuple[str, Any]]:
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= most:
                raise Lying(f"its pickle has more than {most:,} steps")
            yield code.name, argument
    except (ValueError, IndexError, struct.error, UnicodeError, OverflowError) as error:
        raise Lying(f"its pickle is broken ({' '.join(str(error).split())[:100]})") from None


class _Tuple(tuple):
    """A tuple that knows how deep it is."""

    depth: int


def _walk(stream: Any, most: int = MOST_STEPS, *, result: bool = False) -> Any:
    """{key of a storage: its bytes} of one pickle, found without building anything: on the stack
    stand text, whole numbers and tuples as they are, what is named by its name, and None for all
    else. With `result`, what the pickle holds instead."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, int] = {}
    try:
        for name, argument in _steps(stream, most):
            if name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING"):
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
                start = (
                    marks.pop()
                    if name == "TUPLE"
                    else len(stack) - (0 if name == "EMPTY_TUPLE" else int(name[-1]))
                )
                if start < 0:
                    raise IndexError
                found = _Tuple(stack[start:])
                found.depth = 1 + max((value.depth for value in found if type(value) is _Tuple), default=0)
                if found.depth > DEEPEST:
                    raise Lying("its values are nested too deeply")
                stack[start:] = [found]
            elif name == "GLOBAL":
                module, _, thing = argument.partition(" ")
                if (module, thing) not in KNOWN:
                    raise Forbidden(f"{module}.{thing}"[:80])
                stack.append(thing)
            elif name == "BINPERSID":
                key, need = _storage(stack.pop())
                if storages.setdefault(key, need) != need:
                    raise Lying(f"it gives two sizes for tensor data {key!r}")
                stack.append(None)
            elif name in ("EMPTY_DICT", "EMPTY_LIST", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"):
                stack.append(None)
            elif name == "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                if called not in CALLED or (called == "OrderedDict" and arguments != ()):
                    raise Forbidden("a call")
                stack.append(None)
            elif name in ("SETITEMS", "SETITEM"):
                start = marks.pop() if name == "SETITEMS" else len(stack) - 2
                if any(
                    type(key) not in (str, int) for key in stack[start::2]
                ):  # a tuple may take for ever to be hashed
                    raise Lying("a name in it is neither text nor a number")
                del stack[start:]
            elif name == "APPENDS":
                del stack[marks.pop() :]
            elif name in ("APPEND", "BUILD"):
                stack.pop()
            elif name == "STOP":
                return stack.pop() if result else storages
            elif name != "PROTO":
                raise Forbidden(name)
    except (IndexError, KeyError, TypeError):
        raise Lying("its pickle is broken") from None
    raise Lying("its pickle has no end")


def _storage(description: Any) -> tuple[str, int]:
    """(key, bytes) of ("storage", its type, key, device, number of elements, and in old files a
    view, None)."""
    known = type(description) is _Tuple and len(description) in (5, 6) and description[0] == "storage"
    if not known or description[5:] not in ((), (None,)):
        raise Lying("it refers to something that is no tensor data")
    _, kind, key, _, count = description[:5]
    if kind not in STORAGES or type(key) is not str or type(count) is not int or not 0 <= count < 2**60:
        raise Lying("it describes tensor data as nothing that torch writes")
    return key, count * STORAGES[kind]


# ---- after torch has read it


def check_content(content: Any) -> None:
    """Raise Forbidden or Lying unless a file's content is tensors and plain values, of which a tree
    can be made."""
    from torch import Tensor, nn

    left = MOST_VALUES
    pending = [iter([content])]
    while pending:
        for value in pending[-1]:
            left -= 1
            if left < 0 or len(pending) > DEEPEST:
                raise Lying("its values are nested too deeply, or refer to each other without end")
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
    """Raise Lying for a tensor that is not an ordinary one: dense, on the CPU, no larger than what
    the file holds of it."""
    import torch

    if (
        tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or tensor.is_quantized
        or tensor.is_complex()
    ):
        kind = (
            "quantized"
            if tensor.is_quantized
            else "complex"
            if tensor.is_complex()
            else f"{tensor.layout} on {tensor.device}"
        )
        raise Lying(f"it holds a tensor that is no ordinary one ({kind})")
    if tensor.nbytes > (there := tensor.untyped_storage().nbytes()):
        raise Lying(
            f"it holds a tensor of shape {tuple(tensor.shape)}, of which only {there:,} bytes are there"
        )
