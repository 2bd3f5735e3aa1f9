"""A new file that is written in order, in large pieces, in the background, and past the page cache
if nobody will read it soon.

Most of the processor time of writing gigabytes is spent on memory for the page cache and on the
copy into it, and syncing the file then waits for the disk once more. Direct I/O takes the bytes
from where they are. It is used where the file system is on a block device: other file systems may
refuse it, or send each piece through a network and wait.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 4 << 20
"""Bytes written at a time: a multiple of every disk's block size."""
FLUSH = 64 << 20
"""Bytes written to the page cache before the disk is asked to take them, so that a sync at the end
waits only for the last of them."""
WAITING = 4
"""Calls that may wait for a background thread."""


class Background:
    """Runs calls in order in a thread of its own, so that one block is written while the next is
    computed. At most WAITING calls wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def wait(self) -> None:
        """Wait until all calls are done. Raises what a call raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self, *, cancel: bool) -> None:
        """End the thread. With `cancel`, drop the calls that wait; otherwise raise what a call
        raised."""
        self._pool.shutdown(cancel_futures=cancel)
        if not cancel:
            self.wait()

    def run(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have `call(*arguments)` run. Raises what an earlier call raised."""
        if len(self._waiting) == WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))


class OutputStream:
    """What zipfile needs of a file: writing in order, and rewriting bytes that were written before.

    Any later call may raise the error of a failed write.
    """

    def __init__(self, path: Path, *, cached: bool) -> None:
        """`cached`: what is written stays in the page cache, for a reader that follows."""
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        on_a_device = os.major(os.fstat(self._handle).st_dev) != 0
        self._direct = getattr(os, "O_DIRECT", 0) if on_a_device and not cached else 0
        # One piece is filled while WAITING others wait and one is written. Direct I/O needs the
        # alignment that maps have.
        self._pieces = deque(np.frombuffer(mmap.mmap(-1, PIECE), np.uint8) for _ in range(WAITING + 2))
        self._start = self._flushed = self._end = self._position = 0
        self._again: list[tuple[int, np.ndarray]] = []
        self._writer, self._flusher = Background(), Background()

    def write(self, data: Any) -> int:
        """Write bytes. Their buffer may be reused afterwards."""
        view = np.frombuffer(data, np.uint8)
        if self._position < self._end:
            assert self._position + view.size <= self._end
            self._again.append((self._position, view.copy()))
        self._position += view.size
        while self._end < self._position:
            used = self._end - self._start
            part = view[self._end - self._position :][: PIECE - used]
            self._pieces[0][used : used + part.size] = part
            self._end += part.size
            if used + part.size == PIECE:
                self._writer.run(self._put, self._pieces[0], self._start, self._direct)
                self._pieces.rotate(-1)
                self._start = self._end
                if not self._direct and self._start % FLUSH == 0:
                    self._flusher.run(os.fsync, self._handle)
        return view.size

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        """Go to a position in what was written, or to its end."""
        assert position <= self._end
        self._position = position
        return position

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._writer.wait()
        if self._flushed < self._end:
            self._put(self._pieces[0][: self._end - self._start], self._start)
            self._flushed = self._end
        for offset, data in self._again:
            self._put(data, offset)
        self._again.clear()

    def close(self, *, cancel: bool) -> None:
        """Close the file. `cancel`: drop what is not yet written, because something else failed."""
        try:
            for background in (self._writer, self._flusher):
                background.close(cancel=cancel)
            if not cancel:
                self.flush()
        finally:
            os.close(self._handle)

    def _put(self, data: np.ndarray, offset: int, direct: int = 0) -> None:
        while data.size:
            try:
                fcntl.fcntl(self._handle, fcntl.F_SETFL, self._flags | direct)
                count = os.pwrite(self._handle, data, offset)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                # The file system refuses direct I/O, or its alignment is lost after a partial
                # write.
                direct = self._direct = 0
            else:
                data, offset = data[count:], offset + count
