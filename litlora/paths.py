"""The names in a checkpoint directory, and the checks of input and output paths. Torch-free: a
command checks its paths before it imports torch."""

from pathlib import Path

from litlora import formats
from litlora.config import CONFIG_FILE
from litlora.errors import CheckpointError, UserError, setting
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES, WEIGHTS_FILE
from litlora.formats.families import HF_CONFIG_FILE
from litlora.prompts import STYLE_FILE
from litlora.storage.atomic import check_writable
from litlora.tokenizer import SIDECAR_FILES

HYPERPARAMETERS_FILE = "hyperparameters.yaml"
STATE_FILE = "state.pth"
FINAL = "final"
CHECKPOINT_NAMES = (WEIGHTS_FILE, HYPERPARAMETERS_FILE, CONFIG_FILE, STYLE_FILE, *SIDECAR_FILES)
"""What a checkpoint directory that we write holds."""
PEFT_NAMES = (
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILES[0],
    *(name for name in SIDECAR_FILES if name != HF_CONFIG_FILE),
)
"""What a PEFT folder that we write holds."""
MLX_NAMES = (PEFT_CONFIG_FILE, MLX_WEIGHTS_FILE)
"""What a folder for mlx-lm that we write holds."""
HF_NAMES = ("model*.safetensors", "model.safetensors.index.json", STYLE_FILE, *SIDECAR_FILES)
"""What a Hugging Face folder that we write holds."""


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has a format that we read, even if a part of it is missing."""
    try:
        return formats.detect(directory) is not None
    except CheckpointError:
        return True


def checkpoint_dir(path: str | Path) -> Path:
    """The checkpoint directory at `path`, which may name the weights' file in it. Raises
    CheckpointError if there is none. Opens small text files at most."""
    path = Path(path)
    directory = path.parent if path.name in formats.NAMED_FILES and not path.is_dir() else path
    if directory.is_file():
        hint = ""
        if directory.suffix in formats.GENERIC_SUFFIXES["safetensors"]:
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
    named: str = "out_dir",
    replaced: bool = True,
) -> Path:
    """The path, if results may be written there. Raises UserError, and changes nothing, if the
    directory

    - has content and `overwrite` is off, or content that matches none of `names` (we would not have
      written it),
    - is or holds one of `inputs`,
    - is or holds the current directory, and will be `replaced` as a whole, or
    - is a file or cannot be written.

    `named` is the setting that the path comes from.
    """
    directory, option = Path(path), setting(named)
    keep_inputs(directory, inputs, named)
    if replaced and Path.cwd().is_relative_to(directory.resolve()):
        raise UserError(
            f"{option} {directory}: is or holds the current directory, and would be replaced; name another"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{option} {directory}: is a file; name a directory")
    content = sorted(child.name for child in directory.iterdir()) if directory.exists() else []
    if foreign := [name for name in content if not any(Path(name).match(pattern) for pattern in names)]:
        raise UserError(
            f"{option} {directory}: holds {foreign[0]}, which litlora did not write; name another directory"
        )
    if content and not overwrite:
        raise UserError(
            f"{option} {directory}: already holds {content[0]}; name another directory, or replace it "
            f"with {setting('overwrite')}"
        )
    _check_writable(named, directory, directory.absolute())
    return directory


def output_file(path: str, suffixes: tuple[str, ...], inputs: list[Path], *, named: str = "output") -> Path:
    """The path, if a file may be written there; the first of `suffixes` is appended unless it ends
    with one of them.

    An existing file will be replaced. Raises UserError, and changes nothing, if the file is one of
    `inputs`, lies directly in one, or cannot be written. `named` is the setting that the path comes
    from.
    """
    file, option = Path(path if path.endswith(suffixes) else path + suffixes[0]), setting(named)
    for source in inputs:
        if file.resolve() == source.resolve():
            raise UserError(f"{option} {file}: is {source}, which is read; name another file")
        if source.is_dir() and file.resolve().parent == source.resolve():
            raise UserError(
                f"{option} {file}: lies in {source}, which is read, and would become part of it; name "
                "another directory"
            )
    if file.is_dir():
        raise UserError(f"{option} {file}: is a directory; name a file")
    _check_writable(named, file, file.absolute().parent)
    return file


def keep_inputs(out_dir: Path, inputs: list[Path], named: str = "out_dir") -> None:
    """Raise UserError if `out_dir` is or holds a directory that is read: replacing it would destroy
    that directory."""
    for source in inputs:
        if source.resolve().is_relative_to(out_dir.resolve()):
            raise UserError(
                f"{setting(named)} {out_dir}: holds {source}, which is read; name another directory"
            )


def _check_writable(named: str, path: Path, directory: Path) -> None:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        check_writable(existing)
    except OSError as error:
        raise UserError(f"{setting(named)} {path}: cannot be written: {existing}: {error.strerror}") from None
