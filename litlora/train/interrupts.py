"""What ends a run before its last step: SIGINT (Ctrl-C), SIGTERM (preemption), SIGHUP (the terminal
was closed), and the time limit, max_time."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType
from typing import Any

from litlora.settings.launch import is_first_here
from litlora.train.parallel import Parallel


class Stop(IntEnum):
    """Why a run stops early. A signal has the exit status of the process that it ends; where ranks
    disagree, the largest counts."""

    TIME = 1
    SIGHUP = 129
    SIGINT = 130
    SIGTERM = 143

    @property
    def status(self) -> int:
        """The exit status that a shell reports for the signal; 0 when the time is up."""
        return 0 if self is Stop.TIME else int(self)

    def __str__(self) -> str:
        return "max_time" if self is Stop.TIME else self.name


class GivenUp(Exception):
    """Raised by a signal inside `Interrupts.at_once`."""


class Interrupts:
    """Inside `with`, the first signal of `Stop` asks the loop to end after the current step; a
    second one ends the process at once.

    SIGHUP stays ignored where it already is, as under nohup.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        """The time is counted from here."""
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal: Stop | None = None
        self._at_once = False

    def __enter__(self) -> "Interrupts":
        self._terminals = [stream for stream in (0, 1, 2) if os.isatty(stream)]
        numbers = [stop - 128 for stop in Stop if stop is not Stop.TIME]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        self._former = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, parallel: Parallel) -> Iterator[None]:
        """A long block that a signal ends at once, with GivenUp. With several devices it runs to
        its end, as all ranks must agree."""
        self._at_once = parallel.world_size == 1
        try:
            if self._at_once and self._signal is not None:
                raise GivenUp
            yield
        finally:
            self._at_once = False

    def asked(self, parallel: Parallel) -> Stop | None:
        """Why to stop, or None: the same on all ranks, which must call this together."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        stop = parallel.largest(self._signal or (Stop.TIME if late else 0))
        return Stop(stop) if stop else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = Stop(128 + number)
        if self._signal is Stop.SIGHUP:
            nowhere = os.open(os.devnull, os.O_RDWR)
            # Writing to a closed terminal must not end the run before it is saved.
            for stream in self._terminals:
                os.dup2(nowhere, stream)
        if is_first_here():
            with suppress(OSError):  # the message may be lost
                # Not print(): the signal may have interrupted one.
                os.write(2, f"\n{self._signal}: stopping after this step; once more ends at once\n".encode())
        if self._at_once:
            raise GivenUp
