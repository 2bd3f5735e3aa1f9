"""Layouts of checkpoints on disk: one class and one file per format, and one list, asked once.
Torch-free.

    litlora.py      our own: lit_model.pth, full or adapter
    huggingface.py  model folders, with families.py (config.json) and layout.py (names, fused tensors)
    parts.py        what a multimodal model has beside its language model
    peft.py         PEFT adapter folders
    mlx.py          adapter folders of mlx-lm
    litgpt.py       litgpt's directories and adapters
    gguf.py         GGUF files of llama.cpp
    lora_files.py   LoRA files with the names of kohya, ComfyUI and PEFT, for any model; lora_keys.py,
                    lora_content.py and lycoris.py read them
    lora_header.py  what their headers say: alpha, training, hashes

To add a format: subclass `Format` and put an instance into FORMATS. Every command then reads it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.config import CONFIG_FILE
from litlora.errors import CheckpointError
from litlora.formats.families import HF_CONFIG_FILE
from litlora.formats.folder import GENERIC_SUFFIXES, SINGLE_FILES, is_model_folder, weight_files
from litlora.storage.untrusted import read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from litlora.checkpoint import Chain
    from litlora.formats.full import FullModel
    from litlora.lora import Adapter, Update
    from litlora.lora.dense import DenseUpdate

WEIGHTS_FILE = "lit_model.pth"
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MLX_WEIGHTS_FILE = "adapters.safetensors"
LITGPT_ADAPTER_FILE = "lit_model.pth.lora"

FindBase = Callable[[str, Path | None], "Chain"]
"""(what an adapter calls its base, the directory of that name if there is one) -> the base's chain.

Raises CheckpointError if no base is found."""


@dataclass(frozen=True)
class Outline:
    """What an adapter's own files tell when its base is not known."""

    format: str
    """As `inspect_checkpoint` shows it."""
    file: Path
    """The weights' file."""
    tensors: "Mapping[str, Tensor]"
    """What that file holds."""
    base: str | None = None
    """What the adapter calls its base."""
    settings: dict[str, Any] | None = None
    """Its rank and the like, for people; None: they are not known."""
    updates: "Mapping[str, Update | DenseUpdate] | None" = None
    """By the names in the file; None: they cannot be told apart without the base."""
    unrecognised: list[str] = field(default_factory=list)
    """Keys in the file that this version cannot interpret."""
    notices: list[str] = field(default_factory=list)
    """What whoever uses the adapter should be told."""


class Format(ABC):
    """One way to lay a model or an adapter out in a directory."""

    name: str
    """As `inspect_checkpoint` shows it."""

    @abstractmethod
    def detect(self, directory: Path) -> bool:
        """Whether the directory has this format. Opens small text files at most; a directory that
        has the format but lacks a part raises CheckpointError, which names it."""

    @abstractmethod
    def open(self, directory: Path, find_base: FindBase) -> "FullModel | Adapter":
        """What the directory holds, memory-mapped. An adapter whose own files do not tell the
        architecture asks for its base. Raises CheckpointError for anything but sound files."""

    def outline(self, directory: Path) -> Outline | None:
        """What the adapter in the directory tells without its base; None if that is nothing."""
        return None


class _PEFT(Format):
    name = "PEFT"

    def detect(self, directory: Path) -> bool:
        return peft_weights(directory) is not None

    def open(self, directory: Path, find_base: FindBase) -> "Adapter":
        from litlora.formats.peft import base_of, read_adapter

        base = find_base(*base_of(directory))
        tensors, full = base.base.tensors, not base.adapters
        return read_adapter(directory, base.config, tensors, base_is_full=full)

    def outline(self, directory: Path) -> Outline:
        from litlora.formats.lora_files import read_lora

        return read_lora(directory, allow_unknown=True).outline()


class _MLX(Format):
    name = "MLX"

    def detect(self, directory: Path) -> bool:
        return is_mlx(directory)

    def open(self, directory: Path, find_base: FindBase) -> "Adapter":
        from litlora.formats.mlx import as_peft, base_of
        from litlora.formats.peft import adapter_of

        base = find_base(*base_of(directory))
        return adapter_of(directory / MLX_WEIGHTS_FILE, *as_peft(directory), base.config, base.base.tensors)

    def outline(self, directory: Path) -> Outline:
        from litlora.formats.lora_files import read_lora

        return replace(read_lora(directory, allow_unknown=True).outline(), format=self.name)


class _LitGPTAdapter(Format):
    name = "litgpt"

    def detect(self, directory: Path) -> bool:
        """A merged model beside the adapter takes precedence if it is as new."""
        file, merged = directory / LITGPT_ADAPTER_FILE, directory / WEIGHTS_FILE
        return file.is_file() and not (merged.is_file() and merged.stat().st_mtime >= file.stat().st_mtime)

    def open(self, directory: Path, find_base: FindBase) -> "Adapter":
        from litlora.formats.litgpt import base_of, read_adapter

        base = find_base(*base_of(directory))
        return read_adapter(directory, base.config, base.base.tensors)

    def outline(self, directory: Path) -> Outline:
        from litlora.formats.litgpt import outline

        return outline(directory)


class _LitGPT(Format):
    name = "litgpt"

    def detect(self, directory: Path) -> bool:
        if not (directory / WEIGHTS_FILE).is_file():
            return False
        try:
            values = read_yaml(directory / CONFIG_FILE)
        except FileNotFoundError:
            return False
        return isinstance(values, dict) and "n_embd" in values

    def open(self, directory: Path, find_base: FindBase) -> "FullModel":
        from litlora.formats.litgpt import open_full

        return open_full(directory)


class _LitLoRA(Format):
    name = "litlora"

    def detect(self, directory: Path) -> bool:
        return (directory / WEIGHTS_FILE).is_file()

    def open(self, directory: Path, find_base: FindBase) -> "FullModel | Adapter":
        from litlora.formats.litlora import open_directory

        return open_directory(directory)


class _HuggingFace(Format):
    name = "Hugging Face"

    def detect(self, directory: Path) -> bool:
        if not is_model_folder(directory):
            return False
        weight_files(directory)  # names a missing shard
        return True

    def open(self, directory: Path, find_base: FindBase) -> "FullModel":
        from litlora.formats.huggingface import open_folder

        return open_folder(directory)


class _GGUF(Format):
    name = "GGUF"

    def detect(self, directory: Path) -> bool:
        """A directory with GGUF files and none of the other formats' weights."""
        return bool(files := gguf_files(directory)) and _only_one(files)

    def open(self, directory: Path, find_base: FindBase) -> "FullModel":
        from litlora.formats.gguf import open_gguf

        return open_gguf(gguf_files(directory)[0])


def gguf_files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.glob("*.gguf") if file.is_file())


def _only_one(files: list[Path]) -> bool:
    """Raise CheckpointError if there are several."""
    if len(files) > 1:
        raise CheckpointError(
            f"{files[0].parent}: holds {files[0].name} and {files[1].name}; keep one GGUF file in the "
            "directory, beside its tokenizer.json"
        )
    return True


FORMATS: list[Format] = [_MLX(), _PEFT(), _LitGPTAdapter(), _LitGPT(), _LitLoRA(), _HuggingFace(), _GGUF()]
"""Every format, in order of precedence: a directory has the first that detects it."""
NAMED_FILES = (WEIGHTS_FILE, LITGPT_ADAPTER_FILE, MLX_WEIGHTS_FILE, *PEFT_WEIGHTS_FILES, *SINGLE_FILES)
"""Files that may be named instead of the directory that holds them."""


def detect(directory: Path) -> Format | None:
    """The format of a checkpoint directory; None if it has none. Raises CheckpointError if a part
    of the format is missing."""
    return next((format for format in FORMATS if format.detect(directory)), None)


def is_mlx(directory: Path) -> bool:
    """Whether a directory is an adapter of mlx-lm, whose config has the name of PEFT's."""
    has_peft = any((directory / name).is_file() for name in PEFT_WEIGHTS_FILES)
    return not has_peft and all((directory / name).is_file() for name in (PEFT_CONFIG_FILE, MLX_WEIGHTS_FILE))


def peft_weights(directory: Path) -> Path | None:
    """The file of the weights in a PEFT adapter's folder; None if it is not such a folder."""
    if not (directory / PEFT_CONFIG_FILE).is_file():
        return None
    file = next((directory / name for name in PEFT_WEIGHTS_FILES if (directory / name).is_file()), None)
    if file is None:
        expected = " nor ".join(PEFT_WEIGHTS_FILES)
        raise CheckpointError(f"{directory}: has {PEFT_CONFIG_FILE}, but neither {expected}")
    return file


def is_lora_file(path: Path) -> bool:
    """Whether a path is a LoRA file of another tool: a safetensors file that is not part of a
    checkpoint directory.

    Raises CheckpointError for a path with such a name that does not exist.
    """
    named_so = path.suffix in GENERIC_SUFFIXES["safetensors"] and path.name not in NAMED_FILES
    if named_so and not path.exists():
        raise CheckpointError(f"{path}: no such file")
    return named_so and path.is_file()


def missing_part(directory: Path) -> None:
    """Raise CheckpointError for a Hugging Face folder that lacks its weights."""
    if (directory / HF_CONFIG_FILE).is_file():
        weight_files(directory)
