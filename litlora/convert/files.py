"""Files of tensors, opened memory-mapped: nothing is read before it is used. Whatever is wrong with a file is named."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litlora.errors import CheckpointError


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a torch file that holds a dict of them."""
    content = open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a mapping of names to tensors")
    if odd := [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise CheckpointError(f"{file}: the entry {odd[0]!r} is not a tensor")
    return content


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError for a missing or broken one."""
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        size = file.stat().st_size
        raise CheckpointError(f"{file}: broken ({size:,} bytes): {' '.join(str(error).split())}; copy or make it again") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None


def open_torch(file: Path) -> Any:
    """What a torch file holds, of plain values and tensors only. Raises CheckpointError for anything else.

    The torch files of before 2020 are no zip archives and cannot be mapped; they are read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a strange pickle before it refuses it; one line is enough
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file}: refused: it holds Python objects beyond tensors and plain values, which could run code") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError and others for broken files
        size = file.stat().st_size
        reason = " ".join(str(error).split())[:200] if zipfile.is_zipfile(file) else "it is cut short, or no torch file"
        raise CheckpointError(f"{file}: broken ({size:,} bytes): {reason}; copy or make it again") from None
