"""The names in a checkpoint directory, and the checks of input and output paths. Torch-free: a
command checks its paths before it imports torch."""

import os
from pathlib import Path

from litlora import formats
from litlora.config import CONFIG_FILE
from litlora.errors import CheckpointError, UserError, setting
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILES, WEIGHTS_FILE
from litlora.formats.families import HF_CONFIG_FILE
from litlora.formats.folder import INDEX_SUFFIX, PARTS_FILE
from litlora.formats.not_ours import hub_name, inner_directories, instead
from litlora.prompts import STYLE_FILE
from litlora.settings import REPOSITORY
from litlora.storage.atomic import check_writable
from litlora.tokenizer import SIDECAR_FILES

HYPERPARAMETERS_FILE = "hyperparameters.yaml"
STATE_FILE = "state.pth"
EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.json"
FINAL = "final"
CARD_FILE = "README.md"
"""The model card of an exported folder."""
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
"""Where folders of models have their licence."""
MODEL_GGUF, ADAPTER_GGUF = "model.gguf", "adapter.gguf"
CHECKPOINTS = Path("checkpoints")
"""Where downloads go."""
CHECKPOINT_NAMES = (
    *(WEIGHTS_FILE, PARTS_FILE, HYPERPARAMETERS_FILE, CONFIG_FILE, STYLE_FILE, EVALUATION_FILE),
    *SIDECAR_FILES,
)
"""What a checkpoint directory that we write holds."""
PEFT_NAMES = (
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILES[0],
    CARD_FILE,
    EVALUATION_FILE,
    *(name for name in SIDECAR_FILES if name != HF_CONFIG_FILE),
)
"""What a PEFT folder that we write holds."""
MLX_NAMES = (PEFT_CONFIG_FILE, MLX_WEIGHTS_FILE, CARD_FILE)
"""What a folder for mlx-lm that we write holds."""
HF_NAMES = (
    *("model*.safetensors", "model.safetensors.index.json", CARD_FILE, STYLE_FILE, EVALUATION_FILE),
    *SIDECAR_FILES,
)
"""What a Hugging Face folder that we write holds."""
GGUF_NAMES = (MODEL_GGUF, ADAPTER_GGUF, "Modelfile", CARD_FILE)
"""What a directory for llama.cpp that we write holds."""
READ_NAMES = (
    *(*formats.NAMED_FILES, *CHECKPOINT_NAMES, *PEFT_NAMES, *HF_NAMES),
    *(f"*{INDEX_SUFFIX}", "pytorch_model*.bin"),
)
"""What is read of a checkpoint directory of any format, as patterns."""
FILE_MANAGERS = (".DS_Store", "._*", "Thumbs.db", "desktop.ini")
"""What file managers leave in a directory that they have shown."""


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has a format that we read, even if a part of it is missing."""
    try:
        return formats.detect(directory) is not None
    except CheckpointError:
        return True


def stands_for_directory(path: Path) -> bool:
    """Whether a path means a checkpoint directory, by its own name or that of the weights in it; any
    other file stands for itself."""
    return not path.is_file() or path.name in formats.NAMED_FILES or path.suffix == ".gguf"


def checkpoint_dir(path: str | Path) -> Path:
    """The checkpoint directory at `path`, which may name the weights' file in it. Raises
    CheckpointError if there is none, and for a part of it that is not a file: it would be taken for
    missing, and another used in its place. Opens small text files at most."""
    path = Path(path)
    directory = path.parent if path.name in formats.NAMED_FILES and not path.is_dir() else path
    if path.suffix == ".gguf" and path.is_file():
        directory = _beside_gguf(path)
    if directory.is_file():
        hint = _of_file(directory)
        raise CheckpointError(f"{directory}: is a file; a checkpoint directory is needed{hint}")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; a checkpoint directory is needed{_elsewhere(directory)}"
        )
    _check_files(directory)
    if formats.detect(directory) is not None:
        return directory
    inner = [str(place) for place in inner_directories(directory) if _is_readable_checkpoint(place)]
    if inner:  # a run's result, which `inner_directories` names first, needs no choice
        inner = inner[:1] if inner[0] == str(directory / FINAL) else inner
        more = f" (or {_some(inner[1:])})" if inner[1:] else ""
        raise CheckpointError(f"{directory}: not a checkpoint directory; did you mean {inner[0]}{more}?")
    formats.missing_part(directory)
    what = instead(directory, setting("data")) or f"has no {WEIGHTS_FILE} and no {HF_CONFIG_FILE}"
    raise CheckpointError(f"{directory}: not a checkpoint directory: it {what}")


def _check_files(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if path.is_file() or not _matches(path.name, READ_NAMES):
            continue
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link that leads nowhere; copy the file, or remove the link")
        what = "a directory" if path.is_dir() else "a pipe, a device or a socket"
        raise CheckpointError(f"{path}: it is {what}, not a file; copy the file, or remove it")


def _beside_gguf(file: Path) -> Path:
    """The directory of a GGUF file. Raises CheckpointError if it holds another model, too."""
    format = formats.detect(file.parent)
    if format is None or format.name != "GGUF":
        raise CheckpointError(
            f"{file}: lies beside another checkpoint; move it into a directory of its own, with its "
            "tokenizer.json"
        )
    return file.parent


def _of_file(file: Path) -> str:
    """What to do with a file that was named instead of a directory."""
    if file.suffix == ".safetensors" and (file.parent / HF_CONFIG_FILE).is_file():
        return f": {file.parent}"
    if file.suffix in formats.GENERIC_SUFFIXES["safetensors"]:
        return "; LoRA files of other tools are for scripts/lora_merger.py"
    return f": {file.parent}" if is_checkpoint(file.parent) else ""


def _elsewhere(path: Path) -> str:
    """Where the directory may be that is not at `path`."""
    for place in (CHECKPOINTS / path, *(root / path for root in (REPOSITORY, REPOSITORY / CHECKPOINTS))):
        if not path.is_absolute() and is_checkpoint(place):
            return f"; did you mean {place}?"
    if name := hub_name(path):
        return (
            f"; to get the model of this name from the hub: python scripts/download.py {name}, then use "
            f"{CHECKPOINTS / name}"
        )
    if path.name == FINAL:
        steps = sorted(path.parent.glob("step-*"))
        return (
            f"; that run is not complete, its newest checkpoint is {steps[-1]}"
            if steps
            else ("; a run of finetune/lora.py or finetune/full.py writes it")
        )
    return ""


def _is_readable_checkpoint(directory: Path) -> bool:
    try:
        return is_checkpoint(directory)
    except OSError:  # somebody else's
        return False


def _some(names: list[str]) -> str:
    """A list of names; of a long one the first six."""
    return ", ".join(names) if len(names) <= 7 else f"{', '.join(names[:6])} and {len(names) - 6} more"


def output_dir(
    path: str,
    *,
    overwrite: bool,
    names: tuple[str, ...],
    inputs: list[Path],
    named: str = "out_dir",
    replaced: bool = True,
) -> Path:
    """The path, if results with these `names` may be written there. Raises UserError, and changes
    nothing, if the directory

    - has content that will be replaced, and `overwrite` is off,
    - is or holds one of `inputs`, or
    - is a file or cannot be written.

    A directory that will be `replaced` as a whole must hold nothing but `names` (we would not have
    written it), nor be or hold the current directory. Otherwise all other content stays as it is.
    `named` is the setting that the path comes from.
    """
    directory, option = Path(path), setting(named)
    _check_link(option, directory)
    keep_inputs(directory, inputs, named)
    if replaced and Path.cwd().is_relative_to(directory.resolve()):
        raise UserError(
            f"{option} {directory}: is or holds the current directory, and would be replaced; name another"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{option} {directory}: is a file; name a directory")
    ours, others = content(directory, names)
    if replaced and others:
        raise UserError(
            f"{option} {directory}: holds {others[0]}, which litlora did not write; name another directory"
        )
    if ours and not overwrite:
        raise UserError(
            f"{option} {directory}: already holds {ours[0]}; name another directory, or replace it "
            f"with {setting('overwrite')}"
        )
    _check_writable(named, directory, directory.absolute())
    return directory


def content(directory: Path, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(what a directory holds of these `names`, everything else), sorted; what file managers leave
    behind counts as neither."""
    present = sorted(child.name for child in directory.iterdir()) if directory.is_dir() else []
    present = [name for name in present if not _matches(name, FILE_MANAGERS)]
    ours = [name for name in present if _matches(name, names)]
    return ours, [name for name in present if name not in ours]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def output_file(path: str, suffixes: tuple[str, ...], inputs: list[Path], *, named: str = "output") -> Path:
    """The path, if a file may be written there; the first of `suffixes` is appended unless it ends
    with one of them.

    An existing file will be replaced. Raises UserError, and changes nothing, if the file is one of
    `inputs`, lies directly in one, or cannot be written. `named` is the setting that the path comes
    from.
    """
    file, option = Path(path if path.endswith(suffixes) else path + suffixes[0]), setting(named)
    _check_link(option, file)
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


def _check_link(option: str, path: Path) -> None:
    """Raise UserError for an output below a link that leads nowhere, perhaps in a circle."""
    for place in (path, *path.absolute().parents):
        if place.is_symlink() and not os.path.exists(place):
            raise UserError(
                f"{option} {path}: {place} is a link that leads nowhere; remove it, or name another"
            )


def _check_writable(named: str, path: Path, directory: Path) -> None:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        check_writable(existing)
    except OSError as error:
        raise UserError(f"{setting(named)} {path}: cannot be written: {existing}: {error.strerror}") from None
