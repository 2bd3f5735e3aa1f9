"""Examples to batches: steps of micro-batches, each packed without padding or padded to its
longest."""

import heapq
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from litlora.data.examples import Example

Step = list[list[int]]
"""The micro-batches of one optimizer step, each the indices of its examples."""


class Batch(NamedTuple):
    """A micro-batch: what `SupervisedLoss` is called with."""

    input_ids: Tensor
    """(1, N): the examples one behind the other; or (B, T): one a row, padded on the right."""
    positions: Tensor
    """(M,): the places of the flattened input_ids whose next token is learned."""
    targets: Tensor
    """(M,): these next tokens."""
    lengths: list[int] | None
    """Of the examples one behind the other; None if they are padded."""


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
    """Every example once, global_batch_size of them a step, in random order; what is left over
    makes a smaller last step.

    With `pack_tokens` a step's examples are packed into micro-batches of at most so many tokens;
    else micro-batches hold micro_batch_size examples of like length. `longest_first` puts a step
    with one of the longest examples in front: if memory is too small, the first step shows it; of
    several such steps it is the shortest. A pure function: the same arguments give the same plan,
    and the examples of packed steps do not depend on pack_tokens and num_ranks.
    """
    rng = random.Random(seed)
    if pack_tokens is not None:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        groups = [
            order[start : start + global_batch_size] for start in range(0, len(order), global_batch_size)
        ]
        if (
            longest_first
        ):  # chosen by lengths alone: the order of the steps must not depend on how they are cut into packs
            long = 15 / 16 * max(lengths)
            able = (i for i, group in enumerate(groups) if max(lengths[index] for index in group) >= long)
            groups.insert(0, groups.pop(min(able, key=lambda i: sum(lengths[index] for index in groups[i]))))
        return [pack(group, lengths, pack_tokens, num_ranks) for group in groups]
    # Blurred a little before sorting, so that the same examples do not meet in every epoch.
    order = sorted(range(len(lengths)), key=lambda index: lengths[index] * (1 + 0.02 * rng.random()))
    rest = len(order) % micro_batch_size
    micro_batches = (
        [order[:rest]] if rest else []
    )  # the incomplete one has the shortest examples: it costs least
    micro_batches += [
        order[start : start + micro_batch_size] for start in range(rest, len(order), micro_batch_size)
    ]
    rng.shuffle(micro_batches)
    if longest_first:
        largest = max(
            range(len(micro_batches)), key=lambda i: max(lengths[index] for index in micro_batches[i])
        )
        micro_batches.insert(0, micro_batches.pop(largest))
    per_step = global_batch_size // micro_batch_size
    return [micro_batches[start : start + per_step] for start in range(0, len(micro_batches), per_step)]


def pack(
    indices: Sequence[int], lengths: Sequence[int], capacity: int, num_ranks: int = 1
) -> list[list[int]]:
    """Indices in as few groups as first-fit decreasing finds, each of at most `capacity` tokens, or
    one longer example alone.

    The groups are made equal in length where that needs no more of them, and their number a
    multiple of num_ranks where there are examples enough: no rank waits long for another.
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
    """Padding as a share of all positions that these steps compute, if their micro-batches are
    padded."""
    padded = sum(len(micro) * max(lengths[index] for index in micro) for step in steps for micro in step)
    return 1 - sum(lengths[index] for step in steps for micro in step for index in micro) / padded


def num_supervised(example: Example, mask_prompt: bool) -> int:
    """Tokens of an example that are learned; the very first has nothing before it to be predicted
    from."""
    return len(example.ids) - _first_learned(example, mask_prompt)


def collate(examples: Sequence[Example], *, mask_prompt: bool, packed: bool, pad_id: int = 0) -> Batch:
    """One behind the other if packed, else one a row: under causal attention no real token sees the
    padding on its right."""
    lengths = [len(example.ids) for example in examples]
    T = max(lengths)
    starts = [sum(lengths[:row]) if packed else row * T for row in range(len(examples))]
    input_ids = torch.full((sum(lengths) if packed else len(examples) * T,), pad_id, dtype=torch.int64)
    positions = []
    for example, start, length in zip(examples, starts, lengths, strict=True):
        input_ids[start : start + length] = torch.frombuffer(example.ids, dtype=torch.int32)
        positions.append(torch.arange(start + _first_learned(example, mask_prompt) - 1, start + length - 1))
    positions = torch.cat(positions)
    return Batch(
        input_ids.view(1 if packed else len(examples), -1),
        positions,
        input_ids[positions + 1],
        lengths if packed else None,
    )


def _first_learned(example: Example, mask_prompt: bool) -> int:
    return max(1, example.prompt_length) if mask_prompt else 1
