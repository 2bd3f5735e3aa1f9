"""Files of tensors: opened memory-mapped, so that nothing is read before it is used, and written
one tensor at a time.

Whatever is wrong with a file is named.
"""

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.storage.torch_check import Forbidden, Lying, check_content, check_tensor, check_torch_file

# ---- reading


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a torch file that holds a dict of them."""
    content = open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a mapping of names to tensors")
    if odd := [
        name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]:
        raise CheckpointError(f"{file}: the entry {odd[0]!r} is not a tensor")
    return content


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError for a missing or broken one."""
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        for tensor in tensors.values():
            check_tensor(tensor)
        return tensors
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (
        SafetensorError,
        Lying,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
    ) as error:
        raise _broken(file, error) from None


def open_torch(file: Path) -> Any:
    """What a torch file holds, of plain values and tensors only. Raises CheckpointError for
    anything else.

    The torch files of before 2020 are no zip archives and cannot be mapped; they are read.
    """
    try:
        mapped = check_torch_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns of a strange pickle before it refuses it; one line is enough
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        check_content(content)
        return content
    except (pickle.UnpicklingError, Forbidden) as error:
        named = f" ({error})" if isinstance(error, Forbidden) else ""
        raise CheckpointError(
            f"{file}: refused: it holds Python objects beyond tensors and plain values{named}, which could run code; "
            "if you trust it, save its tensors alone"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError and others for broken files
        raise _broken(file, error) from None


def _broken(file: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{file}: broken ({file.stat().st_size:,} bytes): {reason}; copy or make it again")


def at_least_16_bits(tensor: Tensor) -> Tensor:
    """A tensor in 8 bits as fp16, which holds every number of either kind of them, and which torch
    can compute with."""
    return tensor.to(torch.float16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


# ---- writing


_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


ENTRY = 192
"""Bytes of a tensor's entry in the header, its name apart, at most: 62, two places of 15 digits,
and 7 sizes of 12."""
LARGEST_HEADER = 100_000_000
"""Bytes: what the format allows."""


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, so that only one of them need be in memory.

    The header stands first and is known last: room for `names`, every name that may be added, is
    left for it and what remains is filled with spaces, as the format allows. A tensor must begin at
    a multiple of its item's size, so those of a larger item come first.
    """

    def __init__(self, file: Path, names: Iterable[str]) -> None:
        self._room = -(-sum(len(json.dumps(name)) + ENTRY for name in names) // 8) * 8 + 64
        if self._room > LARGEST_HEADER:
            raise CheckpointError(
                f"{file}: the names of its tensors need {self._room:,} bytes; the format allows {LARGEST_HEADER:,}"
            )
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = file.open("wb")
        self._file.seek(8 + self._room)
        self._offset = 0

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            header = json.dumps(self._header).encode()
            assert len(header) <= self._room, "an entry of more than ENTRY bytes"
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to the disk."""
        assert name not in self._header and self._offset % tensor.itemsize == 0
        end = self._offset + tensor.nbytes
        shape, dtype = list(tensor.shape), _SAFETENSORS_NAMES[tensor.dtype]
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self._offset, end]}
        self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._offset = end


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file."""
    with SafetensorsWriter(file, tensors) as writer:
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
            writer.add(name, tensor)
