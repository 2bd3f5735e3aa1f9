"""A run's use of memory, settled before its first step: the size of its micro-batches
(auto_batch), and whether the backward recomputes activations (checkpoint_activations auto)."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from litlora.errors import UserError, setting
from litlora.settings import TrainConfig
from litlora.train.activations import ROWS, checkpoint_activations
from litlora.train.memory import DryRun, Trial, available_memory, expected_peak, generous_peak
from litlora.train.objective import Objective
from litlora.train.optim import state_bytes
from litlora.train.parallel import Parallel, local
from litlora.train.plan import pack_tokens

USABLE = 0.8
"""Share of the free memory that a run may plan with; the rest is for fragments, and for what else
happens on the machine."""


def fit_to_memory(
    parallel: Parallel,
    objective: Objective,
    examples: Sequence[Any],
    config: TrainConfig,
    say: Callable[[str], None],
    dry_run: type[DryRun] = DryRun,
    size_is_set: bool | None = None,
) -> TrainConfig:
    """The settings with auto_batch, and checkpoint_activations auto, settled for the memory of this
    machine; the latter also takes effect on the model. Where recomputing is not enough, packs
    become smaller unless `size_is_set`: whether the user chose micro_batch_tokens, which the
    settings tell by default.

    All ranks get the same answer. `dry_run` measures. Raises UserError if auto_batch finds that not
    even one example fits.
    """
    objective.train()  # as in the run
    how = "none" if config.checkpoint_activations == "auto" else config.checkpoint_activations
    checkpoint_activations(objective.model, how, ROWS if config.offload_activations else None)
    # Offloaded activations take no memory of the device, so recomputing them would gain nothing.
    may_recompute = config.checkpoint_activations == "auto" and not config.offload_activations
    config = dataclasses.replace(config, checkpoint_activations=how)
    room = Room(parallel, objective, config)
    batches = longest_batches(objective, examples, config, parallel.device)
    if config.auto_batch:
        search = Search(parallel, batches, room, dry_run(objective, parallel.device))
        return _auto_batch(search, config, may_recompute, say)
    if may_recompute and available_memory(parallel.device) is not None:
        if size_is_set is None:
            size_is_set = config.micro_batch_tokens is not None
        return _recompute_if_needed(parallel, batches, room, size_is_set, say)
    return config


def _recompute_if_needed(
    parallel: Parallel,
    batches: "LongestBatches",
    room: "Room",
    size_is_set: bool,
    say: Callable[[str], None],
) -> TrainConfig:
    """Recompute activations if those of the run's largest micro-batch would not fit."""
    config, trial, available = batches.config, batches.trial(batches.usual_count()), room.bytes()
    # The better estimate takes a sixth of a second: only for memory that might be short.
    expected = generous_peak(batches.objective, trial)
    # It computes, in which all ranks must take part where the model is divided.
    if not parallel.is_sharded and expected > available:
        expected = expected_peak(batches.objective, trial)
    if parallel.smallest(int(expected <= available)):
        return config
    checkpoint_activations(batches.objective.model, "full")
    say(
        "activations: recomputed in the backward (full): "
        f"keeping them would take about {_gib(expected)} of {_gib(available)}"
    )
    config = dataclasses.replace(config, checkpoint_activations="full")
    if parallel.is_sharded:
        return config
    return _smaller_if_needed(
        parallel, batches, config, _Recomputed(batches, expected, available), say, size_is_set
    )


@dataclass(frozen=True)
class _Recomputed:
    """What micro-batches take whose activations are recomputed."""

    batches: "LongestBatches"
    kept: int
    """Bytes that the run's largest micro-batch would take with all activations kept."""
    available: int

    def bytes(self, count: int) -> int:
        """Of a micro-batch of so many examples: the input of every block, one block whole, and what
        its backward holds; and half of that for the gaps that the allocator leaves, because blocks
        come and go (measured: 1.3 to 2.4 times without them)."""
        batches = self.batches
        share = sum(batches.lengths[:count]) / sum(batches.lengths[: batches.usual_count()])
        kept = self.kept * share
        inputs = expected_peak(batches.objective, batches.trial(count))
        return int(min(kept, 1.5 * (inputs + 2 * kept / batches.objective.model.config.num_hidden_layers)))

    def fits(self, count: int) -> bool:
        return self.bytes(count) <= self.available


def _smaller_if_needed(
    parallel: Parallel,
    batches: "LongestBatches",
    config: TrainConfig,
    recomputed: _Recomputed,
    say: Callable[[str], None],
    size_is_set: bool,
) -> TrainConfig:
    """Packs of fewer tokens if the run's largest would not fit even so; where that may not be changed,
    or is not enough, say what would help."""
    usual = batches.usual_count()
    if parallel.smallest(int(recomputed.fits(usual))):
        return config
    fitting = parallel.smallest(largest_fitting(range(1, usual), recomputed.fits) or 0)
    count = usual
    if config.packing and not config.update_early and not size_is_set:
        count = max(1, fitting)
        tokens = sum(batches.lengths[:count])
        say(
            f"micro-batch: {tokens:,} tokens instead of {pack_tokens(config):,}, which would still take "
            f"about {_gib(recomputed.bytes(usual))}; what is learned stays the same"
        )
        config = dataclasses.replace(config, micro_batch_tokens=tokens)
    if count > fitting:
        size = "micro_batch_tokens" if config.packing else "micro_batch_size"
        size = "global_batch_size" if config.update_early else size
        lower = f"{size} or max_seq_length" if usual > 1 else "max_seq_length"
        say(
            f"warning: a micro-batch of {sum(batches.lengths[:count]):,} tokens may take about "
            f"{_gib(recomputed.bytes(count))} of {_gib(recomputed.available)}, and the system ends "
            f"what takes too much: lower {lower}"
        )
    return config


def _auto_batch(
    search: "Search", config: TrainConfig, may_recompute: bool, say: Callable[[str], None]
) -> TrainConfig:
    """The largest micro-batch that fits, recomputing activations if not even one example fits
    otherwise."""
    objective, how = search.batches.objective, config.checkpoint_activations
    found = search.run()
    if not found.size and may_recompute:
        how = "full"
        checkpoint_activations(objective.model, how)
        found = search.run()
    limit = (
        f"{_gib(found.available)} ({USABLE:.0%} of the free memory, "
        f"less {_gib(search.room.reserved)} for the optimizer)"
    )
    if not found.size:
        hint = "" if how == "full" else f", or try {setting('checkpoint_activations')} full"
        raise UserError(
            f"{setting('auto_batch')}: not even one example of {search.batches.lengths[0]:,} tokens "
            f"fits into {limit}; lower {setting('max_seq_length')}{hint}"
        )
    tokens = sum(search.batches.lengths[: found.size])
    sizes = {"micro_batch_tokens": tokens} if config.packing else {"micro_batch_size": found.size}
    what = f"{tokens:,} tokens" if config.packing else f"{found.size} examples"
    recomputed = ", activations recomputed in the backward" if how == "full" else ""
    say(
        f"micro-batch: {what}, found by a dry run: "
        f"the longest batch takes {_gib(found.peak)} of {limit}{recomputed}"
    )
    return dataclasses.replace(config, auto_batch=False, checkpoint_activations=how, **sizes)


class Room:
    """The memory that the activations and gradients of a step may take."""

    def __init__(self, parallel: Parallel, objective: Objective, config: TrainConfig) -> None:
        self._device = parallel.device
        self._sharing = parallel.world_size if parallel.device.type == "cpu" else 1
        trainable = {name: local(p) for name, p in objective.trainable().items()}
        self.reserved = state_bytes(trainable, config)
        """Bytes kept for the optimizer, and for what is exchanged with other devices."""
        if parallel.world_size > 1:  # DistributedDataParallel has a second copy of the gradients
            self.reserved += sum(p.nbytes for p in trainable.values())
        if parallel.is_sharded:
            from litlora.train.sharding import unsharded_bytes

            self.reserved += unsharded_bytes(objective)

    def bytes(self) -> int:
        return int(USABLE * available_memory(self._device) / self._sharing) - self.reserved


@dataclass(frozen=True)
class LongestBatches:
    """Micro-batches of the longest examples, which need the most memory."""

    objective: Objective
    examples: Sequence[Any]
    """The longest first; as many as a micro-batch may have."""
    config: TrainConfig
    device: Any
    lengths: Sequence[int]
    """Of these examples."""

    def trial(self, count: int) -> Trial:
        """A micro-batch of so many examples."""
        chosen, lengths = self.examples[:count], self.lengths[:count]
        return Trial(
            self.objective.batch(chosen, self.device),
            lengths if self.config.packing else [lengths[0]] * len(lengths),
            sum(self.objective.num_learned(example) for example in chosen),
            self.config.packing,
        )

    def usual_count(self) -> int:
        """How many examples make the run's largest micro-batch."""
        if not self.config.packing:
            return self.config.micro_batch_size
        if self.config.update_early:  # a step is one micro-batch
            return self.config.global_batch_size
        return max(1, sum(total <= pack_tokens(self.config) for total in accumulate(self.lengths)))


def longest_batches(
    objective: Objective, examples: Sequence[Any], config: TrainConfig, device: Any
) -> LongestBatches:
    """Micro-batches of the longest of these examples."""
    lengths = objective.lengths(examples)
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    most = (
        np.asarray(lengths)[by_length].cumsum(dtype=np.int64).searchsorted(pack_tokens(config) or 0, "right")
    )
    chosen = by_length[: max(config.global_batch_size, int(most))].tolist()
    return LongestBatches(
        objective,
        [examples[index] for index in chosen],
        config,
        device,
        [lengths[index] for index in chosen],
    )


@dataclass(frozen=True)
class Found:
    """What a search for the largest micro-batch found."""

    size: int
    """In examples; 0 if not even one fits."""
    available: int
    """Bytes."""
    peak: int
    """Bytes that this size takes; 0 if it was not measured."""


@dataclass
class Search:
    """The search for the largest micro-batch that fits on all ranks."""

    parallel: Parallel
    batches: LongestBatches
    room: Room
    dry_run: DryRun
    peaks: dict[int, int] = field(default_factory=dict)
    """Measured bytes by size."""

    def run(self) -> Found:
        available = self.room.bytes()
        self.peaks.clear()
        self.dry_run.begin()
        size = largest_fitting(self.sizes(), lambda size: self.fits(size, available))
        size = self.parallel.smallest(size or 0)
        if size and size not in self.peaks:  # another rank has less room
            self.peaks[size] = self.dry_run.peak(self.batches.trial(size)) or 0
        return Found(size, available, self.peaks.get(size, 0))

    def sizes(self) -> list[int]:
        """The numbers of examples that a micro-batch may have, ascending."""
        config = self.batches.config
        per_device = config.global_batch_size // self.parallel.world_size
        sizes = [n for n in range(1, per_device + 1) if config.packing or per_device % n == 0]
        return [n for n in sizes if n <= len(self.batches.examples)] or [1]

    def fits(self, size: int, available: int) -> bool:
        """Whether the peak of this size is within the available memory."""
        trial = self.batches.trial(size)
        if self.dry_run.must_know:
            smaller = max((known for known in self.peaks if known < size), default=None)
            expected = self.peaks[smaller] * size / smaller if smaller else self.dry_run.expected(trial)
            if expected > available:
                return False
        peak = self.dry_run.peak(trial)
        if peak is not None:
            self.peaks[size] = peak
        return peak is not None and peak <= available


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of these ascending sizes that fits, provided that every smaller one fits too:
    found by doubling, then bisecting."""
    good, bad = -1, len(sizes)  # positions: the largest known to fit, the smallest known not to
    while bad - good > 1 and bad == len(sizes):
        most = 2 * sizes[good] if good >= 0 else sizes[0]
        position = max(good + 1, max((i for i, size in enumerate(sizes) if size <= most), default=0))
        good, bad = (position, bad) if fits(sizes[position]) else (good, position)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(sizes[middle]) else (good, middle)
    return sizes[good] if good >= 0 else None


def _gib(count: int) -> str:
    return f"{max(0, count) / 2**30:.2f} GiB"
