"""The best step so far, by validation loss: its checkpoint is kept and becomes final/ (keep_best),
and a run that no longer gets better ends (early_stopping_patience)."""

from collections.abc import Callable

from litlora.errors import UserError, setting
from litlora.paths import STATE_FILE
from litlora.report.events import Done
from litlora.settings import TrainConfig
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.resume import Position, State, read_state


class BestSoFar:
    """What the settings ask for; how far it has come is in the position, so that it is resumed."""

    def __init__(self, config: TrainConfig, checkpoints: EarlyCheckpoints, *, has_validation: bool) -> None:
        """Raises UserError if there is no validation loss to judge by."""
        self._judges, self._patience = bool(config.judging), config.early_stopping_patience
        self._keeps, self._checkpoints = config.keep_best, checkpoints
        if self._judges and not has_validation:
            raise UserError(
                f"{setting(config.judging[0])}: needs validation data, and no example was held out; raise "
                f"{setting('val_fraction')}, or name {setting('val_path')}"
            )

    def judge(self, at: Position, save: Callable[[], bool], *, last: bool) -> None:
        """Count the validation of this step. If its loss is the lowest so far, `save` the step's
        checkpoint, unless it is the last step, which becomes final/ anyway."""
        if not self._judges:
            return
        former = at.best_step, at.best_loss
        if at.best_loss is not None and at.val_loss >= at.best_loss:
            at.validations_since_best += 1
            return
        at.best_step, at.best_loss, at.validations_since_best = at.step, at.val_loss, 0
        if self._keeps and not last and not save():
            at.best_step, at.best_loss = former  # the best is one that can be read again

    def is_over(self, at: Position) -> bool:
        """Whether the loss has not become lower for as many validations as the patience allows."""
        return self._patience is not None and at.validations_since_best >= self._patience

    def kept_step(self, at: Position) -> int | None:
        """The step whose checkpoint is kept whatever its age."""
        return at.best_step if self._keeps and at.best_loss is not None else None

    def is_elsewhere(self, at: Position) -> bool:
        """Whether the result is another step than the last one."""
        return self.kept_step(at) not in (None, at.step)

    def found(self, at: Position) -> bool:
        """Whether a run can go on from here: the checkpoint of the best step is in its directory."""
        step = self.kept_step(at)
        return step is None or (self._checkpoints.directory(step) / STATE_FILE).is_file()

    def misses(self, state: State) -> str:
        """The error of a run that goes on without it."""
        return (
            f"{setting('resume')} {state.directory}: {setting('keep_best')} needs "
            f"{self._checkpoints.directory(state.at.best_step)}, the best checkpoint so far, and it is "
            f"missing; resume from another step, or forget the best with {setting('resume_force')}"
        )

    def read(self, at: Position) -> State:
        """The best step, from its checkpoint. Raises CheckpointError if that is broken or gone."""
        return read_state(self._checkpoints.directory(at.best_step), {})[0]


def closing_lines(done: Done) -> list[str]:
    """What a run says of its best step, and of why it ended before its last one."""
    lines = []
    if done.fruitless:
        lines.append(
            f"stopped early after step {done.steps:,}: {done.fruitless} validations in a row without a loss "
            f"below {done.best_loss:.4f}, that of step {done.best_step:,}"
        )
    if done.final_step == done.steps:
        lines.append(f"best: the last step, {done.steps:,}, validation loss {done.best_loss:.4f}")
    elif done.final_step is not None:
        lines.append(
            f"best: step {done.final_step:,}, validation loss {done.best_loss:.4f}; final/ is that step, not "
            f"the last one, {done.steps:,}"
        )
    return lines
