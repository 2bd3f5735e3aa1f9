"""Plan: which examples make up which micro-batch of which step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from litlora.data.batches import Step, padding_share, plan_epoch
from litlora.settings import TrainConfig
from litlora.train.resume import Position

MANY_STEPS = 10_000
"""Steps of an epoch above which they are not all planned beforehand."""


@dataclass(frozen=True)
class Plan:
    """The order of the examples: a pure function of their lengths, the settings and the seed."""

    lengths: Sequence[int]
    """Of the training examples, in tokens."""
    config: TrainConfig
    seed: int
    num_ranks: int = 1

    @property
    def steps_per_epoch(self) -> int:
        config, examples = self.config, len(self.lengths)
        if config.packing:
            return math.ceil(examples / config.global_batch_size)
        per_step = config.global_batch_size // config.micro_batch_size
        return math.ceil(math.ceil(examples / config.micro_batch_size) / per_step)

    def epoch(self, number: int) -> Sequence[Step]:
        """The steps of an epoch. The first begins with one of the longest examples, so that a lack
        of memory shows at once."""
        return _steps(self.lengths, self.config, self.seed + number, self.num_ranks, number == 0)

    def steps_from(self, at: Position, total_steps: int) -> Iterator[tuple[int, int, Step]]:
        """(epoch, number of the step in it, micro-batches) of each step that is still to be done,
        epoch after epoch."""
        left, epoch, first = total_steps - at.step, at.epoch, at.step_in_epoch
        while left > 0:
            steps = self.epoch(epoch)
            for index in range(first, min(len(steps), first + left)):
                yield epoch, index, steps[index]
                left -= 1
            epoch, first = epoch + 1, 0


def evaluation_plan(lengths: Sequence[int], config: TrainConfig) -> Iterator[list[int]]:
    """The micro-batches of a validation."""
    return (micro for step in _steps(lengths, config, 0, 1, False) for micro in step)


def pack_tokens(config: TrainConfig) -> int | None:
    """Tokens of a packed micro-batch; None without packing."""
    if config.packing and config.update_early:  # a step is one micro-batch
        return config.global_batch_size * config.max_seq_length
    return (config.micro_batch_tokens or config.max_seq_length) if config.packing else None


def most_tokens(lengths: Sequence[int], config: TrainConfig) -> int:
    """Tokens that a micro-batch has at most, padding included."""
    longest, pack = max(lengths), pack_tokens(config)
    return config.micro_batch_size * longest if pack is None else max(longest, pack)


def _steps(
    lengths: Sequence[int], config: TrainConfig, seed: int, num_ranks: int, longest_first: bool
) -> Sequence[Step]:
    return plan_epoch(
        lengths,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        pack_tokens=pack_tokens(config),
        num_ranks=num_ranks,
        seed=seed,
        longest_first=longest_first,
    )


def described(lengths: Sequence[int], config: TrainConfig, seed: int, *, packs: bool = True) -> str:
    """How large the micro-batches of the first epoch are, for the user: the largest pack, or the share
    of padding. Empty where the size is still to be found. `packs`: whether the model packs."""
    if config.auto_batch:
        return ""
    steps = Plan(lengths, config, seed).epoch(0)
    few = len(steps) <= MANY_STEPS
    if not config.packing:
        share = padding_share(lengths, islice(steps, MANY_STEPS))
        return f"; padding {'' if few else 'about '}{share:.1%}"
    largest = max(max(lengths), pack_tokens(config))
    if few:
        largest = max(sum(lengths[index] for index in micro) for step in steps for micro in step)
    return f"; {'packed' if packs else 'not packed'}, at most {largest:,} at a time"
