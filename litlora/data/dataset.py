"""Datasets: the records that were chosen, as conversations. Torch-free."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from litlora.data.choosing import (
    Choice,
    Survey,
    choose,
    overlap,
    overlap_notice,
    repeats,
    repeats_notice,
)
from litlora.data.conversation import Conversation
from litlora.data.files import Entry, bytes_in_memory, entries_of, in_lines
from litlora.data.records import RecordReader
from litlora.data.skipped import Skipped
from litlora.errors import DataError
from litlora.settings import DataSource, Mix

LARGE = 16 * 2**20
"""Bytes of files above which their records stay on the disk: see `data/cache.py`."""


@dataclass(frozen=True)
class Records:
    """The records of some files. Each iteration reads them anew, as conversations."""

    files: tuple[Path, ...]
    reader: RecordReader
    times: array | None = None
    """How often each record is taken; None: once."""
    most: int | None = None
    """At most so many are taken, the first ones."""
    held: tuple[Entry, ...] | None = None
    """The entries of the files, where they have been read already."""
    survey: Survey | None = None
    """Notes what the first pass over all records sees."""

    @property
    def was_read(self) -> bool:
        """Whether a pass came to the end, and the survey has all that was read."""
        return self.survey is not None and (self.survey.complete or self.most is not None)

    @property
    def parts(self) -> tuple["Records", ...]:
        """The records of each source, with a reader of their own."""
        return (self,)

    def in_lines(self) -> bool:
        """Whether all records are taken, and every file has one record a line, so that they can be
        read in pieces."""
        return (self.times, self.most, self.held) == (None,) * 3 and all(map(in_lines, self.files))

    def entries(self) -> Iterator[Entry]:
        """The records that are taken, as the files have them."""
        return itertools.islice(self._taken(), self.most)

    def __iter__(self) -> Iterator[Conversation]:
        return self.read()

    def read(self, skipped: Skipped | None = None) -> Iterator[Conversation]:
        """The conversations; a bad record is raised, or added to `skipped`, as the reader says."""
        return self.reader.read(self.entries(), skipped)

    def _taken(self) -> Iterator[Entry]:
        seen = Survey() if self.survey is None else Survey(self.survey.ignore)
        try:
            number = -1
            for number, entry in enumerate(self._all()):
                if self.times is not None and number == len(self.times):
                    raise self._changed()
                if self.survey is not None and not self.survey.complete:
                    seen.add(*entry)
                for _ in range(1 if self.times is None else self.times[number]):
                    yield entry
            if self.times is not None and number + 1 < len(self.times):
                raise self._changed()
            seen.complete = True
        finally:
            if self.survey is not None and (seen.complete or self.most is not None):
                self.survey.keep(seen)

    def _changed(self) -> DataError:
        return DataError(f"{self.files[0]}: the data was changed while it was read; start again")

    def note(self, hashes: bytes) -> None:
        """Add to the survey the next records, which another process has read."""
        if self.survey is not None and not self.survey.complete:
            self.survey.hashes.frombytes(hashes)

    def noted(self) -> None:
        """All records are in the survey."""
        if self.survey is not None:
            self.survey.complete = True

    def _all(self) -> Iterator[Entry]:
        if self.held is not None:
            yield from self.held
            return
        yield from entries_of(self.files, self.reader.on_bad, self.reader.ignore)


@dataclass(frozen=True)
class Mixture:
    """The records of several sources, one after the other."""

    parts: tuple[Records, ...]

    def __iter__(self) -> Iterator[Conversation]:
        return self.read()

    def read(self, skipped: Skipped | None = None) -> Iterator[Conversation]:
        """The conversations, as `Records.read` gives them."""
        return itertools.chain.from_iterable(part.read(skipped) for part in self.parts)


Conversations = list[Conversation] | Records | Mixture
"""A list; or, of much data, a stream, which can be read again and again."""


@dataclass(frozen=True)
class Dataset:
    """What a source holds, and the source as it was resolved."""

    conversations: Conversations
    source: DataSource
    notice: str | None = None
    """What the user must know about where the conversations come from."""
    notices: tuple[str, ...] = ()
    """What else is said when training begins: what was left out, and what was chosen."""
    read_once: Path | None = None
    """A file that can be read only once, such as a pipe."""
    validation: Conversations | None = None
    """Validation data of its own; None: a part of the conversations is held out."""

    def late_notices(self) -> tuple[str, ...]:
        """What a pass over all records of a stream has shown: how many repeat others, and how many
        training and validation share. Nothing before that pass, and of a list, whose `notices`
        have it already."""
        if isinstance(self.conversations, list):
            return ()
        val = () if self.validation is None else self.validation.parts
        return _repetition_notices(self.conversations.parts, val, self.source)


def settled(found: Dataset, validation: Records | None) -> Dataset:
    """The data with what its source's settings choose of it, and its own validation data; what is
    small, read. Raises DataError."""
    parts = tuple(replace(part, survey=Survey(part.reader.ignore)) for part in found.conversations.parts)
    val_parts = () if validation is None else (replace(validation, survey=Survey(validation.reader.ignore)),)
    source, notices = found.source, found.notices
    is_small = not source.cache or sum(map(_bytes, (*parts, *val_parts))) <= LARGE
    if isinstance(source, Mix) or source.shuffle or source.drop_duplicates:
        if is_small:
            parts, val_parts = (tuple(map(_held, each)) for each in (parts, val_parts))
        parts, held_out, said = _chosen(parts, val_parts, source)
        val_parts, notices = val_parts or held_out, (*notices, *said)
    elif source.max_examples is not None:
        parts = (replace(parts[0], most=source.max_examples),)
    conversations, val = _joined(parts), _joined(val_parts) if val_parts else None
    if is_small:
        skipped = Skipped()
        conversations = list(conversations.read(skipped))
        val = None if val is None else list(val.read(skipped))
        if skipped.first and not conversations:
            raise DataError(f"{skipped.reasons[0]}; and no other record can be trained on")
        notices = (*notices, *skipped.notices())
    _check_any(conversations, getattr(source, "path", source.name), "train")
    if val is not None:
        _check_any(val, source.val_path or source.name, "validate")
    if is_small:
        notices = (*notices, *_repetition_notices(parts, val_parts, source))
    return replace(found, conversations=conversations, validation=val, notices=notices)


def _repetition_notices(
    training: Sequence[Records], validation: Sequence[Records], source: DataSource
) -> tuple[str, ...]:
    if source.drop_duplicates or not all(part.was_read for part in (*training, *validation)):
        return ()
    surveys, val_surveys = ([part.survey for part in parts] for parts in (training, validation))
    own = source.val_path is not None
    found = [repeats_notice(surveys), overlap_notice(surveys, val_surveys) if own else None]
    return tuple(notice for notice in found if notice is not None)


def _chosen(
    parts: tuple[Records, ...], val_parts: tuple[Records, ...], source: DataSource
) -> tuple[tuple[Records, ...], tuple[Records, ...], list[str]]:
    """The records with how often each is taken; those that are held out of a mixture, whose records
    may be taken several times; and what to say."""
    import numpy as np

    for part in (*parts, *val_parts):
        for _ in part.entries():
            pass
    surveys = [part.survey for part in parts]
    left_out, said = np.array([], dtype=np.int64), []
    if source.drop_duplicates:
        left_out = repeats(surveys)[0]
        said = [f"{len(left_out):,} records that repeat others exactly are left out"] * bool(len(left_out))
        if val_parts:
            shared = np.flatnonzero(overlap(surveys, [part.survey for part in val_parts]))
            said += [f"{len(shared):,} records that are validation data are left out"] * bool(len(shared))
            left_out = np.union1d(left_out, shared)
    is_mix = isinstance(source, Mix)
    choice = Choice(
        source.weights if is_mix else (1.0,),
        source.max_examples,
        at_random=is_mix or source.shuffle,
        val_fraction=source.val_fraction if is_mix and not val_parts else 0.0,
        seed=source.split_seed,
    )
    counts = [len(survey.hashes) for survey in surveys]
    training, held_out = choose(counts, choice, left_out)
    if is_mix:
        said += _mixed(parts, counts, training, held_out)
    elif source.max_examples is not None and sum(training[0]) < counts[0] - len(left_out):
        said += [f"{sum(training[0]):,} of {counts[0]:,} records, chosen by the seed {source.split_seed}"]
    return _taken(parts, training), _taken(parts, held_out) if any(map(any, held_out)) else (), said


def _mixed(
    parts: tuple[Records, ...], counts: list[int], training: list[array], held_out: list[array]
) -> list[str]:
    """A line for each source."""
    return [
        f"{part.files[0] if len(part.files) == 1 else part.files[0].parent}: {sum(times):,} examples of "
        f"{count:,} records to train on, {sum(val):,} to validate"
        for part, count, times, val in zip(parts, counts, training, held_out, strict=True)
    ]


def _taken(parts: tuple[Records, ...], times: list[array]) -> tuple[Records, ...]:
    return tuple(replace(part, times=each) for part, each in zip(parts, times, strict=True))


def _joined(parts: tuple[Records, ...]) -> Records | Mixture:
    return parts[0] if len(parts) == 1 else Mixture(parts)


def _held(records: Records) -> Records:
    return replace(records, held=tuple(records.entries()))


def _bytes(records: Records) -> int:
    return sum(bytes_in_memory(file, LARGE) for file in records.files if records.held is None)


def _check_any(conversations: Conversations, name: str, use: str) -> None:
    if next(iter(conversations), None) is None:
        raise DataError(f"{name}: holds no records; there is nothing to {use} on")
