"""fit: the training loop. It sees an objective, examples and what requires a gradient; it knows nothing of LoRA."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from litlora.data.batches import Batch, Step, collate, num_supervised, plan_epoch
from litlora.data.examples import Example
from litlora.errors import DataError, UserError
from litlora.log import Metrics, Progress
from litlora.loss import IGNORE
from litlora.optim import lr_at, make_optimizer
from litlora.settings import TrainConfig


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


def fit(
    fabric: Fabric,
    objective: nn.Module,
    train: list[Example],
    val: list[Example],
    config: TrainConfig,
    *,
    seed: int,
    run_dir: Path,
    save: Callable[[Path], None],
    metrics: Metrics | None,
) -> Summary:
    """Train what requires a gradient in `objective`, a module that maps (input_ids, labels) to a summed loss.

    `save` writes a checkpoint directory; early ones are called run_dir/step-NNNNNN. Raises DataError if no token is to be
    learned, and UserError if the loss stops being finite or a trainable weight takes no part in it.
    """
    lengths = [len(example.ids) for example in train]

    def plan(epoch: int) -> list[Step]:
        return plan_epoch(
            lengths,
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            seed=seed + epoch,
            longest_first=epoch == 0,
        )

    total_steps = config.max_steps or config.epochs * len(plan(0))
    optimizer = make_optimizer(objective.parameters(), config)
    objective, optimizer = fabric.setup(objective, optimizer)
    objective.train()
    progress = Progress(total_steps, enabled=fabric.is_global_zero)
    clock = _Stopwatch()
    tokens = step = 0
    loss = val_loss = None
    logged = _Interval()

    try:
        for epoch, micro_batches in _steps(plan, total_steps):
            learning_rate = lr_at(step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with clock:
                done = _optimizer_step(fabric, objective, optimizer, train, micro_batches, config, check_gradients=step == 0)
            step += 1
            tokens += done.num_tokens
            logged.add(done)
            progress.step()

            if step % config.log_interval == 0 or step == total_steps or step == 1:
                loss, tokens_per_second = logged.loss(fabric), logged.tokens_per_second(clock.seconds)
                progress.report(step, loss=loss, learning_rate=learning_rate, tokens=logged.tokens, tokens_per_second=tokens_per_second)
                if metrics is not None:
                    metrics.write(
                        step=step,
                        epoch=epoch,
                        loss=loss,
                        learning_rate=learning_rate,
                        grad_norm=done.grad_norm,
                        tokens=tokens,
                        tokens_per_second=tokens_per_second,
                        seconds=clock.seconds,
                    )
                logged = _Interval(clock.seconds)
            last = step == total_steps
            if val and (last or (config.eval_interval and step % config.eval_interval == 0)):
                val_loss = evaluate(fabric, objective, val, config)
                if not math.isfinite(val_loss):
                    raise UserError(
                        f"the validation loss is {val_loss} after step {step}: the weights are spoilt, so the result is not saved; "
                        "lower --train.learning_rate"
                    )
                progress.say(f"step {step}/{total_steps} | validation loss {val_loss:.4f}")
                if metrics is not None:
                    metrics.write(step=step, epoch=epoch, val_loss=val_loss, tokens=tokens, seconds=clock.seconds)
            if config.save_interval and step % config.save_interval == 0 and not last:
                save(run_dir / f"step-{step:06}")
                if fabric.is_global_zero:
                    for old in sorted(run_dir.glob("step-*"))[: -config.keep_checkpoints]:
                        shutil.rmtree(old)
    except KeyboardInterrupt:
        if step:
            save(run_dir / f"step-{step:06}")
            progress.say(f"stopped after step {step} of {total_steps}; the weights so far are in {run_dir / f'step-{step:06}'}")
        raise
    finally:
        progress.close()
    return Summary(step, clock.seconds, tokens, loss, val_loss, peak_memory(fabric.device))


@torch.no_grad()
def evaluate(fabric: Fabric, objective: nn.Module, examples: list[Example], config: TrainConfig) -> float:
    """Mean loss over the supervised tokens of all examples, in nats; every token counts the same."""
    steps = plan_epoch(
        [len(example.ids) for example in examples],
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.micro_batch_size,
        seed=0,
        longest_first=False,
    )
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(objective):
        for (micro,) in steps[fabric.global_rank :: fabric.world_size]:
            batch = _to_device(collate([examples[index] for index in micro], mask_prompt=config.mask_prompt), fabric)
            total += objective(batch.input_ids, batch.labels).cpu().double()
    count = sum(num_supervised(example, config.mask_prompt) for example in examples)
    return float(fabric.all_reduce(total, reduce_op="sum")) / max(1, count)


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
    """One step over its micro-batches. Every supervised token of the step weighs the same, whichever micro-batch it is in."""
    everyone = [examples[index] for micro in micro_batches for index in micro]
    supervised = sum(num_supervised(example, config.mask_prompt) for example in everyone)
    if supervised == 0:
        first = min(index for micro in micro_batches for index in micro)
        raise DataError(f"no token is left to learn in a whole step, the one with training example {first}: every label is masked")
    rounds = math.ceil(len(micro_batches) / fabric.world_size)
    total = torch.zeros((), device=fabric.device)
    for turn in range(rounds):
        position = turn * fabric.world_size + fabric.global_rank
        # A rank without work in the last round computes another's batch with every label masked: the gradients are summed together.
        micro = micro_batches[position] if position < len(micro_batches) else micro_batches[0]
        batch = _to_device(collate([examples[index] for index in micro], mask_prompt=config.mask_prompt), fabric)
        labels = batch.labels if position < len(micro_batches) else torch.full_like(batch.labels, IGNORE)
        with fabric.no_backward_sync(objective, enabled=turn < rounds - 1):
            loss = objective(batch.input_ids, labels)
            # The loss is a sum: divide once, by all tokens of the step. Ranks are averaged, so undo their number.
            fabric.backward(loss * (fabric.world_size / supervised))
        total += loss.detach()
    if check_gradients:
        _check_gradients(objective)
    grad_norm = float(_clip(objective, config.max_grad_norm))
    if not math.isfinite(grad_norm):
        raise UserError(
            f"the loss or its gradient is no longer finite (gradient norm {grad_norm}): stopped before it spoils the weights; "
            "lower --train.learning_rate, or look for broken weights in the base"
        )
    optimizer.step()
    optimizer.zero_grad()
    return _StepResult(total, supervised, sum(len(example.ids) for example in everyone), grad_norm)


def _clip(objective: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of max_norm, if that is above 0; returns the norm before."""
    gradients = [p for p in objective.parameters() if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(gradients, max_norm or math.inf)


def _check_gradients(objective: nn.Module) -> None:
    """An adapter that does nothing must be impossible: everything trainable takes part in the loss."""
    idle = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise UserError(f"{idle[0]} and {len(idle) - 1} other trainable weights take no part in the loss, so training cannot change them")


def _steps(plan: Callable[[int], list[Step]], total_steps: int) -> Iterator[tuple[int, Step]]:
    """(epoch, micro-batches) of each optimizer step, epoch after epoch."""
    step = epoch = 0
    while True:
        for micro_batches in plan(epoch):
            if step == total_steps:
                return
            yield epoch, micro_batches
            step += 1
        epoch += 1


def _to_device(batch: Batch, fabric: Fabric) -> Batch:
    return Batch(batch.input_ids.to(fabric.device), batch.labels.to(fabric.device), batch.num_tokens)


class _Stopwatch:
    """Sums up the time spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._started


class _Interval:
    """Loss and tokens since the last logged line."""

    def __init__(self, started: float = 0.0) -> None:
        self._started = started
        self._loss: Tensor | float = 0.0
        self._supervised = 0
        self.tokens = 0

    def add(self, done: _StepResult) -> None:
        self._loss = self._loss + done.loss
        self._supervised += done.num_supervised
        self.tokens += done.num_tokens

    def loss(self, fabric: Fabric) -> float:
        return float(fabric.all_reduce(self._loss, reduce_op="sum")) / self._supervised

    def tokens_per_second(self, now: float) -> float:
        return self.tokens / (now - self._started)
