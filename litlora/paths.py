"""The names in a checkpoint directory, and the checks of paths that come before torch is imported."""

import os
from pathlib import Path

from litlora.config import CONFIG_FILE
from litlora.errors import CheckpointError, UserError
from litlora.prompts import STYLE_FILE
from litlora.tokenizer import SIDECAR_FILES

WEIGHTS_FILE = "lit_model.pth"
HYPERPARAMETERS_FILE = "hyperparameters.yaml"
METRICS_FILE = "metrics.csv"
FINAL = "final"
RUN_NAMES = (HYPERPARAMETERS_FILE, METRICS_FILE, FINAL, "step-*")
"""What a fine-tuning run writes into its directory, as glob patterns."""
CHECKPOINT_NAMES = (WEIGHTS_FILE, HYPERPARAMETERS_FILE, CONFIG_FILE, STYLE_FILE, *SIDECAR_FILES)
"""What a checkpoint directory holds."""


def checkpoint_dir(path: str | Path) -> Path:
    """The path, if it is a directory with a `lit_model.pth`. Raises CheckpointError otherwise. Opens nothing."""
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; a checkpoint directory is needed")
    if not (directory / WEIGHTS_FILE).is_file():
        hint = f"; did you mean {directory / FINAL}?" if (directory / FINAL / WEIGHTS_FILE).is_file() else ""
        raise CheckpointError(f"{directory}: not a checkpoint directory, it has no {WEIGHTS_FILE}{hint}")
    return directory


def output_dir(path: str, *, overwrite: bool, names: tuple[str, ...], inputs: list[Path]) -> Path:
    """The path, if results may be written there. Raises UserError, and changes nothing, if

    - it holds something and `overwrite` is off, or something that matches none of `names` (which we would not have written),
    - it is, holds or lies in what one of `inputs` names: writing there would destroy what is read, or
    - it is a file or cannot be written.
    """
    directory = Path(path)
    for source in inputs:
        ours, theirs = directory.resolve(), source.resolve()
        if theirs.is_relative_to(ours) or ours.is_relative_to(theirs):
            raise UserError(f"--out_dir {directory}: overlaps {source}, which is read; name another directory")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out_dir {directory}: is a file; name a directory")
    there = sorted(child.name for child in directory.iterdir()) if directory.exists() else []
    if there and not overwrite:
        raise UserError(f"--out_dir {directory}: already holds {there[0]}; name another directory, or replace it with --overwrite")
    if foreign := [name for name in there if not any(Path(name).match(pattern) for pattern in names)]:
        raise UserError(f"--out_dir {directory}: holds {foreign[0]}, which is not ours to replace; name another directory")
    above = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {directory}: cannot be written, as {above} is not a directory open to you")
    return directory
