"""Sinks: what shows or stores the events of a run. A sink that fails does not stop the run."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

from litlora.console import say
from litlora.report.events import Event


class Sink(ABC):
    """Shows or stores events; only the process of rank 0 has sinks."""

    fatal: tuple[type[Exception], ...] = ()
    """Errors of `handle` that end the run. Any other error is reported once, and the run goes
    on."""

    @abstractmethod
    def handle(self, event: Event) -> None:
        """Take one event; what a sink does not know it ignores."""

    def close(self) -> None:
        """The run has ended, also by an error."""
        return  # most hold nothing that needs closing


class Sinks(Sink):
    """Several sinks as one: each gets every event, in order, even if another one fails."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self._failed: set[int] = set()  # by id: a sink need not be hashable

    def add(self, *sinks: Sink) -> None:
        """They get the events from now on."""
        self._sinks += sinks

    def handle(self, event: Event) -> None:
        for sink in self._sinks:
            try:
                sink.handle(event)
            except sink.fatal:
                raise
            except Exception as error:
                self._report(sink, error)

    def close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._report(sink, error)

    def _report(self, sink: Sink, error: Exception) -> None:
        if id(sink) in self._failed:
            return
        self._failed.add(id(sink))
        with suppress(OSError):
            say(
                f"note: {type(sink).__name__} failed ({type(error).__name__}: {error}); training continues",
                file=sys.stderr,
            )


def say_if_possible(line: str, *, file: TextIO) -> None:
    """Print a line if there is room for it: a full disk under a log must not end the run."""
    try:
        say(line, file=file)
    except BrokenPipeError:
        raise
    except OSError:
        pass
