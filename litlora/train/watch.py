"""Watch: a rank that dies takes the others down, with its name and its reason.

Each rank counts in the store through which the processes found each other, once a second, and looks
there for a rank that has failed. Rank 0 looks after all counts, the others after that of rank 0.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from signal import Signals

import torch

from litlora.console import one_line, say
from litlora.errors import UserError
from litlora.train.parallel import Parallel

INTERVAL = 1.0
"""Seconds between two looks."""
SILENCE = 40.0
"""Seconds without a count, after which a rank is taken for dead. Reading a large file may keep a
process from counting for a while."""
GRACE = 3.0
"""Seconds in which a rank may end by itself, with a message of its own, once another has failed."""


@contextmanager
def watched(parallel: Parallel, closing: Callable[[], str] = lambda: "") -> Iterator[None]:
    """A block in which all ranks work together. If one of them fails, so do all: rank 0 raises
    UserError that names it, with the `closing` words, and every other one ends with status 2."""
    if parallel.world_size == 1:
        yield
        return
    watch = Watch(parallel, closing)
    watch.start()
    try:
        yield
        parallel.barrier()
    except Exception as error:
        watch.fail(error)
    finally:
        watch.end()


class Watch(threading.Thread):
    """Of one rank; see the module."""

    def __init__(self, parallel: Parallel, closing: Callable[[], str] = lambda: "") -> None:
        super().__init__(daemon=True, name="watch")
        self.parallel, self.closing = parallel, closing
        self._name = parallel.broadcast(os.urandom(8).hex())
        """Of this run: torchrun's store lasts for several."""
        self._store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SILENCE),
        )
        self._ended = threading.Event()
        self._speaks = threading.Lock()
        """Held by the thread that ends this process."""
        self._counts: dict[int, tuple[int, float]] = {}
        """{rank: (its last count, when it changed)}."""
        self._ranks = range(1, parallel.world_size) if parallel.is_main else (0,)
        _silence_observer()

    def end(self) -> None:
        """All is done. The thread must not be in a call of torch's when the interpreter ends: that
        would abort the process."""
        self._ended.set()
        if self.is_alive():
            self.join(timeout=5)

    def fail(self, error: Exception) -> None:
        """Tell the others why this rank fails, and raise what ends it."""
        if _is_lost_connection(error):
            reason = self._reason_of_others() or f"lost the connection to another rank: {_first_line(error)}"
            self._raise(UserError(f"{reason}{self.closing()}"), reason)
        self._report(self.parallel.rank, _first_line(error))
        if not isinstance(error, UserError) and not self.parallel.is_main:
            traceback.print_exception(error)
        self._raise(error)

    def _raise(self, error: Exception, reason: str = "") -> None:
        self._speaks.acquire()  # for good: the other thread may be about to end the process
        self.end()
        if not self.parallel.is_main:
            self._say(reason)
        self._end_children()
        if self.parallel.is_main:
            raise error from None
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    # ---- in the thread

    def run(self) -> None:
        while not self._ended.wait(INTERVAL):
            reason = self._look()
            if reason is None or self._ended.wait(GRACE) or not self._speaks.acquire(blocking=False):
                continue
            self._end_children()
            self._say(reason)
            os._exit(2)

    def _say(self, reason: str) -> None:
        """Rank 0 speaks; if it is gone, the next one does."""
        if self.parallel.rank == (1 if reason.startswith("rank 0 ") else 0):
            say(f"error: {one_line(reason + self.closing())}", file=sys.stderr)

    def _look(self) -> str | None:
        """Count, and see who failed, if any rank did."""
        try:
            self._store.add(self._key(f"count/{self.parallel.rank}"), 1)
            self._look_at_children()
            if self._store.check([self._key("failed")]):
                return self._store.get(self._key("failed")).decode()
            self._look_at_counts()
        except (RuntimeError, torch.distributed.DistError):
            return None if self._ended.is_set() else "rank 0 is gone, and with it what the ranks shared"
        return None

    def _look_at_children(self) -> None:
        for local_rank, process in enumerate(self.parallel.children, 1):
            code = process.poll()
            # One that failed by itself has said so.
            if code and not self._store.check([self._key("failed")]):
                how = f"was killed by {Signals(-code).name}" if code < 0 else f"ended with status {code}"
                self._report(self.parallel.rank + local_rank, how)

    def _look_at_counts(self, silence: float = SILENCE) -> None:
        now = time.monotonic()
        for rank in self._ranks:
            count = self._store.add(self._key(f"count/{rank}"), 0)
            before, since = self._counts.get(rank, (-1, now))
            self._counts[rank] = (count, now if count != before else since)
            if now - self._counts[rank][1] > silence:
                self._report(rank, f"has not answered for {silence:.0f} seconds", where="")

    def _reason_of_others(self) -> str | None:
        """Which other rank failed, and why, as soon as that is known."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with suppress(RuntimeError, torch.distributed.DistError):
                self._look_at_children()
                if self._store.check([self._key("failed")]):
                    return self._store.get(self._key("failed")).decode()
                self._look_at_counts(silence=6)
            time.sleep(0.2)
        return None

    def _report(self, rank: int, reason: str, where: str | None = None) -> None:
        host = f" on {socket.gethostname()}" if where is None else where
        words = f"rank {rank} of {self.parallel.world_size}{host}: {reason}"
        with suppress(RuntimeError, torch.distributed.DistError):
            # The first to fail is the cause.
            self._store.compare_set(self._key("failed"), "", words)

    def _key(self, name: str) -> str:
        return f"litlora/{self._name}/{name}"

    def _end_children(self) -> None:
        """The processes that this one has started end, by themselves or not."""
        deadline = time.monotonic() + 2 * GRACE
        for process in self.parallel.children:
            with suppress(Exception):
                process.wait(max(0.1, deadline - time.monotonic()))
            process.kill()


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _is_lost_connection(error: Exception) -> bool:
    """Whether it is what an exchange raises when another rank has gone."""
    text = str(error)
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    is_of_exchange = isinstance(error, torch.distributed.DistError)
    return is_of_exchange or (isinstance(error, RuntimeError) and any(word in text for word in words))


def _silence_observer() -> None:
    """Fabric's thread that kills this very process when a child ends, without a word: this module
    does that, and says why."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []
