"""A run's directory: what it holds, where a new run writes, and where a resumed one starts.
Torch-free.

It holds hyperparameters.yaml, metrics.csv, early checkpoints (step-000200/ ...) and final/. A run
replaces these names only: whatever else was put into its directory, such as a merge of its result,
stays as it is.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from litlora.errors import CheckpointError, UserError, setting
from litlora.paths import (
    FINAL,
    HYPERPARAMETERS_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    content,
    is_checkpoint,
    output_dir,
)
from litlora.report.metrics import METRICS_FILE
from litlora.report.page import PAGE_FILE
from litlora.storage.atomic import LEFTOVERS, settle

RUN_NAMES = (HYPERPARAMETERS_FILE, METRICS_FILE, PAGE_FILE, SAMPLES_FILE, FINAL, "step-*", *LEFTOVERS)
"""What a fine-tuning run writes into its directory, as glob patterns."""
_OF_EVERY_RUN = (HYPERPARAMETERS_FILE, f".{HYPERPARAMETERS_FILE}.*")
"""What tells that a directory is a run's: its settings, or the same set aside by a run that was
killed."""


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes, and where it starts."""

    path: Path
    start: Path | None = None
    """The step directory to resume from; of a complete run, its result; None: a new run."""
    outdated: tuple[str, ...] = ()
    """Checkpoint directories that were put into the directory of an earlier run, which a new one
    replaces: they stay, and may have been made of its result."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.start is not None and self.start.name == FINAL

    def how_to_go_on(self, command: str) -> str:
        """The end of a message on a run that was lost: what there is, and the `command` that
        continues from it."""
        steps = step_directories(self.path)
        if not steps or not (self.path / HYPERPARAMETERS_FILE).exists():
            return "; no checkpoint was saved"
        return f"; the newest checkpoint is {steps[-1]}; resume: {command}"


def run_directory(
    out_dir: str | None, default: str, *, overwrite: bool, resume: str | None, inputs: list[Path]
) -> RunDirectory:
    """The directory of a fine-tuning run, `out_dir` or else `default`, and where it starts.

    `resume` is a step directory, "auto" for the newest one in the run's directory, or None. Raises
    UserError, and changes nothing, where `output_dir` does, unless the run is resumed in its own
    directory.
    """
    if resume not in (None, "auto"):
        return _resumed_from(Path(resume), out_dir, inputs)
    path = Path(out_dir or default)
    checked = _checked(path, inputs, overwrite=overwrite or resume == "auto")
    start = _newest(path) if resume == "auto" else None
    ours, others = content(path, RUN_NAMES)
    outdated = tuple(name for name in others if is_checkpoint(path / name)) if ours and not start else ()
    return RunDirectory(checked, start, outdated)


def _resumed_from(start: Path, out_dir: str | None, inputs: list[Path]) -> RunDirectory:
    """The run that goes on from a step directory, in the run's own directory or in another."""
    resume = f"{setting('resume')} {start}"
    if not (start / STATE_FILE).is_file():
        steps = step_directories(start)
        hint = (
            f"did you mean {steps[-1]}?"
            if steps
            else f"name a step directory of a run, or train on a result with {setting('checkpoint_dir')}"
        )
        raise CheckpointError(f"{resume}: has no {STATE_FILE}, the state of a run; {hint}")
    path = Path(out_dir) if out_dir else start.parent
    is_own = (
        Path(os.path.realpath(path)) == start.resolve().parent
    )  # Path.resolve fails for a link in a circle
    if is_own and (path / FINAL).exists():
        raise UserError(
            f"{resume}: the run in {path} is complete; to continue differently from there, name another "
            f"{setting('out_dir')}"
        )
    return RunDirectory(_checked(path, inputs, overwrite=is_own), start)


def _newest(path: Path) -> Path | None:
    """Where --resume auto starts: the result, the newest step directory, or nowhere."""
    settle(path)
    if (path / FINAL).exists():
        return path / FINAL
    steps = step_directories(path)
    if steps and not (steps[-1] / STATE_FILE).is_file():
        raise CheckpointError(
            f"{setting('resume')} auto: {steps[-1]}: has no {STATE_FILE}, so it cannot be resumed; start "
            f"anew with {setting('overwrite')}"
        )
    return steps[-1] if steps else None


def _checked(path: Path, inputs: list[Path], *, overwrite: bool) -> Path:
    """The path, if a run may write there. Raises UserError where `output_dir` does, for a checkpoint
    directory, and for one with other content than a run and checkpoints."""
    place = f"{setting('out_dir')} {path}"
    if is_checkpoint(path):
        raise UserError(f"{place}: is a checkpoint directory, not a run's; name another directory")
    ours, others = content(path, RUN_NAMES)
    is_run = any(Path(name).match(pattern) for name in ours for pattern in _OF_EVERY_RUN)
    foreign = [] if is_run else [name for name in others if not is_checkpoint(path / name)]
    if foreign:
        raise UserError(f"{place}: holds {foreign[0]}, which litlora did not write; name another directory")
    if ours and not overwrite:
        go_on = "" if FINAL in ours else f", continue that run with {setting('resume')} auto,"
        raise UserError(
            f"{place}: already holds {ours[0]}; name another directory{go_on} or replace that run with "
            f"{setting('overwrite')}"
        )
    return output_dir(str(path), overwrite=True, names=RUN_NAMES, inputs=inputs, replaced=False)


def step_directory(run_dir: Path, step: int) -> Path:
    """The early checkpoint after so many steps."""
    return run_dir / f"step-{step:06}"


def step_directories(run_dir: Path) -> list[Path]:
    """The early checkpoints in a run's directory, oldest first."""
    found = run_dir.glob("step-*") if run_dir.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d{6,}", path.name)), key=step_of)


def step_of(step_dir: Path) -> int:
    """The number in the name of a step directory."""
    return int(step_dir.name.removeprefix("step-"))
