"""The pickle in a torch file, checked step by step without building anything. Torch-free.

A pickle is a program for a small stack machine. `walk` runs it on a stack that holds only text,
whole numbers and tuples; a named thing is represented by its name, everything else by None. A
pickle that names or calls anything but tensors and plain values is refused before torch sees it.
"""

import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

MAX_STEPS = 5_000_000
"""Steps of a pickle: about 30 for each tensor. A step takes about 100 bytes at worst."""
MAX_DEPTH = 32
"""Levels of nested containers."""
STORAGES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1},
    **{"ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
"""Bytes of an element, by the type of a tensor's storage."""
DTYPES_BY_NAME = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
"""The dtypes that _rebuild_tensor_v3 takes as arguments."""
KNOWN = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in DTYPES_BY_NAME),
    *((module, name) for name in STORAGES for module in ("torch", "torch.cuda", "torch.storage")),
}
"""All that a pickle may name: the parts of a tensor, and an ordered dict."""
CALLABLE = {
    "OrderedDict",
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
}
"""The names in KNOWN that a pickle may call."""


class Forbidden(Exception):
    """A pickle names something beyond tensors and plain values."""


class Malformed(Exception):
    """A file contradicts itself, or is not a file of its kind."""


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


def storages(stream: Stream, max_steps: int = MAX_STEPS) -> dict[str, int]:
    """{key of a storage: its bytes}, for all storages that the next pickle of a stream refers
    to."""
    return _Machine().run(stream, max_steps).storages


def plain_value(stream: Stream, max_steps: int) -> Any:
    """What the next pickle of a stream holds, if it is text, a whole number or a tuple."""
    return _Machine().run(stream, max_steps).result


def _steps(stream: Stream, max_steps: int) -> Iterator[tuple[str, Any]]:
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= max_steps:
                raise Malformed(f"its pickle has more than {max_steps:,} steps")
            yield code.name, argument
    except (ValueError, IndexError, struct.error, UnicodeError, OverflowError) as error:
        raise Malformed(f"its pickle is broken ({' '.join(str(error).split())[:100]})") from None


class _Tuple(tuple):
    """A tuple that knows how deep it is."""

    depth: int


class _Machine:
    """Runs a pickle without building what it describes."""

    def __init__(self) -> None:
        self.storages: dict[str, int] = {}
        self.result: Any = None
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: Stream, max_steps: int) -> "_Machine":
        """Raises Forbidden or Malformed."""
        try:
            for name, argument in _steps(stream, max_steps):
                if name == "STOP":
                    self.result = self._stack.pop()
                    return self
                if name not in self._STEPS:
                    raise Forbidden(name)
                self._STEPS[name](self, argument)
        except (IndexError, KeyError, TypeError):
            raise Malformed("its pickle is broken") from None
        raise Malformed("its pickle has no end")

    def _push(self, argument: Any) -> None:
        self._stack.append(argument)

    def _push_other(self, argument: Any) -> None:
        self._stack.append(None)

    def _pop(self, argument: Any) -> None:
        self._stack.pop()

    def _protocol(self, argument: Any) -> None:
        pass

    def _remember(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _mark(self, argument: Any) -> None:
        self._marks.append(len(self._stack))

    def _to_mark(self, argument: Any) -> None:
        del self._stack[self._marks.pop() :]

    def _marked_tuple(self, argument: Any) -> None:
        self._tuple(self._marks.pop())

    def _last_as_tuple(self, count: int) -> None:
        self._tuple(len(self._stack) - count)

    def _tuple(self, start: int) -> None:
        """Replace everything on the stack from `start` on by one tuple."""
        if start < 0:
            raise IndexError
        found = _Tuple(self._stack[start:])
        found.depth = 1 + max((value.depth for value in found if type(value) is _Tuple), default=0)
        if found.depth > MAX_DEPTH:
            raise Malformed("its values are nested too deeply")
        self._stack[start:] = [found]

    def _name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        if (module, name) not in KNOWN:
            raise Forbidden(f"{module}.{name}"[:80])
        self._stack.append(name)

    def _call(self, argument: Any) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if called not in CALLABLE or (called == "OrderedDict" and arguments != ()):
            raise Forbidden("a call")
        self._stack.append(None)

    def _storage(self, argument: Any) -> None:
        key, size = _storage_size(self._stack.pop())
        if self.storages.setdefault(key, size) != size:
            raise Malformed(f"it gives two sizes for tensor data {key!r}")
        self._stack.append(None)

    def _marked_items(self, argument: Any) -> None:
        self._items(self._marks.pop())

    def _item(self, argument: Any) -> None:
        self._items(len(self._stack) - 2)

    def _items(self, start: int) -> None:
        """Drop the items of a dict from the stack. Their keys must be text or numbers, as the hash
        of a tuple can take forever."""
        if any(type(key) not in (str, int) for key in self._stack[start::2]):
            raise Malformed("a name in it is neither text nor a number")
        del self._stack[start:]

    _STEPS: ClassVar[dict[str, Callable[["_Machine", Any], None]]] = {
        "PROTO": _protocol,
        **dict.fromkeys(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING"), _push),
        **dict.fromkeys(("EMPTY_DICT", "EMPTY_LIST", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"), _push_other),
        **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), _recall),
        "MARK": _mark,
        "TUPLE": _marked_tuple,
        "EMPTY_TUPLE": lambda machine, _: machine._last_as_tuple(0),
        "TUPLE1": lambda machine, _: machine._last_as_tuple(1),
        "TUPLE2": lambda machine, _: machine._last_as_tuple(2),
        "TUPLE3": lambda machine, _: machine._last_as_tuple(3),
        "GLOBAL": _name,
        "REDUCE": _call,
        "BINPERSID": _storage,
        "SETITEMS": _marked_items,
        "SETITEM": _item,
        "APPENDS": _to_mark,
        **dict.fromkeys(("APPEND", "BUILD"), _pop),
    }


def _storage_size(description: Any) -> tuple[str, int]:
    """(key, bytes) of a storage's description: ("storage", its type, key, device, number of
    elements), and in old files a sixth entry, None."""
    known = type(description) is _Tuple and len(description) in (5, 6) and description[0] == "storage"
    if not known or description[5:] not in ((), (None,)):
        raise Malformed("it refers to something that is not tensor data")
    _, kind, key, _, count = description[:5]
    if kind not in STORAGES or type(key) is not str or type(count) is not int or not 0 <= count < 2**60:
        raise Malformed("it describes tensor data in a way that torch does not write")
    return key, count * STORAGES[kind]
