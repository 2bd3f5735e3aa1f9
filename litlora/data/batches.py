"""Examples to batches: steps of micro-batches, each packed without padding or padded to its
longest example."""

import heapq
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from litlora.data.examples import Example
from litlora.kernels.attention import Shared

Step = list[list[int]]
"""The micro-batches of one optimizer step, each as the indices of its examples."""


class Batch(NamedTuple):
    """A micro-batch: the arguments of `SupervisedLoss`."""

    input_ids: Tensor
    """(1, N): packed examples; or (B, T): one example a row, padded on the right."""
    positions: Tensor
    """(M,): the positions in the flattened input_ids whose next token is learned."""
    targets: Tensor
    """(M,): these next tokens."""
    lengths: list[int] | None
    """The lengths of the packed examples; None if they are padded."""
    shared: Shared | None = None
    """Which tokens they share, if input_ids has each of these once."""


def plan_epoch(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    pack_tokens: int | None,
    num_ranks: int = 1,
    seed: int,
    longest_first: bool,
) -> Sequence[Step]:
    """Every example once, global_batch_size of them a step, in random order; the remainder makes a
    smaller last step.

    With `pack_tokens` the examples of a step are packed into micro-batches of at most that many
    tokens; without, a micro-batch has micro_batch_size examples of similar length. `longest_first`
    starts with a step that has one of the longest examples, the shortest such step: if memory is
    too small, the first step shows it. A pure function: the same arguments give the same plan, and
    the examples of a packed step do not depend on pack_tokens and num_ranks.

    A step is made when it is asked for: a plan takes 4 bytes an example.
    """
    rng = random.Random(seed)
    if pack_tokens is not None:
        groups = _Groups(_shuffled(len(lengths), rng), global_batch_size, lengths)
        if longest_first:
            # Chosen by lengths alone: the order of the steps must not depend on how they are packed.
            long = groups.longest() >= 15 / 16 * max(lengths)
            groups.put_first(int(np.where(long, groups.sums(), np.iinfo(np.int64).max).argmin()))
        return _PackedSteps(groups, lengths, pack_tokens, num_ranks)
    # The incomplete micro-batch has the shortest examples, where it costs least.
    micro_batches = _Groups(_by_blurred_length(lengths, rng), micro_batch_size, lengths, short_one_first=True)
    micro_batches.sequence = _shuffled(len(micro_batches), rng)
    if longest_first:
        micro_batches.put_first(int(micro_batches.longest().argmax()))
    return _PaddedSteps(micro_batches, global_batch_size // micro_batch_size)


def _shuffled(count: int, rng: random.Random) -> np.ndarray:
    """The numbers below `count` in random order."""
    order = array("i", range(count))  # a list would take ten times the memory
    rng.shuffle(order)
    return np.frombuffer(order, dtype=np.int32)


def _by_blurred_length(lengths: Sequence[int], rng: random.Random) -> np.ndarray:
    """The examples by length. Lengths are blurred a little before sorting, so that the same examples
    do not meet in every epoch."""
    count = len(lengths)
    blur = np.fromiter((rng.random() for _ in range(count)), np.float64, count)
    return np.argsort(np.asarray(lengths) * (1 + 0.02 * blur), kind="stable").astype(np.int32)


class _Groups(Sequence[list[int]]):
    """Consecutive groups of examples, taken in any sequence."""

    def __init__(
        self, order: np.ndarray, size: int, lengths: Sequence[int], *, short_one_first: bool = False
    ) -> None:
        """Of `size` examples each, but for the last group in `order`, or the first one."""
        self._order, self._size, self._lengths = order, size, lengths
        number = -(-len(order) // size)
        self._before = number * size - len(order) if short_one_first else 0
        self.sequence = np.arange(number, dtype=np.int32)

    def put_first(self, index: int) -> None:
        """Take this group before the others."""
        self.sequence = np.concatenate([self.sequence[[index]], np.delete(self.sequence, index)])

    def longest(self) -> np.ndarray:
        """The longest example of each group."""
        return np.maximum.reduceat(self._in_order(), self._starts())[self.sequence]

    def sums(self) -> np.ndarray:
        """The tokens of each group."""
        return np.add.reduceat(self._in_order(), self._starts(), dtype=np.int64)[self.sequence]

    def _in_order(self) -> np.ndarray:
        return np.asarray(self._lengths)[self._order]

    def _starts(self) -> np.ndarray:
        return np.maximum(0, np.arange(len(self.sequence), dtype=np.int64) * self._size - self._before)

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, index: int) -> list[int]:
        start = int(self.sequence[index]) * self._size - self._before
        return self._order[max(0, start) : start + self._size].tolist()


@dataclass(frozen=True)
class _PackedSteps(Sequence[Step]):
    groups: _Groups
    lengths: Sequence[int]
    pack_tokens: int
    num_ranks: int

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Step:
        return pack(self.groups[index], self.lengths, self.pack_tokens, self.num_ranks)


@dataclass(frozen=True)
class _PaddedSteps(Sequence[Step]):
    micro_batches: _Groups
    size: int
    """Micro-batches in a step."""

    def __len__(self) -> int:
        return -(-len(self.micro_batches) // self.size)

    def __getitem__(self, index: int) -> Step:
        numbers = range(len(self.micro_batches))[index * self.size : (index + 1) * self.size]
        if not numbers:
            raise IndexError(index)
        return [self.micro_batches[number] for number in numbers]


def pack(
    indices: Sequence[int], lengths: Sequence[int], capacity: int, num_ranks: int = 1
) -> list[list[int]]:
    """Indices in as few groups as first-fit decreasing finds, each of at most `capacity` tokens, or
    a single longer example.

    Where it takes no more groups, they are made equal in length. Their number is a multiple of
    num_ranks where there are enough examples, so that no rank waits long for another.
    """
    falling = sorted(indices, key=lambda index: -lengths[index])
    loads: list[int] = []
    packs: list[list[int]] = []
    for index in falling:
        place = next((i for i, load in enumerate(loads) if load + lengths[index] <= capacity), len(packs))
        if place == len(packs):
            packs.append([])
            loads.append(0)
        packs[place].append(index)
        loads[place] += lengths[index]
    number = min(-(-len(packs) // num_ranks) * num_ranks, len(falling))
    even: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, i) for i in range(number)]
    for index in falling:  # the longest first, each into the group that is shortest so far
        load, place = heapq.heappop(heap)
        even[place].append(index)
        heapq.heappush(heap, (load + lengths[index], place))
    return even if all(load <= capacity or len(even[place]) == 1 for load, place in heap) else packs


def padding_share(lengths: Sequence[int], steps: Iterable[Step]) -> float:
    """The share of padding in all positions that these steps compute, if their micro-batches are
    padded."""
    padded = tokens = 0
    for step in steps:
        for micro in step:
            sizes = [lengths[index] for index in micro]
            padded += len(sizes) * max(sizes)
            tokens += sum(sizes)
    return 1 - tokens / padded


def num_supervised(example: Example, mask_prompt: bool) -> int:
    """The number of an example's tokens that are learned."""
    return sum(stop - start for start, stop in example.learned_spans(mask_prompt))


def collate(examples: Sequence[Example], *, mask_prompt: bool, packed: bool, pad_id: int = 0) -> Batch:
    """Examples packed into one row, or one a row: under causal attention no real token sees the
    padding on its right."""
    lengths = [len(example.ids) for example in examples]
    T = max(lengths)
    starts = [sum(lengths[:row]) if packed else row * T for row in range(len(examples))]
    input_ids = torch.full((sum(lengths) if packed else len(examples) * T,), pad_id, dtype=torch.int64)
    positions = [torch.empty(0, dtype=torch.int64)]
    for example, start, length in zip(examples, starts, lengths, strict=True):
        input_ids[start : start + length] = torch.frombuffer(example.ids, dtype=torch.int32)
        positions += [
            torch.arange(start + first - 1, start + stop - 1)
            for first, stop in example.learned_spans(mask_prompt)
        ]
    positions = torch.cat(positions)
    return Batch(
        input_ids.view(1 if packed else len(examples), -1),
        positions,
        input_ids[positions + 1],
        lengths if packed else None,
    )


def sharing(batch: Batch, group: int) -> Batch:
    """A pack in which the examples of each group, so many in a row, share the tokens that all of them
    begin with."""
    ids, copies, kept = batch.input_ids[0], [], []
    start = computed = 0
    for first in range(0, len(batch.lengths), group):
        lengths = batch.lengths[first : first + group]
        sequences = ids[start : start + sum(lengths)].split(lengths)
        common = _common(sequences)
        shared = torch.arange(computed, computed + common)
        for number, length in enumerate(lengths):
            known = common if number else 0  # the first brings the tokens that they share
            kept.append(torch.arange(start + known, start + length))
            copies += [shared, torch.arange(computed + common - known, computed + length - known)]
            start, computed = start + length, computed + length - known
    copies, kept = torch.cat(copies), torch.cat(kept)
    return Batch(ids[kept][None], copies[batch.positions], batch.targets, batch.lengths, Shared(copies, kept))


def _common(sequences: Sequence[Tensor]) -> int:
    """How many tokens all of them begin with."""
    least = min(map(len, sequences))
    same = torch.stack([sequence[:least] == sequences[0][:least] for sequence in sequences]).all(dim=0)
    return int(same.long().cumprod(0).sum())
