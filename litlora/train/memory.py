"""The memory of a training step: how much is available, what a micro-batch needs, and what to say
when it runs out.

Peaks are measured by the allocator of a GPU, or on the CPU by the resident set of the process
(Linux). Where a measurement could end the process, the need is estimated first.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from litlora.errors import UserError, setting
from litlora.frozen.linear import stored_weights
from litlora.kernels.cross_entropy import chunk_rows
from litlora.ram import field_of, free_ram, is_lack_of_memory
from litlora.settings import TrainConfig
from litlora.train.objective import Objective
from litlora.train.plan import pack_tokens


def available_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on this device can take, including the allocator's cache; None where
    that cannot be found out."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_ram() if device.type == "cpu" else None


# ---- what a micro-batch needs


@dataclass(frozen=True)
class Trial:
    """A micro-batch whose need of memory is in question."""

    batch: Any
    """As the objective makes it."""
    lengths: Sequence[int]
    """Of its sequences as computed, padding included."""
    num_learned: int
    """Positions at which there are logits."""
    packed: bool = False
    """Whether the sequences are one row; else each is a row of its own."""

    @property
    def row_length(self) -> int:
        """Tokens of the first row."""
        return sum(self.lengths) if self.packed else self.lengths[0]


def saved_bytes(objective: Objective, batch: Any, uncounted: int | None = None) -> int:
    """Bytes that the forward keeps for the backward besides the weights. A tensor with `uncounted`
    columns does not count."""
    weights = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
    kept: dict[int, tuple[Any, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and not (tensor.dim() and tensor.size(-1) == uncounted):
            kept[storage._cdata] = storage, storage.nbytes()  # held, so that no other has its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)
    return sum(size for _, size in kept.values())


def generous_peak(objective: Objective, trial: Trial) -> int:
    """A generous upper bound on the memory of one training step, in bytes, without a measurement.

    It counts in fp32, four times: the inputs and outputs of all layers, attention's scores as if it
    kept them, and the logits; and once the gradients of all that trains.
    """
    config = objective.model.config
    weights = (*objective.parameters(), *stored_weights(objective).values())
    matrices = [weight.shape for weight in weights if len(weight.shape) == 2]
    wide = sum(sum(shape) for shape in matrices if config.vocab_size not in shape)
    scores = (
        sum(length**2 for length in trial.lengths) * config.num_attention_heads * config.num_hidden_layers
    )
    logits = _rows_of_logits(objective, trial) * config.vocab_size
    return 4 * 4 * (sum(trial.lengths) * wide + scores + logits) + _gradient_bytes(objective)


def expected_peak(objective: Objective, trial: Trial) -> int:
    """The memory of one training step in bytes, estimated from the activations that short pieces of
    the batch keep; 0 for a batch too short to have pieces.

    What n tokens keep is a n + b n² + c, where b is above 0 if attention keeps its scores. Three
    lengths give a, b and c. To this the estimate adds one chunk of logits with its gradient, the
    gradients of all that trains, and what the backward holds temporarily: as much as another layer,
    and a fifth of everything.
    """
    if trial.row_length < 8:
        return 0
    config, n = objective.model.config, min(16, trial.row_length // 4)
    pieces = [objective.piece(trial.batch, length) for length in (n, 2 * n, 4 * n)]
    if any(piece is None for piece in pieces):
        return generous_peak(objective, trial)
    with _same_random_numbers(_device(objective)):
        one, two, four = (saved_bytes(objective, piece, uncounted=config.vocab_size) for piece in pieces)
    b = max(0.0, (four - two - 2 * (two - one)) / (6 * n**2))
    a = (two - one) / n - 3 * b * n
    c = max(0.0, one - a * n - b * n**2)
    logits = _rows_of_logits(objective, trial) * config.vocab_size * 12  # fp32, softmax, gradient
    activations = sum(a * length + b * length**2 for length in trial.lengths)
    return int((1.2 + 1 / config.num_hidden_layers) * activations + c) + logits + _gradient_bytes(objective)


def _rows_of_logits(objective: Objective, trial: Trial) -> int:
    """Logits exist for so many positions at a time."""
    return min(chunk_rows(objective.model.config.vocab_size, _device(objective)), trial.num_learned)


def _gradient_bytes(objective: Objective) -> int:
    sizes = [parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad]
    return max(sizes, default=0) if objective.config.update_early else sum(sizes)


def _device(objective: Objective) -> torch.device:
    return next(objective.parameters()).device


def _same_random_numbers(device: torch.device) -> AbstractContextManager:
    """A context after which random numbers continue as if none had been drawn in it."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class DryRun:
    """Forward and backward of a batch, for the memory that they take: no update, no gradient left,
    no random number used up."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        """Raises UserError on a device whose memory cannot be measured."""
        if available_memory(device) is None:
            raise UserError(
                f"{setting('auto_batch')}: memory in use cannot be measured on {device.type} here; "
                "leave it out"
            )
        self._objective, self._device = objective, device
        self.must_know = device.type == "cpu"
        """Whether a batch that does not fit must not be tried: when memory runs out, the kernel
        kills the process without a warning."""
        self.begin()

    def begin(self) -> None:
        """Count from here what is in use."""
        self._before = self._in_use()

    def expected(self, trial: Trial) -> int:
        """The peak in bytes, estimated."""
        return expected_peak(self._objective, trial)

    def peak(self, trial: Trial) -> int | None:
        """The peak in bytes, beyond those in use at the beginning; None if the device ran out of
        memory."""
        self._reset()
        try:
            with _same_random_numbers(self._device):
                self._objective(trial.batch)[0].backward()
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            fits = False
        finally:
            for parameter in self._objective.parameters():
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
        """Begin a new peak, and free what the last trial left in a cache."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")


# ---- when it runs out


@contextmanager
def memory_advice(
    lengths: Sequence[int], micro_batches: Iterable[list[int]], config: TrainConfig
) -> Iterator[None]:
    """Turn a lack of memory inside the block into a UserError that says which settings to lower;
    `lengths` are those of all examples."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        sizes = ([lengths[index] for index in micro] for micro in micro_batches)
        largest = max(sizes, key=sum if config.packing else lambda sizes: len(sizes) * max(sizes))
        if config.update_early:
            micro_batch = f"{setting('global_batch_size')} ({config.global_batch_size})"
        elif config.packing:
            micro_batch = f"{setting('micro_batch_tokens')} ({pack_tokens(config):,})"
        else:
            micro_batch = f"{setting('micro_batch_size')} ({config.micro_batch_size})"
        cause = " ".join(str(error).split()).rpartition("DefaultCPUAllocator: ")[2].split(". ")[:3]
        raise UserError(
            f"out of memory at a micro-batch of {len(largest)} examples with {sum(largest):,} tokens, "
            f"the longest {max(largest):,}: lower {micro_batch} or {setting('max_seq_length')} "
            f"({config.max_seq_length:,}); {'. '.join(cause) or type(error).__name__}"
        ) from error
