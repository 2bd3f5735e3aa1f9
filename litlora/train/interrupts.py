"""What ends a run before its last step: SIGINT (Ctrl-C), SIGTERM (preemption), SIGHUP (the terminal
is gone), --train.max_time."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType
from typing import Any

import torch

from litlora.train.fabric import Fabric


class Stop(IntEnum):
    """Why a run stops early; a signal by the exit status of what it ends. Where devices disagree,
    the larger counts."""

    TIME = 1
    SIGHUP = 129
    SIGINT = 130
    SIGTERM = 143

    @property
    def status(self) -> int:
        """The exit status: that of a process ended by the signal, as the shell sees it; 0 if the
        time was up."""
        return 0 if self is Stop.TIME else int(self)

    def __str__(self) -> str:
        return "--train.max_time" if self is Stop.TIME else self.name


class GivenUp(Exception):
    """Raised by a signal inside `Interrupts.at_once`."""


class Interrupts:
    """Inside `with`, the first signal of `Stop` asks the loop to end after its step; a second one
    ends the process at once.

    SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        """The time runs from here."""
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
    def at_once(self, fabric: Fabric) -> Iterator[None]:
        """A long block that a signal may end in the middle with GivenUp. With several devices it
        does not: they must agree."""
        self._at_once = fabric.world_size == 1
        try:
            if self._at_once and self._signal is not None:
                raise GivenUp
            yield
        finally:
            self._at_once = False

    def asked(self, fabric: Fabric) -> Stop | None:
        """Whether to stop, and why: the same on all devices, which must call this together."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        stop = self._signal or (Stop.TIME if late else None)
        if fabric.world_size > 1:
            votes = fabric.all_gather(torch.tensor(stop or 0, device=fabric.device))
            stop = Stop(most) if (most := int(votes.max())) else None
        return stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = Stop(128 + number)
        if self._signal is Stop.SIGHUP:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (
                self._terminals
            ):  # what is said to a terminal that is gone must not end the run before it is saved
                os.dup2(nowhere, stream)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):  # whatever becomes of the words
                # Not print(): the signal may come in the middle of one.
                os.write(2, f"\n{self._signal}: stopping after this step; once more ends at once\n".encode())
        if self._at_once:
            raise GivenUp
