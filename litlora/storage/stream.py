"""A new file that is written in order, in large pieces, in the background; past the page cache if
nobody will read it soon.

Memory for the page cache and the copy into it are most of what writing gigabytes takes of a
processor, and whoever wants them on the disk waits for them once more. Direct I/O takes the bytes
from where they are. It is used where the file system lies on a block device: others may refuse it,
or send every piece through a network and wait.
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
"""Bytes written at a time: a multiple of whatever a disk wants to get at once."""
FLUSH = 64 << 20
"""Bytes written to the page cache before the disk is asked to take them: who syncs the file at its
end then waits for the last only."""
WAITING = 4
"""Calls that may wait for a thread in the background."""


class Background:
    """Runs calls one after the other in a thread of its own, a few at most waiting: one block is
    written while the next is computed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def wait(self) -> None:
        """Until all is done. Raises what a call raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self, *, cancel: bool) -> None:
        """End the thread, without what still waits if asked to. Raises what a call raised unless
        that is so."""
        self._pool.shutdown(cancel_futures=cancel)
        if not cancel:
            self.wait()

    def run(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Raises what an earlier call raised."""
        if len(self._waiting) == WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(call, *arguments))


class OutputStream:
    """What zipfile needs of a file: written in order, only that bytes written before may be written
    again.

    A failure to write may be raised by any later call.
    """

    def __init__(self, path: Path, *, cached: bool) -> None:
        """`cached`: what is written stays in the page cache, for someone who reads it next."""
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        on_a_device = os.major(os.fstat(self._handle).st_dev) != 0
        self._direct = getattr(os, "O_DIRECT", 0) if on_a_device and not cached else 0
        # One is filled while WAITING others wait and one is written. Maps begin where direct I/O
        # wants its bytes to begin.
        self._pieces = deque(np.frombuffer(mmap.mmap(-1, PIECE), np.uint8) for _ in range(WAITING + 2))
        self._start = self._flushed = self._end = self._position = 0
        self._again: list[tuple[int, np.ndarray]] = []
        self._writer, self._flusher = Background(), Background()

    def write(self, data: Any) -> int:
        """Take bytes; what they lie in may be used again afterwards."""
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
        """To some place in what was written, or its end."""
        assert position <= self._end
        self._position = position
        return position

    def flush(self) -> None:
        """Hand everything to the system."""
        self._writer.wait()
        if self._flushed < self._end:
            self._put(self._pieces[0][: self._end - self._start], self._start)
            self._flushed = self._end
        for offset, data in self._again:
            self._put(data, offset)
        self._again.clear()

    def close(self, *, cancel: bool) -> None:
        """End it, in order or (`cancel`) because something else failed."""
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
                direct = self._direct = 0  # not here, or not what is left after a part was written
            else:
                data, offset = data[count:], offset + count
