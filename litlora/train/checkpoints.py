"""Early checkpoints: the step directories of a run, of which the newest are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from litlora.storage.atomic import remove_directory
from litlora.train.run_directory import step_directories, step_directory, step_of

Write = Callable[[Path, dict[str, Any]], None]
"""Writes a checkpoint directory that holds this training state; all ranks call it together."""


class EarlyCheckpoints:
    """run_dir/step-NNNNNN."""

    def __init__(
        self, run_dir: Path, write: Write, *, keep: int, newest: Path | None = None, prunes: bool = True
    ) -> None:
        """`newest`: the one from which the run resumes. `prunes`: whether this process removes the
        older ones; only one does."""
        self.run_dir, self.newest = run_dir, newest
        self._write, self._keep, self._prunes = write, keep, prunes

    def directory(self, step: int) -> Path:
        return step_directory(self.run_dir, step)

    def save(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """Write the checkpoint of this step and remove old ones, but not that of the step `best`.
        Raises OSError if it cannot be written; then nothing is removed."""
        self._write(self.directory(step), state)
        self.newest = self.directory(step)
        if self._prunes:
            self._prune(step, best)

    def _prune(self, step: int, best: int | None) -> None:
        """Remove all but the newest up to this step, and the best. Later ones, of a course that was
        given up, go too."""
        numbered = {step_of(directory): directory for directory in step_directories(self.run_dir)}
        kept = sorted(number for number in numbered if number <= step)[-self._keep :]
        for number in numbered.keys() - {*kept, best}:
            remove_directory(numbered[number])
