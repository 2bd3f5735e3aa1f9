"""Trainer: THE training loop. It sees an objective, examples and what requires a gradient; it knows
nothing of LoRA, or of what an example is."""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litlora.data.batches import Step
from litlora.errors import DataError, UserError, setting
from litlora.lora.mode import evaluating
from litlora.report import events
from litlora.report.sinks import Sink
from litlora.settings import TrainConfig
from litlora.train.best import BestSoFar
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.early import EarlyUpdates
from litlora.train.interrupts import GivenUp, Interrupts, Stop
from litlora.train.memory import memory_advice
from litlora.train.objective import Objective
from litlora.train.optim import lr_at, make_optimizer, set_learning_rate, skips_by_itself
from litlora.train.parallel import Parallel, local
from litlora.train.plan import Plan, evaluation_plan
from litlora.train.probe import Probe
from litlora.train.resume import Position, State, capture
from litlora.train.state_check import check_place_in_data
from litlora.train.validation import evaluate


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
        """Of this rank since the last logged line: the loss, and the objective's figures."""
        self._gradients_checked = False
        self._late = parallel.reads_late and skips_by_itself(optimizer) and self.early is None
        self._own_optimizer = optimizer
        self._unread: StepResult | None = None

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
                self.train_step(epoch, index, micro_batches)
                last = at.step == self.total_steps
                at.validation_due = bool(self.data.val) and (last or _is_due(at.step, config.eval_interval))
                if last or self.probes:
                    self.settle()
                if at.validation_due:
                    self.validate()
                if last or self.best.is_over(at):
                    return None
                self._look(lambda probe: probe.after(at.step, last=False))
                if stopped := self.interrupts.asked(self.parallel):
                    self.settle()
                    return stopped
                if _is_due(at.step, config.save_interval) and not self._is_saved:
                    self.settle()
                    # During a series of bad steps the weights may already be spoilt: do not let such
                    # a checkpoint replace a good one.
                    if not at.skipped_in_a_row:
                        self.save()
        except GivenUp:
            return self.interrupts.asked(self.parallel)
        return None

    def train_step(self, epoch: int, index: int, micro_batches: Step) -> None:
        """One optimizer step, number `index` of its epoch. What it measured is read here, or where
        that would wait for the device, when the next step is on its way (`settle`)."""
        at = self.at
        learning_rate = lr_at(at.step, self.total_steps, self.config)
        set_learning_rate(self.optimizer, learning_rate)
        started = time.perf_counter()
        with memory_advice(self.lengths, micro_batches, self.config):
            result = self.optimizer_step(micro_batches, epoch, learning_rate)
            self.settle()
        at.count(epoch, index, time.perf_counter() - started, result.tokens)
        self._unread = result
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Read what the last step measured, unless that is done, and report it."""
        result, at = self._unread, self.at
        if result is None:
            return
        self._unread = None
        grad_norm, _, *sums = values = result.values()
        finite = all(math.isfinite(value) for value in values[:2])
        at.judge(finite)
        at.interval_tokens += result.tokens
        if finite:
            named = zip(self.sums.items(), sums, strict=True)
            self.sums = {name: total + value for (name, total), value in named}
            at.interval_supervised += result.weight
        self.sink.handle(
            events.Step(
                at.step,
                result.epoch,
                result.learning_rate,
                float(grad_norm),
                finite,
                at.skipped,
                at.skipped_in_a_row,
            )
        )
        if at.skipped_in_a_row > self.config.max_bad_steps:
            self._give_up()
        if at.step % self.config.log_interval == 0 or at.step in (1, self.total_steps):
            self._log(result.learning_rate, float(grad_norm))

    def _log(self, learning_rate: float, grad_norm: float) -> None:
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
                learning_rate,
                grad_norm,
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
        self.settle()
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

    def optimizer_step(self, micro_batches: Step, epoch: int, learning_rate: float) -> "StepResult":
        """Every unit of weight in the step, such as a supervised token, counts the same in
        whichever micro-batch it is."""
        parallel, objective = self.parallel, self.objective
        indices = [index for micro in micro_batches for index in micro]
        with objective.in_step():
            objective.begin_step(_Chosen(self.data.train, sorted(indices)), parallel)
            weight = sum(objective.weight(self.data.train[index]) for index in indices)
            if weight == 0:
                raise DataError(
                    "no token is left to learn in a whole step, the one with training example "
                    f"{min(indices)}: every label is masked"
                )
            sums = self._backward(micro_batches, weight)
        if not self._gradients_checked:
            _check_gradients(objective, self.early)
            self._gradients_checked = True
        parallel.average(objective.parameters())
        if self.early is None:
            norm = parallel.clip(objective.parameters(), self.config.max_grad_norm)
        else:
            norm = self.early.norm()
        total = parallel.sum(sums["loss"])
        values = self.parallel.read([norm, total, *sums.values()])
        if self._late:
            self._own_optimizer.found_inf = (~(norm + total).isfinite()).to(torch.float32)
            self.optimizer.step()  # changes nothing where that is 1
        elif self.early is None and all(math.isfinite(value) for value in values()[:2]):
            self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(self.lengths[index] for index in indices)
        return StepResult(values, weight, tokens, epoch, learning_rate)

    def _backward(self, micro_batches: Step, weight: int) -> dict[str, Tensor]:
        """The gradients of a step's micro-batches, divided by its weight; returns the sums of what they
        measured."""
        parallel, objective = self.parallel, self.objective
        sums, rounds = self._no_sums(parallel.device), math.ceil(len(micro_batches) / parallel.world_size)
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
        return sums

    def _no_sums(self, device: torch.device | None = None) -> dict[str, Tensor]:
        return {name: torch.zeros((), device=device) for name in ("loss", *self.objective.figures)}

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

    values: Callable[[], list[Tensor]]
    """Read from the device: the norm of the gradient before clipping; the loss of all ranks; the sums
    of this rank, as `Trainer.sums`. If one of the first two is not finite, nothing was changed, or with
    early updates no weight whose gradient is not finite."""
    weight: int
    """Of the examples of all ranks."""
    tokens: int
    """Of all ranks."""
    epoch: int
    learning_rate: float


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
