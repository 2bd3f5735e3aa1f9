"""fit: the training loop. It sees an objective, examples and what requires a gradient; it knows
nothing of LoRA."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litlora.data.batches import Batch, Step, collate, num_supervised, plan_epoch
from litlora.data.examples import Example
from litlora.errors import DataError, UserError
from litlora.report.log import Metrics, Progress
from litlora.settings import TrainConfig
from litlora.storage.atomic import remove_directory
from litlora.train.fabric import Fabric
from litlora.train.interrupts import GivenUp, Interrupts, Stop
from litlora.train.memory import is_lack_of_memory
from litlora.train.optim import lr_at, make_optimizer
from litlora.train.resume import Position, State, capture
from litlora.train.run_directory import step_directories, step_directory, step_of


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    steps: int
    seconds: float
    """Training alone, without validation and saving."""
    tokens: int
    """Real tokens seen, prompts included, padding not."""
    loss: float
    """Mean over the supervised tokens of the last logged interval, in nats."""
    val_loss: float | None
    """Mean over the supervised tokens of the validation examples, at the end."""
    peak_memory: int
    """Bytes: of the device if it has memory of its own, else of the process."""
    skipped: int
    """Steps whose loss or gradient was not finite: they changed nothing."""
    stopped: Stop | None
    """Why it ended before its last step; None if it did not."""
    checkpoint: Path | None
    """The newest early checkpoint of this process."""


def fit(
    fabric: Fabric,
    objective: nn.Module,
    train: list[Example],
    val: list[Example],
    config: TrainConfig,
    *,
    seed: int,
    run_dir: Path,
    save: Callable[[Path, dict[str, Any]], None],
    metrics: Metrics | None,
    interrupts: Interrupts | None = None,
    resume: State | None = None,
) -> Summary:
    """Train what requires a gradient in `objective`, a module that maps a `Batch`'s parts to a
    summed loss.

    `save` writes a checkpoint directory and in it the state that can be handed back as `resume`;
    early ones are called run_dir/step-NNNNNN. All ranks call it together, and an OSError in it does
    not end the training. Raises DataError if no token is to be learned, and UserError if the loss
    stays other than finite, a trainable weight takes no part in it, or memory runs out.
    """
    interrupts = interrupts or Interrupts()
    lengths = [len(example.ids) for example in train]

    def plan(epoch: int) -> list[Step]:
        return plan_epoch(
            lengths,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            pack_tokens=pack_tokens(config),
            num_ranks=fabric.world_size,
            seed=seed + epoch,
            longest_first=epoch == 0,
        )

    total_steps = config.max_steps or config.epochs * len(plan(0))
    module, optimizer = objective, make_optimizer(objective.parameters(), config)
    objective, optimizer = fabric.setup(objective, optimizer)
    objective.train()
    at, interval_loss = Position(), torch.zeros((), device=fabric.device)
    if resume is not None:
        at, interval_loss = resume.at, resume.restore(fabric, module, optimizer)
    logged = _Interval(at, interval_loss)
    progress = Progress(total_steps, enabled=fabric.is_global_zero, first=at.step)
    saved: Path | None = resume.directory if resume is not None else None

    def checkpoint() -> None:
        nonlocal saved
        directory = step_directory(run_dir, at.step)
        state = capture(fabric, module, optimizer, at, logged.loss)
        try:
            save(directory, state)
        except OSError as error:
            progress.say(
                f"note: {directory} could not be saved ({error.strerror or error}); the newest checkpoint is {saved or 'none'}"
            )
            return
        saved = directory
        if fabric.is_global_zero:
            _prune(run_dir, at.step, config.keep_checkpoints)

    def validate() -> None:
        with interrupts.at_once(fabric), _memory_advice(val, evaluation_plan(val, config), config):
            val_loss = evaluate(fabric, objective, val, config)
        if not math.isfinite(val_loss):
            raise UserError(
                f"the validation loss is {val_loss} after step {at.step}: the weights are spoilt, so the result is not saved; "
                "lower --train.learning_rate"
            )
        at.val_loss, at.validation_due = val_loss, False
        progress.say(f"step {at.step}/{total_steps} | validation loss {val_loss:.4f}")
        if metrics is not None:
            metrics.write(
                step=at.step,
                epoch=at.epoch,
                val_loss=val_loss,
                tokens=at.tokens,
                seconds=at.seconds,
                skipped=at.skipped,
            )

    stopped, check_gradients = None, True
    try:
        if at.validation_due:
            validate()
        for epoch, index, micro_batches in _steps(plan, at, total_steps):
            learning_rate = lr_at(at.step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            started = time.perf_counter()
            with _memory_advice(train, micro_batches, config):
                done = _optimizer_step(
                    fabric,
                    objective,
                    optimizer,
                    train,
                    micro_batches,
                    config,
                    check_gradients=check_gradients,
                )
            check_gradients = False
            at.count(epoch, index, time.perf_counter() - started, done.num_tokens, done.finite)
            logged.add(done)
            progress.step()

            if not done.finite:
                progress.say(
                    f"step {at.step}/{total_steps} | skipped, as its loss or gradient is not finite: "
                    f"{at.skipped_in_a_row} in a row, {at.skipped} in all"
                )
                if at.skipped_in_a_row > config.max_bad_steps:
                    if at.skipped < at.step and _all_finite(module):
                        checkpoint()
                    raise UserError(_too_many_bad_steps(at, saved))
            last = at.step == total_steps
            if at.step % config.log_interval == 0 or last or at.step == 1:
                at.loss, tokens_per_second = logged.mean_loss(fabric), logged.tokens_per_second
                progress.report(
                    at.step,
                    loss=at.loss,
                    learning_rate=learning_rate,
                    tokens=at.interval_tokens,
                    tokens_per_second=tokens_per_second,
                )
                if metrics is not None:
                    metrics.write(
                        step=at.step,
                        epoch=epoch,
                        loss=at.loss,
                        learning_rate=learning_rate,
                        grad_norm=done.grad_norm,
                        tokens=at.tokens,
                        tokens_per_second=tokens_per_second,
                        seconds=at.seconds,
                        skipped=at.skipped,
                    )
                logged.restart()
            at.validation_due = bool(val) and (
                last or bool(config.eval_interval and at.step % config.eval_interval == 0)
            )
            if at.validation_due:
                validate()
            if last:
                break
            if stopped := interrupts.asked(fabric):
                break
            # In the middle of a series of bad steps the weights may be spoilt already; the good
            # checkpoints are not given up for them.
            if config.save_interval and at.step % config.save_interval == 0 and not at.skipped_in_a_row:
                checkpoint()
    except GivenUp:
        stopped = interrupts.asked(fabric)
    finally:
        progress.close()
    if stopped and saved != step_directory(run_dir, at.step):
        checkpoint()
    return Summary(
        at.step,
        at.seconds,
        at.tokens,
        at.loss,
        at.val_loss,
        peak_memory(fabric.device),
        at.skipped,
        stopped,
        saved,
    )


@torch.no_grad()
def evaluate(fabric: Fabric, objective: nn.Module, examples: list[Example], config: TrainConfig) -> float:
    """Mean loss over the supervised tokens of all examples, in nats; every token counts the
    same."""
    micro_batches = evaluation_plan(examples, config)
    exact = torch.float32 if fabric.device.type == "mps" else torch.float64  # which mps does not have
    total = torch.zeros((), dtype=exact, device=fabric.device)
    with evaluating(objective):
        for micro in micro_batches[fabric.global_rank :: fabric.world_size]:
            batch = make_batch([examples[index] for index in micro], config, fabric.device)
            total += objective(*batch)
    count = sum(num_supervised(example, config.mask_prompt) for example in examples)
    return float(fabric.all_reduce(total, reduce_op="sum")) / max(1, count)


def evaluation_plan(examples: list[Example], config: TrainConfig) -> list[list[int]]:
    """The micro-batches of a validation."""
    steps = plan_epoch(
        [len(example.ids) for example in examples],
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        pack_tokens=pack_tokens(config),
        seed=0,
        longest_first=False,
    )
    return [micro for step in steps for micro in step]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode behind it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use so far: on a CUDA device its own, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@dataclass(frozen=True)
class _StepResult:
    loss: Tensor
    """Summed over this rank's supervised tokens; not yet read from the device."""
    num_supervised: int
    """Over all ranks."""
    num_tokens: int
    """Over all ranks."""
    grad_norm: float
    """Before clipping."""
    finite: bool
    """Whether loss and gradient are, on all ranks; if not, nothing was changed."""


def _optimizer_step(
    fabric: Fabric,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    micro_batches: Step,
    config: TrainConfig,
    *,
    check_gradients: bool,
) -> _StepResult:
    """One step over its micro-batches. Every supervised token of the step weighs the same,
    whichever micro-batch it is in."""
    everyone = [examples[index] for micro in micro_batches for index in micro]
    supervised = sum(num_supervised(example, config.mask_prompt) for example in everyone)
    if supervised == 0:
        first = min(index for micro in micro_batches for index in micro)
        raise DataError(
            f"no token is left to learn in a whole step, the one with training example {first}: every label is masked"
        )
    rounds = math.ceil(len(micro_batches) / fabric.world_size)
    total = torch.zeros((), device=fabric.device)
    for turn in range(rounds):
        position = turn * fabric.world_size + fabric.global_rank
        # A rank without work in the last round computes another's batch and learns nothing from it:
        # the gradients are summed together.
        micro = micro_batches[position] if position < len(micro_batches) else micro_batches[0]
        batch = make_batch([examples[index] for index in micro], config, fabric.device)
        learned = slice(None if position < len(micro_batches) else 0)
        with fabric.no_backward_sync(objective, enabled=turn < rounds - 1):
            loss = objective(batch.input_ids, batch.positions[learned], batch.targets[learned], batch.lengths)
            # The loss is a sum: divide once, by all tokens of the step. Ranks are averaged, so undo
            # their number.
            fabric.backward(loss * (fabric.world_size / supervised))
        total += loss.detach()
    if check_gradients:
        _check_gradients(objective)
    everywhere = fabric.all_reduce(total.clone(), reduce_op="sum")
    grad_norm, summed_loss = torch.stack(
        [_clip(objective, config.max_grad_norm), everywhere.to(torch.float32)]
    ).tolist()  # one wait
    finite = math.isfinite(grad_norm) and math.isfinite(summed_loss)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return _StepResult(total, supervised, sum(len(example.ids) for example in everyone), grad_norm, finite)


def _clip(objective: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of max_norm, if that is above 0; returns the norm
    before."""
    gradients = [p for p in objective.parameters() if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(gradients, max_norm or math.inf)


def _check_gradients(objective: nn.Module) -> None:
    """An adapter that does nothing must be impossible: everything trainable takes part in the
    loss."""
    idle = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise UserError(
            f"{idle[0]} and {len(idle) - 1} other trainable weights take no part in the loss, so training cannot change them"
        )


def _prune(run_dir: Path, step: int, count: int) -> None:
    """Remove early checkpoints but the newest `count`, of which that of `step` is one: later ones
    are of a course given up."""
    numbered = {step_of(directory): directory for directory in step_directories(run_dir)}
    kept = sorted(number for number in numbered if number <= step)[-count:]
    for number in numbered.keys() - set(kept):
        remove_directory(numbered[number])


def _too_many_bad_steps(at: Position, saved: Path | None) -> str:
    kept = f"the newest checkpoint, of finite weights, is {saved}" if saved else "nothing was saved"
    return (
        f"{at.skipped_in_a_row} steps in a row had a loss or a gradient that is not finite, and were skipped: "
        f"stopped after step {at.step}; {kept}; lower --train.learning_rate, or look for broken weights in the base"
    )


@torch.no_grad()
def _all_finite(module: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad)


@contextmanager
def _memory_advice(examples: list[Example], micro_batches: Step, config: TrainConfig) -> Iterator[None]:
    """Turn a lack of memory inside the block into a UserError that says what to turn down, with the
    numbers."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if not is_lack_of_memory(error):
            raise
        sizes = ([len(examples[index].ids) for index in micro] for micro in micro_batches)
        largest = max(sizes, key=sum if config.packing else lambda sizes: len(sizes) * max(sizes))
        raise UserError(
            f"out of memory at a micro-batch of {len(largest)} examples with {sum(largest):,} tokens, the longest {max(largest):,}: "
            f"lower {_micro_batch_setting(config)} or --train.max_seq_length ({config.max_seq_length:,}); "
            f"{'. '.join(text.rpartition('DefaultCPUAllocator: ')[2].split('. ')[:3]) or type(error).__name__}"
        ) from error


def _micro_batch_setting(config: TrainConfig) -> str:
    """What sets the size of a micro-batch, with its value."""
    if config.packing:
        return f"--train.micro_batch_tokens ({pack_tokens(config):,})"
    return f"--train.micro_batch_size ({config.micro_batch_size})"


def _steps(
    plan: Callable[[int], list[Step]], at: Position, total_steps: int
) -> Iterator[tuple[int, int, Step]]:
    """(epoch, step of the epoch, micro-batches) of each optimizer step that is still to be done,
    epoch after epoch."""
    left, epoch, first = total_steps - at.step, at.epoch, at.step_in_epoch
    while left > 0:
        for index, micro_batches in enumerate(plan(epoch)[first : first + left], start=first):
            yield epoch, index, micro_batches
            left -= 1
        epoch, first = epoch + 1, 0


def pack_tokens(config: TrainConfig) -> int | None:
    """Tokens of a packed micro-batch; None without packing."""
    return (config.micro_batch_tokens or config.max_seq_length) if config.packing else None


def make_batch(examples: Sequence[Example], config: TrainConfig, device: torch.device) -> Batch:
    """A micro-batch of these examples on the device."""
    batch = collate(examples, mask_prompt=config.mask_prompt, packed=config.packing)
    tensors = (batch.input_ids, batch.positions, batch.targets)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the device
        tensors = (tensor.pin_memory() for tensor in tensors)
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), batch.lengths)


class _Interval:
    """Loss and tokens since the last logged line. All but the loss, which stays on the device, is
    kept in the position."""

    def __init__(self, at: Position, loss: Tensor) -> None:
        self._at = at
        self.loss = loss
        """This rank's sum."""

    def add(self, done: _StepResult) -> None:
        self._at.interval_tokens += done.num_tokens
        if done.finite:
            self.loss = self.loss + done.loss
            self._at.interval_supervised += done.num_supervised

    def mean_loss(self, fabric: Fabric) -> float:
        """Over all ranks; NaN if every step was skipped."""
        total = float(fabric.all_reduce(self.loss.clone(), reduce_op="sum"))
        return total / self._at.interval_supervised if self._at.interval_supervised else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self._at.interval_tokens / (self._at.seconds - self._at.logged_seconds)

    def restart(self) -> None:
        self.loss = torch.zeros_like(self.loss)
        self._at.logged_seconds, self._at.interval_tokens, self._at.interval_supervised = (
            self._at.seconds,
            0,
            0,
        )
