"""What a run needs of memory: how much there is, how large a micro-batch fits, which activations
are kept for the backward.

Peaks are measured, not guessed: on a GPU by its allocator, on the CPU by the process's resident set
(Linux).
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from litlora.config import ModelConfig
from litlora.data.batches import Batch
from litlora.errors import UserError
from litlora.kernels.cross_entropy import chunk_rows
from litlora.model import GPT
from litlora.ram import field_of, free_ram
from litlora.settings import TrainConfig
from litlora.train.fabric import Fabric
from litlora.train.optim import state_bytes

BatchOf = Callable[[int], Batch]
"""From a number to a batch of so many of the longest examples, on the run's device."""

USABLE = 0.8
"""Share of the free memory that a run may plan with: what else happens on the machine, and
fragments, take the rest."""


# ---- how much there is


def available_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on this device can take, those of the allocator's cache included; None
    where nothing tells."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return free_ram() if device.type == "cpu" else None


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an error of torch's, or of Python's, says that memory ran out."""
    told = ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error) for word in told
    )


# ---- which activations are kept


def checkpoint_activations(model: GPT, how: str) -> None:
    """Compute parts of the forward again in the backward instead of keeping what they need: full:
    every block, from its input; selective: the feed-forward half of every block, which holds the
    widest activations for a share of the arithmetic; none.

    Random numbers (dropout) are the same the second time.
    """
    for block in model.model.layers:
        for module, wanted in ((block, how == "full"), (block.mlp, how == "selective")):
            module.__dict__.pop("forward", None)
            if wanted:
                module.forward = computed_again(module.forward)


def computed_again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that keeps its inputs only: what its backward needs besides is computed again."""

    def run(*inputs: object, **options: object) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def offloading(module: nn.Module) -> AbstractContextManager:
    """A context for the forward: what it keeps for the backward waits in pinned host memory.
    Weights stay where they are.

    Copies run in the order of the device's stream, so that nothing waits for them on the host.
    """
    weights = _storages(module)

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    return saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0], non_blocking=True))


def saved_bytes(objective: nn.Module, batch: Batch, uncounted: int | None = None) -> int:
    """Bytes that a forward keeps for its backward, beside the weights and what has `uncounted`
    columns."""
    weights, kept = _storages(objective), {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not (tensor.dim() and tensor.size(-1) == uncounted):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(*batch)  # held until all is counted: an address freed could be taken twice
    del loss
    return sum(kept.values())


def generous_peak(objective: nn.Module, config: ModelConfig, batch: Batch) -> int:
    """Bytes that forward and backward of a batch will hardly take, without a measurement: all that
    goes into a layer or comes out of one, in fp32, four times; attention's scores, should it keep
    them; the logits; and the gradients of all that trains.
    """
    lengths = batch.lengths or [batch.input_ids.size(1)] * len(batch.input_ids)
    matrices = [parameter.shape for parameter in objective.parameters() if parameter.dim() == 2]
    wide = sum(
        sum(shape) for shape in matrices if config.vocab_size not in shape
    )  # the logits are counted apart
    scores = sum(length**2 for length in lengths) * config.num_attention_heads * config.num_hidden_layers
    logits = (
        min(chunk_rows(config.vocab_size, batch.input_ids.device), len(batch.targets)) * config.vocab_size
    )
    gradients = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
    return 4 * 4 * (sum(lengths) * wide + scores + logits) + gradients


def expected_peak(objective: nn.Module, config: ModelConfig, batch: Batch) -> int:
    """Bytes that forward and backward of a batch will take, estimated from what short pieces of it
    keep.

    What n tokens, of which the batch's share is learned, keep is a n + b n² + c (b is not 0 where
    attention keeps its scores); three lengths tell a, b and c. On top come the logits of one chunk
    with their gradient, the gradients of what trains, and what the backward holds in passing: as
    much as another layer, and a fifth of all.
    """
    ids = batch.input_ids[:1]
    lengths = batch.lengths or [batch.input_ids.size(1)] * len(batch.input_ids)
    n, share = max(1, min(16, ids.size(1) // 4)), len(batch.targets) / sum(lengths)

    def kept(length: int) -> int:
        positions = torch.arange(round(share * length), device=ids.device)
        piece = Batch(ids[:, :length], positions, ids[0, positions], None)
        return saved_bytes(objective, piece, uncounted=config.vocab_size)  # the logits are counted apart

    if ids.size(1) < 8:
        return 0
    with _same_random_numbers(ids.device):
        one, two, four = kept(n), kept(2 * n), kept(4 * n)
    b = max(0.0, (four - two - 2 * (two - one)) / (6 * n**2))
    a = (two - one) / n - 3 * b * n
    c = max(0.0, one - a * n - b * n**2)
    rows = min(chunk_rows(config.vocab_size, ids.device), len(batch.targets))
    logits = rows * config.vocab_size * 12  # in fp32, their softmax and gradient
    gradients = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
    activations = sum(a * length + b * length**2 for length in lengths)
    return int((1.2 + 1 / config.num_hidden_layers) * activations + c) + logits + gradients


def _same_random_numbers(device: torch.device) -> AbstractContextManager:
    """Inside it, random numbers are drawn; behind it, the same ones come again."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _storages(module: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


# ---- how large a micro-batch fits


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of these ascending sizes that fits, if what fits has no gaps: found by doubling,
    then bisecting."""
    good, bad = -1, len(sizes)  # positions: the largest known to fit, the smallest known not to
    while bad - good > 1 and bad == len(sizes):
        most = 2 * sizes[good] if good >= 0 else sizes[0]
        position = max(good + 1, max((i for i, size in enumerate(sizes) if size <= most), default=0))
        good, bad = (position, bad) if fits(sizes[position]) else (good, position)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(sizes[middle]) else (good, middle)
    return sizes[good] if good >= 0 else None


class DryRun:
    """Forward and backward for their peak of memory alone: no update, no gradient left, no random
    number used up."""

    def __init__(self, objective: nn.Module, device: torch.device) -> None:
        """Raises UserError on a device whose memory cannot be measured."""
        if available_memory(device) is None:
            raise UserError(
                f"--train.auto_batch: memory in use cannot be measured on {device.type} here; leave it out"
            )
        self.objective, self._device = objective, device
        self.must_know = device.type == "cpu"
        """Whether a batch that does not fit must not be tried: on the CPU nobody says no before the
        process is ended."""
        self._before = self._in_use()

    def peak(self, batch: Batch) -> int | None:
        """Bytes at most in use for a batch, beyond those in use at the start; None if the device
        ran out of them."""
        self._reset()
        try:
            with _same_random_numbers(self._device):
                self.objective(*batch).backward()
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            fits = False
        finally:
            for parameter in self.objective.parameters():
                parameter.grad = None
        peak = max(0, self._peak() - self._before)
        self._reset()
        return peak if fits else None

    def _in_use(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return field_of(Path("/proc/self/status"), "VmRSS:") * 1024

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return field_of(Path("/proc/self/status"), "VmHWM:") * 1024

    def _reset(self) -> None:
        """Begin a new peak, and give back what the last trial left in a cache."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")


def fit_to_memory(
    fabric: Fabric,
    objective: nn.Module,
    model: GPT,
    lengths: Sequence[int],
    batch_of: BatchOf,
    config: TrainConfig,
    say: Callable[[str], None],
) -> TrainConfig:
    """The settings with auto_batch and checkpoint_activations auto settled for this machine's
    memory, the latter put into force.

    `lengths` are those of the training examples, the longest first. All ranks come to the same
    answer. Raises UserError if not even one example fits.
    """
    objective.train()  # as the run will be
    how = "none" if config.checkpoint_activations == "auto" else config.checkpoint_activations
    checkpoint_activations(model, how)
    auto = (
        config.checkpoint_activations == "auto" and not config.offload_activations
    )  # what is offloaded is no longer in the way
    trainable = [p for p in objective.parameters() if p.requires_grad]
    # DistributedDataParallel keeps the gradients a second time, in its buckets.
    reserve = state_bytes(trainable, config) + (
        sum(p.nbytes for p in trainable) if fabric.world_size > 1 else 0
    )
    sharing = fabric.world_size if fabric.device.type == "cpu" else 1

    def room() -> int:
        return int(USABLE * available_memory(fabric.device) / sharing) - reserve

    def agreed(number: int) -> int:
        return int(fabric.all_reduce(torch.tensor(number, device=fabric.device), reduce_op="min"))

    def search() -> tuple[int, int, str]:
        """The largest size that fits, 0 if none does; bytes there to use; and what the line about
        it says it takes."""
        run, there, peaks = DryRun(objective, fabric.device), room(), {}
        found = largest_fitting(
            sizes, lambda size: _fits(size, run, batch_of(size), there, peaks, model.config)
        )
        size = agreed(found or 0)
        if size and size not in peaks:  # another rank has less room
            peaks[size] = run.peak(batch_of(size))
        return size, there, _gib(peaks.get(size, 0))

    if not config.auto_batch:
        if auto and available_memory(fabric.device) is not None:
            batch, there = batch_of(_usual_count(lengths, config)), room()
            # To measure takes a sixth of a second, which only memory that could be short is worth.
            expected = generous_peak(objective, model.config, batch)
            if expected > there:
                expected = expected_peak(objective, model.config, batch)
            if not agreed(int(expected <= there)):
                how = "full"
                checkpoint_activations(model, how)
                say(
                    f"activations: computed again in the backward (full): kept, they would take about {_gib(expected)} of {_gib(there)}"
                )
        return dataclasses.replace(config, checkpoint_activations=how)

    per_device = config.global_batch_size // fabric.world_size
    sizes = [size for size in range(1, per_device + 1) if config.packing or per_device % size == 0]
    sizes = [size for size in sizes if size <= len(lengths)] or [1]
    size, there, taken = search()
    if not size and auto:
        how = "full"
        checkpoint_activations(model, how)
        size, there, taken = search()
    limit = f"{_gib(there)} ({USABLE:.0%} of the free memory, less {_gib(reserve)} for the optimizer)"
    if not size:
        raise UserError(
            f"--train.auto_batch: not even one example of {batch_of(1)[0].size(1):,} tokens fits into {limit}; lower --train.max_seq_length"
            + ("" if how == "full" else ", or try --train.checkpoint_activations full")
        )
    recomputed = ", activations computed again in the backward" if how == "full" else ""
    found = {"micro_batch_tokens": sum(lengths[:size])} if config.packing else {"micro_batch_size": size}
    what = f"{found['micro_batch_tokens']:,} tokens" if config.packing else f"{size} examples"
    say(f"micro-batch: {what}, found by a dry run: the longest batch takes {taken} of {limit}{recomputed}")
    return dataclasses.replace(config, auto_batch=False, checkpoint_activations=how, **found)


def _usual_count(lengths: Sequence[int], config: TrainConfig) -> int:
    """How many of the longest examples make a micro-batch as large as the run's largest."""
    if not config.packing:
        return config.micro_batch_size
    return max(
        1, sum(total <= (config.micro_batch_tokens or config.max_seq_length) for total in accumulate(lengths))
    )


def _fits(
    size: int, run: DryRun, batch: Batch, room: int, peaks: dict[int, int], config: ModelConfig
) -> bool:
    """Whether the batch's peak is within the room; what was measured goes into `peaks`."""
    if run.must_know:
        smaller = max((known for known in peaks if known < size), default=None)
        expected = peaks[smaller] * size / smaller if smaller else expected_peak(run.objective, config, batch)
        if expected > room:
            return False
    peak = run.peak(batch)
    if peak is not None:
        peaks[size] = peak
    return peak is not None and peak <= room


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
