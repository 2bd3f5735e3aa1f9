"""Examples in a directory on the disk, for data larger than memory. Torch-free.

    header.json        what the other files hold, and a hash of itself
    examples.bin       of each example its ids, then (start, stop) of its learned spans, and a checksum
    offsets.bin        where each of them begins in examples.bin, in 32-bit integers
    lengths.bin        the number of ids of each
    conversations.bin  the number of the conversation that each comes from
    events.bin         (conversation, number of an event in EVENTS, how often) of what was done
    hash-*.txt         hashes of examples, as they were needed: see `StoredExamples.hash`

All values are 32-bit integers, those of offsets.bin have 64 bits. They are read, not mapped: pages
of a mapped file count as memory of the process, and a file that another program cuts ends it.
"""

import hashlib
import json
import os
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, overload

import numpy as np

from litlora.data.examples import EVENTS, Example, Examples, drawn, no_example_left
from litlora.data.parts import Part, checksum
from litlora.data.skipped import NAMED, skipped_notice
from litlora.errors import DataError
from litlora.storage.atomic import replacing_file

HEADER = "header.json"
PARTS = ("examples", "offsets", "lengths", "conversations", "events")
BLOCK = 2**12
"""Examples whose offsets are read at a time."""


class Broken(Exception):
    """A store whose files are not what its header says."""


class StoreWriter:
    """Writes a store, part by part, into an empty directory."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._stack = directory, ExitStack()
        self._files = {
            name: self._stack.enter_context((directory / f"{name}.bin").open("wb")) for name in PARTS
        }
        self._offset = self.num_conversations = self.num_skipped = 0
        self._first, self.skipped = "", []
        self._checksums = dict.fromkeys(PARTS, 0)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def add(self, part: Part) -> None:
        """Append the next conversations."""
        sizes = np.frombuffer(part.sizes, np.int32)
        starts = self._offset + np.cumsum(sizes, dtype=np.int64) - sizes
        events = np.frombuffer(part.events, np.int32).reshape(-1, 3)
        conversations = np.frombuffer(part.conversations, np.int32)
        content = {
            "examples": part.examples,
            "offsets": starts.tobytes(),
            "lengths": part.lengths,
            "conversations": (conversations + np.int32(self.num_conversations)).tobytes(),
            "events": (events + np.array([self.num_conversations, 0, 0], np.int32)).tobytes(),
        }
        for name, bytes_ in content.items():
            self._write(name, bytes_)
        self._offset += int(sizes.sum(dtype=np.int64))
        self.num_conversations += part.num_conversations
        self._first = self._first or part.first
        self.num_skipped += part.num_skipped
        self.skipped += part.skipped[: NAMED - len(self.skipped)]

    def _write(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        if name != "examples":  # of which each has its own
            self._checksums[name] = zlib.crc32(content, self._checksums[name])

    def finish(self) -> None:
        """Write the header: only now it is a store."""
        self._write("offsets", np.array([self._offset], np.int64).tobytes())
        self._stack.close()
        header = {
            "num_conversations": self.num_conversations,
            "first": self._first,
            "num_skipped": self.num_skipped,
            "skipped": self.skipped,
            "sizes": {name: (self._directory / f"{name}.bin").stat().st_size for name in PARTS},
            "checksums": self._checksums,
        }
        text = json.dumps({**header, "hash": _header_hash(header)})
        (self._directory / HEADER).write_text(text, encoding="utf-8")


class Store:
    """A store that has been written, open for reading. It stays readable after its removal."""

    def __init__(self, directory: Path) -> None:
        """Raises FileNotFoundError if there is none, Broken if it is not whole."""
        self.directory = directory
        try:
            header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
            found = header.pop("hash")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Broken(f"{directory / HEADER}: is not a header") from None
        if found != _header_hash(header):
            raise Broken(f"{directory / HEADER}: its hash is wrong")
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close, self._descriptors)
        for name in PARTS:
            path = directory / f"{name}.bin"
            try:
                self._descriptors[name] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise Broken(f"{path}: {error.strerror}") from None
            size = os.fstat(self._descriptors[name]).st_size
            if size != header["sizes"][name]:
                raise Broken(f"{path}: has {size:,} bytes instead of {header['sizes'][name]:,}")
            if name != "examples" and self._checksum(name, size) != header["checksums"][name]:
                raise Broken(f"{path}: is damaged")
        self.num_conversations: int = header["num_conversations"]
        self.first: str = header["first"]
        self.num_skipped: int = header["num_skipped"]
        self.skipped: list[str] = header["skipped"]

    def _checksum(self, name: str, size: int) -> int:
        found = 0
        for start in range(0, size, 2**20):
            found = zlib.crc32(self._bytes(name, start, min(2**20, size - start)), found)
        return found

    def array(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray:
        """Values of one of the files."""
        kind = np.dtype(np.int64 if name == "offsets" else np.int32)
        if count is None:
            count = os.fstat(self._descriptors[name]).st_size // kind.itemsize - start
        return np.frombuffer(self._bytes(name, start * kind.itemsize, count * kind.itemsize), kind)

    def example(self, start: int, stop: int, length: int) -> Example:
        """The example of so many ids that stands there in examples.bin."""
        content = self._bytes("examples", 4 * start, 4 * (stop - start))
        ids = array("i", content[: 4 * length])
        if checksum(content[:-4]) != content[-4:]:
            raise DataError(
                f"{self.directory / 'examples.bin'}: is damaged; remove {self.directory}, and start again"
            )
        bounds = iter(array("i", content[4 * length : -4]))
        return Example(ids, tuple(zip(bounds, bounds, strict=True)))

    def _bytes(self, name: str, start: int, count: int) -> bytes | bytearray:
        found = os.pread(self._descriptors[name], count, start)
        if len(found) < count:  # Linux reads at most 2 GiB at a time
            found = bytearray(found)
            while len(found) < count:
                more = os.pread(self._descriptors[name], count - len(found), start + len(found))
                if not more:
                    raise DataError(f"{self.directory / f'{name}.bin'}: was cut while it was in use")
                found += more
        return found

    def notices(self) -> list[str]:
        """What the user must know of the records that were left out."""
        return [skipped_notice(self.num_skipped, self.skipped)] if self.num_skipped else []

    def split(
        self, val_fraction: float, seed: int, max_seq_length: int
    ) -> "tuple[Examples, Examples | None]":
        """(training, validation), of the same conversations as `examples.split` draws from a list;
        knowing which have an example. Raises DataError if there is none."""
        held_out = np.zeros(self.num_conversations, bool)
        held_out[drawn(self.num_conversations, val_fraction, seed, self.array("conversations"))] = True
        if not held_out.any():
            return self._of(None, max_seq_length), None
        return self._of(~held_out, max_seq_length), self._of(held_out, max_seq_length)

    def _of(self, wanted: np.ndarray | None, max_seq_length: int) -> Examples:
        """The examples of the conversations that are `wanted`, or all."""
        events = self.array("events").reshape(-1, 3)
        chosen = None
        if wanted is not None:
            events = events[wanted[events[:, 0]]]
            chosen = np.flatnonzero(wanted[self.array("conversations")]).astype(np.int32)
        counts = np.bincount(events[:, 1], events[:, 2], minlength=len(EVENTS)).astype(int).tolist()
        found = StoredExamples(self, chosen)
        if not len(found):
            raise no_example_left(max_seq_length, self.first, self.notices())
        return Examples(found, *counts)


class StoredExamples(Sequence[Example]):
    """Examples of a store; in memory are their lengths alone."""

    def __init__(self, store: Store, chosen: np.ndarray | None) -> None:
        """Those with the numbers `chosen`, in rising order, or all."""
        lengths = store.array("lengths")
        self._store, self._chosen = store, chosen
        self.lengths = array("i", (lengths if chosen is None else lengths[chosen]).tobytes())

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number = index if self._chosen is None else int(self._chosen[index])
        start, stop = self._store.array("offsets", number, 2).tolist()
        return self._store.example(start, stop, self.lengths[index])

    def __iter__(self) -> Iterator[Example]:
        """In order, many at a time."""
        index = 0
        while index < len(self):
            numbers = range(index, min(len(self), index + BLOCK))
            if self._chosen is not None:
                numbers = self._chosen[numbers.start : numbers.stop].tolist()
            first = numbers[0]
            offsets = self._store.array("offsets", first, numbers[-1] - first + 2).tolist()
            for number in numbers:
                start, stop = offsets[number - first : number - first + 2]
                yield self._store.example(start, stop, self.lengths[index])
                index += 1

    def hash(self, content: Callable[[Example], bytes]) -> str:
        """16 hex digits over the content of each example. They are kept in the store, so `content`
        must be a function whose name says what it does."""
        digest = hashlib.sha256(f"{content.__module__}.{content.__qualname__} {len(self)} ".encode())
        digest.update(b"" if self._chosen is None else self._chosen)
        file = self._store.directory / f"hash-{digest.hexdigest()[:32]}.txt"
        with suppress(OSError):
            known = file.read_text()
            if len(known) == 16:
                return known
        digest = hashlib.sha256()
        for example in self:
            digest.update(content(example))
        with suppress(OSError), replacing_file(file) as staging:  # it may be read-only, or removed
            staging.write_text(digest.hexdigest()[:16])
        return digest.hexdigest()[:16]


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """The number of ids of each example, which those on the disk have at hand."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return array("i", (len(example.ids) for example in examples))


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _header_hash(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
