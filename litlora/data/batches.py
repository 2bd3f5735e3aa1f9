"""Examples to batches: steps of micro-batches, each packed without padding or padded to its
longest example."""

import heapq
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from litlora.data.examples import Example

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


def plan_epoch(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    pack_tokens: int | None,
    num_ranks: int = 1,
    seed: int,
    longest_first: bool,
) -> list[Step]:
    """Every example once, global_batch_size of them a step, in random order; the remainder makes a
    smaller last step.

    With `pack_tokens` the examples of a step are packed into micro-batches of at most that many
    tokens; without, a micro-batch has micro_batch_size examples of similar length. `longest_first`
    starts with a step that has one of the longest examples, the shortest such step: if memory is
    too small, the first step shows it. A pure function: the same arguments give the same plan, and
    the examples of a packed step do not depend on pack_tokens and num_ranks.
    """
    rng = random.Random(seed)
    if pack_tokens is not None:
        groups = _shuffled_groups(lengths, global_batch_size, rng, longest_first=longest_first)
        return [pack(group, lengths, pack_tokens, num_ranks) for group in groups]
    micro_batches = _groups_of_similar_length(lengths, micro_batch_size, rng)
    if longest_first:
        longest = [max(lengths[index] for index in micro) for micro in micro_batches]
        micro_batches.insert(0, micro_batches.pop(longest.index(max(longest))))
    return _chunks(micro_batches, global_batch_size // micro_batch_size)


def _shuffled_groups(
    lengths: Sequence[int], size: int, rng: random.Random, *, longest_first: bool
) -> list[list[int]]:
    """The examples of each packed step."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    groups = _chunks(order, size)
    if longest_first:
        # Chosen by lengths alone: the order of the steps must not depend on how they are packed.
        long = 15 / 16 * max(lengths)
        candidates = (i for i, group in enumerate(groups) if max(lengths[index] for index in group) >= long)
        first = min(candidates, key=lambda i: sum(lengths[index] for index in groups[i]))
        groups.insert(0, groups.pop(first))
    return groups


def _groups_of_similar_length(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """The padded micro-batches of an epoch, in random order."""
    # Lengths are blurred a little before sorting, so that the same examples do not meet in every
    # epoch.
    order = sorted(range(len(lengths)), key=lambda index: lengths[index] * (1 + 0.02 * rng.random()))
    rest = len(order) % size
    # The incomplete micro-batch has the shortest examples, where it costs least.
    micro_batches = ([order[:rest]] if rest else []) + _chunks(order[rest:], size)
    rng.shuffle(micro_batches)
    return micro_batches


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


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


def padding_share(lengths: Sequence[int], steps: list[Step]) -> float:
    """The share of padding in all positions that these steps compute, if their micro-batches are
    padded."""
    padded = sum(len(micro) * max(lengths[index] for index in micro) for step in steps for micro in step)
    return 1 - sum(lengths[index] for step in steps for micro in step for index in micro) / padded


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
