"""Files as streams of bytes, unpacked on the way. Torch-free."""

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from litlora.data.files.extras import pyarrow
from litlora.errors import DataError


@contextmanager
def unpacked(file: Path, compression: str | None) -> Iterator[BinaryIO]:
    """The content of a file, which must not be UTF-16 or UTF-32."""
    with file.open("rb") as opened:
        stream: io.BufferedReader = opened
        if compression == "gzip":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=opened))
        elif compression == "zstd":
            stream = io.BufferedReader(_Zstd(file, opened))
        if (name := _wide_encoding(stream.peek(4)[:4])) is not None:
            raise DataError(
                f'{file}: is not UTF-8 text but {name} ("Unicode" in Windows programs); save it as UTF-8, '
                f"or: iconv -f {name} -t UTF-8 FILE > NEW_FILE"
            )
        yield stream


def _wide_encoding(start: bytes) -> str | None:
    """The encoding of a text that begins so, if it has two or four bytes to a character: it has a
    byte order mark, or the first character, one of ASCII, has bytes that are zero."""
    if len(start) < 2:
        return None
    for mark, name in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32")):
        if start == mark:
            return name
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "UTF-16"
    if 0 not in start[:2]:
        return None
    return f"UTF-{32 if start.count(0) > 2 else 16}{'BE' if start[0] == 0 else 'LE'}"


class _Zstd(io.RawIOBase):
    """A file in zstd's format, unpacked by pyarrow."""

    def __init__(self, file: Path, opened: BinaryIO) -> None:
        arrow = pyarrow(file, "a file in zstd's format")
        self._name = file
        self._stream = arrow.CompressedInputStream(opened, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self._stream.readinto(buffer)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be unpacked, it may be incomplete: {error}") from None
