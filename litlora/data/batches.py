"""Examples to batches: micro-batches of like length, steps of micro-batches, tensors padded to the longest."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.data.examples import Example
from litlora.loss import IGNORE

Step = list[list[int]]
"""The micro-batches of one optimizer step, each the indices of its examples."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: right-padded tensors (B, T), and its counts."""

    input_ids: Tensor
    labels: Tensor
    """The ids to learn, IGNORE elsewhere: in the padding and, if prompts are masked, in them."""
    num_tokens: int
    """Real tokens, without padding."""


def plan_epoch(lengths: Sequence[int], *, micro_batch_size: int, global_batch_size: int, seed: int, longest_first: bool) -> list[Step]:
    """Every example once, in micro-batches of like length, in random order.

    Lengths are blurred a little before sorting, so that the same examples do not meet in every epoch. `longest_first` puts
    the longest micro-batch in front: if memory is too small, the first step shows it. What is left over at the end of an
    epoch makes a smaller last step.
    """
    rng = random.Random(seed)
    order = sorted(range(len(lengths)), key=lambda index: lengths[index] * (1 + 0.02 * rng.random()))
    rest = len(order) % micro_batch_size
    micro_batches = [order[:rest]] if rest else []  # the incomplete one has the shortest examples: it costs least
    micro_batches += [order[start : start + micro_batch_size] for start in range(rest, len(order), micro_batch_size)]
    rng.shuffle(micro_batches)
    if longest_first:
        longest = max(range(len(micro_batches)), key=lambda i: max(lengths[index] for index in micro_batches[i]))
        micro_batches.insert(0, micro_batches.pop(longest))
    per_step = global_batch_size // micro_batch_size
    return [micro_batches[start : start + per_step] for start in range(0, len(micro_batches), per_step)]


def padding_share(lengths: Sequence[int], steps: list[Step]) -> float:
    """Padding as a share of all positions that these steps compute."""
    padded = sum(len(micro) * max(lengths[index] for index in micro) for step in steps for micro in step)
    return 1 - sum(lengths[index] for step in steps for micro in step for index in micro) / padded


def num_supervised(example: Example, mask_prompt: bool) -> int:
    """Tokens of an example that are learned; the very first has nothing before it to be predicted from."""
    return len(example.ids) - (max(1, example.prompt_length) if mask_prompt else 1)


def collate(examples: Sequence[Example], *, mask_prompt: bool, pad_id: int = 0) -> Batch:
    """Pad on the right: under causal attention no real token sees the padding, so it needs no mask."""
    T = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), T), pad_id, dtype=torch.int64)
    labels = torch.full((len(examples), T), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = torch.frombuffer(example.ids, dtype=torch.int32)
        input_ids[row, : len(ids)] = ids
        learned = example.prompt_length if mask_prompt else 0
        labels[row, learned : len(ids)] = ids[learned:]
    return Batch(input_ids, labels, sum(len(example.ids) for example in examples))
