"""Trainer: THE training loop. It sees an objective, examples and what requires a gradient; it knows
nothing of LoRA, or of what an example is."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litlora.data.batches import Step
from litlora.errors import DataError, UserError, setting
from litlora.report import events
from litlora.report.sinks import Sink
from litlora.settings import TrainConfig
from litlora.train.best import BestSoFar
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.early import EarlyUpdates
from litlora.train.interrupts import GivenUp, Interrupts, Stop
from litlora.train.memory import memory_advice
from litlora.train.objective import Objective
from litlora.train.optim import lr_at, make_optimizer, set_learning_rate
from litlora.train.parallel import Parallel, local
from litlora.train.plan import Plan, evaluation_plan
from litlora.train.probe import Probe
from litlora.train.resume import Position, State, capture
from litlora.train.state_check import check_place_in_data


@dataclass(frozen=True)
class Data:
    """Examples of the kind that the objective takes."""

    train: Sequence[Any]
    val: Sequence[Any]
    seed: int = 0
    """Of the order in which the training examples are taken."""


class Trainer:
    """Trains what requires a gradient in an objective."""

    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        data: Data,
        config: TrainConfig,
        checkpoints: EarlyCheckpoints,
        *,
        sink: Sink,
        interrupts: Interrupts,
    ) -> None:
        self.parallel, self.objective, self.data, self.config = parallel, objective, data, config
        self.checkpoints, self.sink, self.interrupts = checkpoints, sink, interrupts
        self.probes: Sequence[Probe] = ()
        """What looks at the model beside the loss; whoever has some sets them before `fit`."""
        self.lengths = objective.lengths(data.train)
        self.plan = Plan(self.lengths, config, data.seed, parallel.world_size)
        self.total_steps = config.max_steps or config.epochs * self.plan.steps_per_epoch
        optimizer = make_optimizer(objective.trainable(), config)
        self.module, self.optimizer = parallel.setup(objective, optimizer)
        """The objective as called in a training step, and its optimizer."""
        self.early = EarlyUpdates(objective.trainable(), self.optimizer) if config.update_early else None
        self.at = Position()
        self.best = BestSoFar(config, checkpoints, has_validation=bool(data.val))
        self.sums = self._no_sums()
        """Of this rank since the last logged line: the loss, and the objective's figures. They stay
        on the device until the line is due."""
        self._gradients_checked = False

    def fit(self, resume: State | None = None) -> events.Done:
        """Train to the last step, or until a `Stop`, which saves an early checkpoint.

        A checkpoint that cannot be written does not end the training. Raises DataError if a step
        has no token to learn, and UserError if the loss stays non-finite, a trainable weight takes
        no part in it, or memory runs out.
        """
        if resume is not None:
            self.restore(resume)
        self.module.train()
        self.sink.handle(events.Begun(self.at.step, self.total_steps))
        try:
            stopped = self._loop()
            if stopped and not self._is_saved:
                self.save()
            if stopped is None and self.best.is_elsewhere(self.at):
                self._take_best()
            if stopped is None:
                with suppress(GivenUp):  # the run is complete without
                    self._look(lambda probe: probe.after(self.at.step, last=True))
            done = self._done(stopped)
            self.sink.handle(done)
        finally:
            self.sink.close()
        return done

    def restore(self, state: State) -> None:
        """Continue from this state. Raises CheckpointError, and changes nothing, if it does not
        fit."""
        if not state.is_forced:
            try:
                check_place_in_data(vars(state.at), self.plan.steps_per_epoch, self.total_steps)
            except ValueError as error:
                raise state.misfit(str(error)) from None
        if not self.best.found(state.at):
            if not state.is_forced:
                raise UserError(self.best.misses(state))
            state.at.forget_best()
        sums = state.restore(self.parallel, self.objective, self.optimizer, self.config, tuple(self.sums))
        self.sums |= sums
        self.at = state.at

    def _loop(self) -> Stop | None:
        """Every step still to be done; returns why it ended before the last one, or None."""
        at, config = self.at, self.config
        try:
            self._look(lambda probe: probe.begin(at.step))
            if at.validation_due:
                self.validate()
            if self.best.is_over(at):
                return None
            for epoch, index, micro_batches in self.plan.steps_from(at, self.total_steps):
                result = self.train_step(epoch, index, micro_batches)
                last = at.step == self.total_steps
                if at.step % config.log_interval == 0 or last or at.step == 1:
                    self.log(result)
                at.validation_due = bool(self.data.val) and (last or _is_due(at.step, config.eval_interval))
                if at.validation_due:
                    self.validate()
                if last or self.best.is_over(at):
                    return None
                self._look(lambda probe: probe.after(at.step, last=False))
                if stopped := self.interrupts.asked(self.parallel):
                    return stopped
                # During a series of bad steps the weights may already be spoilt: do not let such a
                # checkpoint replace a good one.
                if _is_due(at.step, config.save_interval) and not at.skipped_in_a_row and not self._is_saved:
                    self.save()
        except GivenUp:
            return self.interrupts.asked(self.parallel)
        return None

    def train_step(self, epoch: int, index: int, micro_batches: Step) -> "StepResult":
        """One optimizer step, number `index` of its epoch."""
        at = self.at
        learning_rate = lr_at(at.step, self.total_steps, self.config)
        set_learning_rate(self.optimizer, learning_rate)
        started = time.perf_counter()
        with memory_advice(self.lengths, micro_batches, self.config):
            result = self._optimizer_step(micro_batches, learning_rate)
        at.count(epoch, index, time.perf_counter() - started, result.tokens, result.finite)
        at.interval_tokens += result.tokens
        if result.finite:
            self.sums = {name: total + result.sums[name] for name, total in self.sums.items()}
            at.interval_supervised += result.weight
        self.sink.handle(
            events.Step(
                at.step,
                epoch,
                learning_rate,
                result.grad_norm,
                result.finite,
                at.skipped,
                at.skipped_in_a_row,
            )
        )
        if at.skipped_in_a_row > self.config.max_bad_steps:
            self._give_up()
        return result

    def log(self, result: "StepResult") -> None:
        """Report the means since the last logged line, and begin a new interval."""
        at, count = self.at, self.at.interval_supervised
        totals = {name: float(self.parallel.sum(total)) for name, total in self.sums.items()}
        means = {name: total / count if count else math.nan for name, total in totals.items()}
        at.loss = means.pop("loss")
        self.sink.handle(
            events.Logged(
                at.step,
                at.epoch,
                at.loss,
                result.learning_rate,
                result.grad_norm,
                at.tokens,
                at.interval_tokens,
                at.interval_tokens / (at.seconds - at.logged_seconds),
                at.seconds,
                at.skipped,
                means,
                peak_memory(self.parallel.device),
            )
        )
        self.sums = self._no_sums()
        at.logged_seconds, at.interval_tokens, at.interval_supervised = at.seconds, 0, 0

    def validate(self) -> None:
        """Evaluate the validation examples. Raises UserError if the loss is not finite."""
        at, val = self.at, self.data.val
        lengths = self.objective.lengths(val)
        with (
            self.interrupts.at_once(self.parallel),
            memory_advice(lengths, evaluation_plan(lengths, self.config), self.config),
        ):
            val_loss = evaluate(self.parallel, self.objective, val, self.config)
        if not math.isfinite(val_loss):
            raise UserError(
                f"the validation loss is {val_loss} after step {at.step}: the weights are spoilt, "
                f"so the result is not saved; lower {setting('learning_rate')}"
            )
        at.val_loss, at.validation_due = val_loss, False
        self.sink.handle(events.Validation(at.step, at.epoch, val_loss, at.tokens, at.seconds, at.skipped))
        self.best.judge(at, self.save, last=at.step == self.total_steps)

    def _look(self, through: Callable[[Probe], list[events.Event]]) -> None:
        """Let the probes look at the model as it is."""
        for probe in self.probes:
            with self.interrupts.at_once(self.parallel), evaluating(self.objective), torch.no_grad():
                found = self.objective(None, lambda _, probe=probe: through(probe))
            for event in found:
                self.sink.handle(event)

    @property
    def _is_saved(self) -> bool:
        """Whether this step has a checkpoint."""
        return self.checkpoints.newest == self.checkpoints.directory(self.at.step)

    def _take_best(self) -> None:
        """Put the weights of the best step in the place of the last one's. Raises UserError, after
        saving the last step, if one of the ranks cannot read them."""
        failed = None
        try:
            best = self.best.read(self.at)
            best.check_weights(self.objective)
        except UserError as error:
            failed = error
        failed = next(filter(None, self.parallel.gather(failed)), None)
        if failed is not None:
            self.save()
            raise failed
        best.put_weights(self.objective)

    def save(self) -> bool:
        """Save an early checkpoint; if that fails, training continues. Returns whether it is there, on
        all ranks the same."""
        directory, newest = self.checkpoints.directory(self.at.step), self.checkpoints.newest
        state = capture(self.parallel, self.objective, self.optimizer, self.at, self.sums)
        try:
            self.checkpoints.save(self.at.step, state, self.best.kept_step(self.at))
        except OSError as error:
            self.sink.handle(
                events.Note(
                    f"{directory} could not be saved ({error.strerror or error}); "
                    f"the newest checkpoint is {newest or 'none'}"
                )
            )
            return not self.parallel.largest(True)
        self.sink.handle(events.Saved(self.at.step, directory))
        return not self.parallel.largest(False)

    def _done(self, stopped: Stop | None) -> events.Done:
        at = self.at
        return events.Done(
            at.step,
            at.seconds,
            at.tokens,
            at.loss,
            at.val_loss,
            peak_memory(self.parallel.device),
            at.skipped,
            stopped,
            self.checkpoints.newest,
            best_step=at.best_step,
            best_loss=at.best_loss,
            final_step=self.best.kept_step(at),
            fruitless=at.validations_since_best if self.best.is_over(at) else 0,
        )

    def _optimizer_step(self, micro_batches: Step, learning_rate: float) -> "StepResult":
        """Every unit of weight in the step, such as a supervised token, counts the same in
        whichever micro-batch it is."""
        parallel, objective = self.parallel, self.objective
        indices = [index for micro in micro_batches for index in micro]
        objective.begin_step(_Chosen(self.data.train, sorted(indices)), parallel)
        weight = sum(objective.weight(self.data.train[index]) for index in indices)
        if weight == 0:
            raise DataError(
                "no token is left to learn in a whole step, the one with training example "
                f"{min(indices)}: every label is masked"
            )
        sums, rounds = self._no_sums(), math.ceil(len(micro_batches) / parallel.world_size)
        for turn in range(rounds):
            position = turn * parallel.world_size + parallel.rank
            # A rank without work in the last round computes another one's batch and learns nothing
            # from it, as all ranks exchange gradients together.
            idle = position >= len(micro_batches)
            micro = micro_batches[0 if idle else position]
            batch = objective.batch([self.data.train[index] for index in micro], parallel.device)
            with parallel.accumulating(self.module, enabled=turn < rounds - 1):
                loss, figures = self.module(objective.idle(batch) if idle else batch)
                # The loss is a sum: divide once, by the weight of the step. Gradients are averaged
                # over the ranks, so multiply by their number.
                loss_of_step = loss * (0.0 if idle else parallel.world_size / weight)
                if self.early is None:
                    parallel.backward(loss_of_step)
                else:
                    self.early.backward(parallel, loss_of_step)
            if not idle:
                for name, value in {"loss": loss, **figures}.items():
                    sums[name] += value.detach()
        if not self._gradients_checked:
            _check_gradients(objective, self.early)
            self._gradients_checked = True
        parallel.average(objective.parameters())
        if self.early is None:
            norm = parallel.clip(objective.parameters(), self.config.max_grad_norm)
        else:
            norm = self.early.norm()
        total = parallel.sum(sums["loss"])
        # Read both at once: it waits for the device.
        grad_norm, summed_loss = torch.stack([norm, total.to(torch.float32)]).tolist()
        finite = math.isfinite(grad_norm) and math.isfinite(summed_loss)
        if finite and self.early is None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(self.lengths[index] for index in indices)
        return StepResult(sums, weight, tokens, learning_rate, grad_norm, finite)

    def _no_sums(self) -> dict[str, Tensor]:
        names = ("loss", *self.objective.figures)
        return {name: torch.zeros((), device=self.parallel.device) for name in names}

    def _give_up(self) -> None:
        """Save the last good weights, and raise UserError: too many steps in a row were not
        finite."""
        at = self.at
        if at.skipped < at.step and self.parallel.smallest(_all_finite(self.objective)):
            self.save()
        newest = self.checkpoints.newest
        kept = f"the newest checkpoint, of finite weights, is {newest}" if newest else "nothing was saved"
        raise UserError(
            f"{at.skipped_in_a_row} steps in a row had a loss or a gradient that is not finite, "
            f"and were skipped: stopped after step {at.step}; {kept}; lower {setting('learning_rate')}, "
            "or look for broken weights in the base"
        )


@dataclass(frozen=True)
class _Chosen(Sequence[Any]):
    """Some of the examples, each read when it is asked for."""

    examples: Sequence[Any]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.examples[self.indices[index]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    sums: dict[str, Tensor]
    """The loss and the objective's figures, of this rank; not read from the device."""
    weight: int
    """Of the examples of all ranks."""
    tokens: int
    """Of all ranks."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    finite: bool
    """Whether loss and gradient are, on all ranks; if not, nothing was changed, or with early updates
    no weight whose gradient is not."""


@torch.no_grad()
def evaluate(parallel: Parallel, objective: Objective, examples: Sequence[Any], config: TrainConfig) -> float:
    """The loss of all examples by their weight: for SFT the mean over supervised tokens, in
    nats."""
    micro_batches = evaluation_plan(objective.lengths(examples), config)
    exact = torch.float32 if parallel.device.type == "mps" else torch.float64  # mps has no float64
    total = torch.zeros((), dtype=exact, device=parallel.device)
    with evaluating(objective):
        objective.begin_step(examples, parallel)
        for micro, counts in parallel.shared(micro_batches):
            loss, _ = objective(objective.batch([examples[index] for index in micro], parallel.device))
            total += loss if counts else 0
    weight = sum(objective.weight(example) for example in examples)
    return float(parallel.sum(total)) / max(1, weight)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the former mode after it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: on a CUDA device its own, else the process's
    resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _is_due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps, never if that is 0, happens now."""
    return bool(interval) and step % interval == 0


def _check_gradients(objective: Objective, early: EarlyUpdates | None) -> None:
    """Raise UserError unless everything trainable takes part in the loss: an adapter that does
    nothing must be impossible."""
    if early is None:
        idle = [name for name, parameter in objective.trainable().items() if parameter.grad is None]
    else:
        idle = early.without_gradient()
    if idle:
        raise UserError(
            f"{idle[0]} and {len(idle) - 1} other trainable weights take no part in the loss, "
            "so training cannot change them"
        )


@torch.no_grad()
def _all_finite(objective: Objective) -> bool:
    """Whether all that this rank holds of what trains is finite."""
    return all(bool(local(parameter).isfinite().all()) for parameter in objective.trainable().values())
