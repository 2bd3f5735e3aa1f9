"""The names in a checkpoint directory, and the checks of paths that come before torch is
imported."""

import re
from dataclasses import dataclass
from pathlib import Path

from litlora import formats
from litlora.config import CONFIG_FILE
from litlora.errors import CheckpointError, UserError, setting
from litlora.formats import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES, WEIGHTS_FILE
from litlora.formats.families import HF_CONFIG_FILE
from litlora.prompts import STYLE_FILE
from litlora.settings import Finetune
from litlora.storage.atomic import LEFTOVERS, check_writable, settle
from litlora.tokenizer import SIDECAR_FILES

HYPERPARAMETERS_FILE = "hyperparameters.yaml"
METRICS_FILE = "metrics.csv"
STATE_FILE = "state.pth"
FINAL = "final"
RUN_NAMES = (HYPERPARAMETERS_FILE, METRICS_FILE, FINAL, "step-*", *LEFTOVERS)
"""What a fine-tuning run writes into its directory, as glob patterns."""
CHECKPOINT_NAMES = (WEIGHTS_FILE, HYPERPARAMETERS_FILE, CONFIG_FILE, STYLE_FILE, *SIDECAR_FILES)
"""What a checkpoint directory holds."""
PEFT_NAMES = (
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILES[0],
    *(name for name in SIDECAR_FILES if name != HF_CONFIG_FILE),
)
"""What a PEFT folder that we write holds."""
HF_NAMES = ("model*.safetensors", "model.safetensors.index.json", STYLE_FILE, *SIDECAR_FILES)
"""What a Hugging Face folder that we write holds."""


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds weights in a format that we read, whole or not."""
    try:
        return formats.detect(directory) is not None
    except CheckpointError:
        return True


def checkpoint_dir(path: str | Path) -> Path:
    """The path, if it is a checkpoint directory, or the directory of a weights' file. Raises
    CheckpointError. Opens small text files at most."""
    path = Path(path)
    directory = path.parent if path.name in formats.NAMED_FILES and not path.is_dir() else path
    if directory.is_file():
        hint = ""
        if directory.suffix == ".safetensors":
            hint = "; LoRA files of other tools are for scripts/lora_merger.py"
        raise CheckpointError(f"{directory}: is a file; a checkpoint directory is needed{hint}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; a checkpoint directory is needed")
    if formats.detect(directory) is not None:
        return directory
    formats.missing_part(directory)
    hint = f"; did you mean {directory / FINAL}?" if is_checkpoint(directory / FINAL) else ""
    raise CheckpointError(f"{directory}: not a checkpoint directory, it has no {WEIGHTS_FILE}{hint}")


def output_dir(
    path: str,
    *,
    overwrite: bool,
    names: tuple[str, ...],
    inputs: list[Path],
    option: str = setting("out_dir"),
    replaced: bool = True,
) -> Path:
    """The path, if results may be written there. Raises UserError, and changes nothing, if

    - it holds something and `overwrite` is off, or something that matches none of `names` (which we
      would not have written),
    - it is or holds one of `inputs`,
    - it is or holds the current directory, and will be `replaced` as a whole, or
    - it is a file or cannot be written.
    """
    directory = Path(path)
    keep_inputs(directory, inputs, option)
    if replaced and Path.cwd().is_relative_to(directory.resolve()):
        raise UserError(
            f"{option} {directory}: is or holds the current directory, and would be replaced; "
            "name another directory"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{option} {directory}: is a file; name a directory")
    there = sorted(child.name for child in directory.iterdir()) if directory.exists() else []
    if foreign := [name for name in there if not any(Path(name).match(pattern) for pattern in names)]:
        raise UserError(
            f"{option} {directory}: holds {foreign[0]}, which litlora does not replace; "
            "name another directory"
        )
    if there and not overwrite:
        raise UserError(
            f"{option} {directory}: already holds {there[0]}; name another directory, or replace it "
            f"with {setting('overwrite')}"
        )
    _check_writable(option, directory, directory.absolute())
    return directory


def _check_writable(option: str, path: Path, directory: Path) -> None:
    above = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        check_writable(above)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {above}: {error.strerror}") from None


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes, and where it starts."""

    path: Path
    start: Path | None = None
    """The step directory to resume from; of a run that is complete, its result; None: a new run."""

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.start is not None and self.start.name == FINAL


def run_directory(settings: Finetune, default: str, inputs: list[Path]) -> RunDirectory:
    """The directory of a fine-tuning run, `default` if the settings name none, and where resume
    lets it start.

    Raises UserError, and changes nothing, where `output_dir` does, unless the run is resumed in its
    own directory.
    """
    if settings.resume not in (None, "auto"):
        start = Path(settings.resume)
        if not (start / STATE_FILE).is_file():
            known = step_directories(start)
            hint = (
                f"did you mean {known[-1]}?"
                if known
                else f"name a step directory of a run; to train on a result, use {setting('checkpoint_dir')}"
            )
            raise CheckpointError(
                f"{setting('resume')} {start}: holds no training state ({STATE_FILE}); {hint}"
            )
        path = Path(settings.out_dir) if settings.out_dir else start.parent
        if path.resolve() != start.resolve().parent:
            return RunDirectory(
                output_dir(str(path), overwrite=False, names=RUN_NAMES, inputs=inputs, replaced=False), start
            )
        if (path / FINAL).exists():
            raise UserError(
                f"{setting('resume')} {start}: the run in {path} is complete; to continue it differently, "
                f"name another {setting('out_dir')}"
            )
        return RunDirectory(
            output_dir(str(path), overwrite=True, names=RUN_NAMES, inputs=inputs, replaced=False), start
        )
    path = Path(settings.out_dir or default)
    there = output_dir(
        str(path),
        overwrite=settings.overwrite or settings.resume == "auto",
        names=RUN_NAMES,
        inputs=inputs,
        replaced=False,
    )
    if settings.resume == "auto":
        settle(path)
        if (path / FINAL).exists():
            return RunDirectory(there, path / FINAL)
        if steps := step_directories(path):
            if not (steps[-1] / STATE_FILE).is_file():
                raise CheckpointError(
                    f"{setting('resume')} auto: {steps[-1]}: has no {STATE_FILE}, so it cannot be resumed; "
                    f"{setting('overwrite')} starts anew"
                )
            return RunDirectory(there, steps[-1])
    return RunDirectory(there)


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


def output_file(path: str, suffixes: tuple[str, ...], inputs: list[Path]) -> Path:
    """The path, with the first of `suffixes` put behind it unless it has one of them, if a file may
    be written there.

    A file that is there will be replaced. Raises UserError, and changes nothing, if it is one of
    `inputs` or lies in one, or cannot be written.
    """
    file = Path(path if path.endswith(suffixes) else path + suffixes[0])
    for source in inputs:
        if file.resolve() == source.resolve():
            raise UserError(f"{setting('output')} {file}: is {source}, which is read; name another file")
        if source.is_dir() and file.resolve().parent == source.resolve():
            raise UserError(
                f"{setting('output')} {file}: is in {source}, which is read; name another directory"
            )
    if file.is_dir():
        raise UserError(f"{setting('output')} {file}: is a directory; name a file")
    _check_writable(setting("output"), file, file.absolute().parent)
    return file


def keep_inputs(out_dir: Path, inputs: list[Path], option: str = setting("out_dir")) -> None:
    """Raise UserError if `out_dir` is or holds a directory that is read: replacing it would destroy
    that."""
    for source in inputs:
        if source.resolve().is_relative_to(out_dir.resolve()):
            raise UserError(f"{option} {out_dir}: holds {source}, which is read; name another directory")
