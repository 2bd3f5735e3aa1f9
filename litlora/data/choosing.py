"""Which records of the data are taken, and how often. Torch-free.

A `Survey` recognises records that are exactly the same; `choose` settles how often each is taken.
"""

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from litlora.data.conversation import Place
from litlora.data.files import Entry
from litlora.errors import DataError, setting

if TYPE_CHECKING:
    import numpy as np

PLACES = 100_000
"""Of how many records the places are kept, to name the first that repeats another."""


@dataclass
class Survey:
    """What one pass over the records of a source saw: 8 bytes a record."""

    ignore: tuple[str, ...] = ()
    """Fields in which records that are the same may differ."""
    hashes: array = field(default_factory=lambda: array("Q"))
    places: list[Place] = field(default_factory=list)
    complete: bool = False

    def keep(self, other: "Survey") -> None:
        """Take over what another pass saw, if it saw more."""
        if not self.complete and (other.complete or len(other.hashes) > len(self.hashes)):
            self.hashes, self.places, self.complete = other.hashes, other.places, other.complete

    def noting(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """These entries, each noted as it is taken."""
        for entry in entries:
            self.add(*entry)
            yield entry

    def add(self, place: Place, value: Any) -> None:
        """Note a record. The order of its fields, and those that are null, make no difference."""
        if isinstance(value, dict):
            value = {
                name: content
                for name, content in value.items()
                if content is not None and name not in self.ignore
            }
        try:
            text = json.dumps(value, sort_keys=True, default=str)
        except (RecursionError, ValueError, TypeError):  # a value that only its place tells apart
            text = f"{place}"
        self.hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))
        if len(self.places) < PLACES:
            self.places.append(place)


def repeats(surveys: Sequence[Survey]) -> tuple["np.ndarray", "np.ndarray"]:
    """The records that are the same as an earlier one, counted through all surveys, and for each
    of them the first that it repeats."""
    import numpy as np

    hashes = _hashes(surveys)
    order = np.argsort(hashes, kind="stable")
    same = np.zeros(len(order), dtype=bool)
    same[1:] = hashes[order][1:] == hashes[order][:-1]
    start = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    by_place = np.argsort(order[same])
    return order[same][by_place], order[start[same]][by_place]


def repeats_notice(surveys: Sequence[Survey]) -> str | None:
    """How many records repeat others, and the first of them; None if none does."""
    later, earlier = repeats(surveys)
    if not len(later):
        return None
    places = [place for survey in surveys for place in survey.places]
    first = ""
    if max(later[0], earlier[0]) < len(places) == sum(len(survey.hashes) for survey in surveys):
        first = f"; the first: {places[later[0]]}, as {places[earlier[0]]}"
    number = sum(len(survey.hashes) for survey in surveys)
    return (
        f"{len(later):,} of {number:,} records repeat others exactly{first} "
        f"({setting('drop_duplicates')} true leaves them out)"
    )


def overlap(training: Sequence[Survey], validation: Sequence[Survey]) -> "np.ndarray":
    """For each training record, whether the validation data has the same."""
    import numpy as np

    return np.isin(_hashes(training), _hashes(validation))


def overlap_notice(training: Sequence[Survey], validation: Sequence[Survey]) -> str | None:
    """How many validation records training learns too; None if there are none."""
    import numpy as np

    shared = int(np.isin(_hashes(validation), _hashes(training)).sum())
    if not shared:
        return None
    number = sum(len(survey.hashes) for survey in validation)
    return (
        f"{shared:,} of {number:,} validation records are in the training data too, so that the validation "
        f"loss is too low ({setting('drop_duplicates')} true leaves them out of training)"
    )


def _hashes(surveys: Sequence[Survey]) -> "np.ndarray":
    import numpy as np

    return np.concatenate([np.frombuffer(survey.hashes, dtype=np.uint64) for survey in surveys])


@dataclass(frozen=True)
class Choice:
    """How the records are chosen."""

    weights: tuple[float, ...]
    """Of each source: how many times its records are taken."""
    most: int | None = None
    """Of all of them together."""
    at_random: bool = False
    """Whether `most` takes any records; otherwise the first."""
    val_fraction: float = 0.0
    """Which part of the records that are taken is held out for validation."""
    seed: int = 0


def choose(counts: Sequence[int], choice: Choice, left_out: "np.ndarray") -> tuple[list[array], list[array]]:
    """How often training, and validation, takes each record of each source. `counts` are the
    numbers of their records; `left_out` are indices of records, counted through all sources."""
    import numpy as np

    rng = random.Random(choice.seed)
    times = np.zeros(sum(counts), dtype=np.uint8)
    is_there = np.ones(len(times), dtype=bool)
    is_there[left_out] = False
    start = 0
    for count, weight in zip(counts, choice.weights, strict=True):
        there = start + np.flatnonzero(is_there[start : start + count])
        times[there] = int(weight)
        part = round(len(there) * (weight - int(weight)))
        times[there[rng.sample(range(len(there)), part)]] += 1
        if count and not times[start : start + count].any():
            raise DataError(
                f"{setting('sources')}: a weight of {weight:g} takes none of {len(there):,} records"
            )
        start += count
    if choice.most is not None and times.sum(dtype=np.int64) > choice.most:
        times = _at_most(times, choice, rng)
    held_out = np.zeros_like(times)
    if choice.val_fraction:
        taken = np.flatnonzero(times)
        number = min(len(taken) - 1, max(1, round(len(taken) * choice.val_fraction)))
        chosen = taken[rng.sample(range(len(taken)), max(number, 0))]
        held_out[chosen], times[chosen] = 1, 0
    return _by_source(times, counts), _by_source(held_out, counts)


def _at_most(times: "np.ndarray", choice: Choice, rng: random.Random) -> "np.ndarray":
    """The same for so many records in all."""
    import numpy as np

    taken = np.repeat(np.arange(len(times)), times)
    chosen = rng.sample(range(len(taken)), choice.most) if choice.at_random else range(choice.most)
    return np.bincount(taken[chosen], minlength=len(times)).astype(np.uint8)


def _by_source(times: "np.ndarray", counts: Sequence[int]) -> list[array]:
    ends = [sum(counts[:number]) for number in range(len(counts) + 1)]
    return [array("B", times[start:end].tobytes()) for start, end in zip(ends[:-1], ends[1:], strict=True)]
