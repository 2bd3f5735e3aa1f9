"""Files as streams of bytes, unpacked on the way. Torch-free."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from litlora.data.files.extras import pyarrow
from litlora.errors import DataError

UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""How UTF-16 begins; UTF-32 begins with the first of them."""


@contextmanager
def unpacked(file: Path, compression: str | None) -> Iterator[BinaryIO]:
    """The content of a file, which must not be UTF-16."""
    with file.open("rb") as opened:
        stream: io.BufferedReader = opened
        if compression == "gzip":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=opened))
        elif compression == "zstd":
            stream = io.BufferedReader(_Zstd(file, opened))
        if stream.peek(2)[:2] in UTF16:
            raise DataError(
                f'{file}: is not UTF-8 text but UTF-16 ("Unicode" in Windows programs); save it as UTF-8, '
                "or: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
            )
        yield stream


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
