"""Large data to examples, on all processors: pieces of the files go to processes that read and
encode them, and come back in the order of the data. Torch-free."""

import base64
import os
import pickle
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from tqdm import tqdm

from litlora import errors
from litlora.data.conversation import Place
from litlora.data.files import MAX_RECORD, Entry
from litlora.data.parts import Part, Setup
from litlora.data.sources import Records
from litlora.errors import DataError, UserError
from litlora.ram import free_ram
from litlora.report.console import duration
from litlora.worker import Worker

PIECE = 2**20
"""Bytes of a file, or characters of records, that a process gets at a time, about."""
LONGEST_LINE = 4 * MAX_RECORD
"""Bytes after which a line has more than MAX_RECORD characters, whatever they are."""
PROCESS_MEMORY = 2**29
"""Bytes that a process may take, with its tokenizer and chat template. Most take a quarter."""
SECONDS_A_LINE = 30
"""Between two lines about the progress, where there is no terminal."""


@dataclass(frozen=True)
class Piece:
    """Consecutive records, as the question to `encode_process`."""

    question: dict[str, Any]
    size: int
    """Of the data's bytes, about."""


def pieces(records: Records) -> Iterator[Piece]:
    """The data in pieces. Files of JSON lines are cut between lines, unparsed."""
    for number, part in enumerate(records.parts):
        reader, source = _pickled(part.reader), number if part.in_lines() else None
        found = [_entry_pieces(part)] if source is None else map(_line_pieces, part.files)
        for piece in chain.from_iterable(found):
            piece.question.update(reader=reader, source=source)
            yield piece


def encoded(records: Records, setup: Setup, num_bytes: int) -> Iterator[tuple[int, Part]]:
    """The parts of the data in their order, with the size of their pieces, while the next ones are
    being made. Raises the error of the first piece that has one."""
    with _Processes(setup, num_processes(num_bytes)) as processes:
        yield from processes.answers(pieces(records))


def num_processes(num_bytes: int) -> int:
    """How many processes to encode so much data with."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    free = free_ram()
    fitting = processors if free is None else free // 2 // PROCESS_MEMORY
    return max(1, min(processors, fitting, num_bytes // PIECE))


class Progress:
    """How far the data is: a bar on a terminal, else a line now and then."""

    def __init__(self, num_bytes: int, say: Callable[[str], None]) -> None:
        self._total, self._done, self._records, self._say = num_bytes, 0, 0, say
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=num_bytes, unit="B", unit_scale=True, desc="tokenised", dynamic_ncols=True)
        self._started = self._said = time.monotonic()

    def add(self, num_bytes: int, num_records: int) -> None:
        num_bytes = min(num_bytes, self._total - self._done)  # an estimate may be too large
        self._done += num_bytes
        self._records += num_records
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._records:,} records", refresh=False)
            self._bar.update(num_bytes)
        elif now - self._said >= SECONDS_A_LINE and self._done:
            self._said = now
            left = (now - self._started) * (self._total - self._done) / self._done
            self._say(
                f"data: {self._done / self._total:.0%} tokenised, {self._done / 1e6:,.0f} of "
                f"{self._total / 1e6:,.0f} MB, {self._records:,} records; {duration(left)} left"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Processes:
    """Processes that answer pieces with parts. At the end of the block they end, whatever they were
    doing."""

    def __init__(self, setup: Setup, number: int) -> None:
        program = Path(__file__).with_name("encode_process.py")
        first = {"setup": _pickled(setup)}
        # One thread of the tokenizer in each, as there is one for each processor.
        self._workers = [Worker(program, first, RAYON_NUM_THREADS="1") for _ in range(number)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(number)

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()

    def answers(self, questions: Iterable[Piece]) -> Iterator[tuple[int, Part]]:
        waiting: deque[tuple[int, Future[Part]]] = deque()
        for piece in questions:
            waiting.append((piece.size, self._threads.submit(self._ask, piece)))
            if len(waiting) > 2 * len(self._workers):  # some more than are being answered
                size, answer = waiting.popleft()
                yield size, answer.result()
        for size, answer in waiting:
            yield size, answer.result()

    def _ask(self, piece: Piece) -> Part:
        worker = self._idle.get()
        reply = worker.ask(piece.question)
        self._idle.put(worker)
        if reply is None:
            raise UserError(
                "a process that tokenises the data has ended: perhaps the machine has too little memory; "
                "end other programs, and start again"
            )
        if "refused" in reply:
            kind, message = reply["refused"]
            raise getattr(errors, kind)(message)
        assert "part" in reply, reply["failed"]
        return pickle.loads(base64.b64decode(reply["part"]))


def _line_pieces(file: Path) -> Iterator[Piece]:
    start, line = 0, 1
    try:
        with file.open("rb") as opened:
            while content := opened.read(PIECE):
                more = opened.readline(LONGEST_LINE)
                content += more
                stop, passed = start + len(content), 0
                if len(more) == LONGEST_LINE and not more.endswith(b"\n"):
                    if b"\r" in more:  # which ends lines too
                        content = content[: content.rindex(b"\r") + 1]
                        stop = opened.seek(start + len(content))
                    else:  # the reader refuses the line, whatever follows
                        content, passed = _whole_characters(content), 1
                        stop += _pass_line(opened)
                question = {"file": str(file), "start": start, "stop": start + len(content), "line": line}
                yield Piece(question, stop - start)
                start = stop
                line += content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n") + passed
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _whole_characters(text: bytes) -> bytes:
    """The text without a character at its end of which only a part is there."""
    for size in range(1, min(4, len(text)) + 1):
        if text[-size] & 0xC0 != 0x80:  # where a character begins
            return text if text[-size] < 0x80 else text[:-size]
    return text


def _pass_line(opened: BinaryIO) -> int:
    """Go to the start of the next line; returns how many bytes away it was."""
    passed = 0
    while more := opened.read(PIECE):
        if end := re.search(rb"\r\n?|\n", more):
            opened.seek(end.end() - len(more), os.SEEK_CUR)
            return passed + end.end()
        passed += len(more)
    return passed


def _entry_pieces(records: Records) -> Iterator[Piece]:
    group, size = [], 0
    for entry in records.entries():
        group.append(entry)
        size += _characters(entry[1])
        if size >= PIECE:
            yield _entry_piece(group, size)
            group, size = [], 0
    if group:
        yield _entry_piece(group, size)


def _entry_piece(group: list[Entry], size: int) -> Piece:
    try:
        return Piece({"entries": _pickled(group)}, size)
    except RecursionError:
        return Piece({"entries": _pickled([_flat(place, value) for place, value in group])}, size)


def _flat(place: Place, value: Any) -> Entry:
    """The entry, if it can be sent to another process; else with the error that says why not."""
    try:
        _pickled(value)
        return place, value
    except RecursionError:
        return place, DataError(f"{place}: is nested too deeply")


def _characters(value: Any) -> int:
    """How long a record is as JSON, about."""
    size, inside = 0, [value]
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            size += sum(len(name) + 6 for name in value)
            inside += value.values()
        elif isinstance(value, list):
            size += 2 * len(value)
            inside += value
        else:
            size += len(value) + 2 if isinstance(value, str) else 8
    return size


def _pickled(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()
