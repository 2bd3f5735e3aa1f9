"""Files of tensors. Opening maps them into memory, so that nothing is read before it is used;
safetensors are written one tensor at a time."""

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.ram import is_lack_of_memory
from litlora.storage.pickle_walk import Forbidden, Malformed
from litlora.storage.torch_check import check_content, check_tensor, check_torch_file
from litlora.storage.untrusted import require_file

# ---- reading

_BROKEN_SAFETENSORS = (
    *(SafetensorError, Malformed, ValueError, TypeError, AttributeError),
    *(RuntimeError, LookupError, ArithmeticError),
)
"""What safetensors raises for a broken file."""


SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
"""What the names of safetensors files end in; the short form is common among ComfyUI's files."""


def open_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds a dict of them."""
    if file.suffix in SAFETENSORS_SUFFIXES:
        return open_safetensors(file)
    return named_tensors(file, open_torch(file))


def named_tensors(file: Path, content: Any) -> dict[str, Tensor]:
    """The content of a torch file. Raises CheckpointError unless it is a dict of tensors by
    name."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a mapping of names to tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: the entry {name!r} is not a tensor")
    return content


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError for a missing or broken one."""
    try:
        require_file(file)
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
        for tensor in tensors.values():
            check_tensor(tensor)
        return tensors
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _BROKEN_SAFETENSORS as error:
        raise _broken(file, error) from None


def read_metadata(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors; nothing for a torch file.

    Raises CheckpointError for a broken file.
    """
    if file.suffix not in SAFETENSORS_SUFFIXES:
        return {}
    try:
        with safe_open(file, "pt") as content:
            return dict(sorted((content.metadata() or {}).items()))  # the library's order is random
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _BROKEN_SAFETENSORS as error:
        raise _broken(file, error) from None


def open_torch(file: Path) -> Any:
    """What a torch file holds: tensors and plain values. Raises CheckpointError for anything else.

    Torch files of before 2020 are not zip archives and cannot be mapped; they are read at once.
    """
    try:
        require_file(file)
        mapped = check_torch_file(file)
        with warnings.catch_warnings():
            # torch warns of an unusual pickle before it refuses it; our error is enough.
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        check_content(content)
        return content
    except (pickle.UnpicklingError, Forbidden) as error:
        named = f" ({error})" if isinstance(error, Forbidden) else ""
        raise CheckpointError(
            f"{file}: refused: it holds Python objects other than tensors and plain values{named}, which "
            "could run code; if you trust it, save only its tensors"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # for broken files torch raises RuntimeError, EOFError, ValueError and others
        raise _broken(file, error) from None


def _broken(file: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    if is_lack_of_memory(error):
        return CheckpointError(f"{file}: cannot be read: not enough memory ({reason})")
    return CheckpointError(
        f"{file}: broken ({file.stat().st_size:,} bytes): {reason}; copy it or make it again"
    )


def at_least_16_bits(tensor: Tensor) -> Tensor:
    """An 8-bit float tensor as fp16, which holds every value of both 8-bit formats, and in which
    torch can compute."""
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
ENTRY_BYTES = 192
"""The most that a tensor's entry in the header takes without its name: 62 bytes, two offsets of 15
digits, and 7 sizes of 12."""
MAX_HEADER_BYTES = 100_000_000
"""What the format allows."""


class SafetensorsWriter:
    """A safetensors file that is written tensor by tensor, so that only one needs to be in memory.

    The header comes first but is known last. `names`, all that may be added, reserve room for it;
    spaces fill the rest, as the format allows. A tensor begins at a multiple of its item size, so
    tensors with larger items must be added first.
    """

    def __init__(self, file: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
        more = len(json.dumps(metadata)) if metadata else 0
        self._room = -(-(room + more) // 8) * 8 + 64
        if self._room > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: the names of its tensors and its metadata need {self._room:,} bytes; the format "
                f"allows {MAX_HEADER_BYTES:,}"
            )
        self._file = file.open("wb")
        self._file.seek(8 + self._room)
        self._offset = 0

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            header = json.dumps(self._header).encode()
            assert len(header) <= self._room, "an entry of more than ENTRY_BYTES"
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


def save_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as the library of the format does. A full disk raises OSError, as for any other
    file."""
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(file)) from None
        raise


def training_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's hashes of a safetensors file: of all tensors' bytes, and of 64 KiB at 1 MiB (8 digits,
    sd-webui-additional-networks' first hash) of a file that has only the `ss_` entries of the
    metadata. The file is to hold the tensors by the size of their items, then by name."""
    header: dict[str, Any] = {
        "__metadata__": {name: text for name, text in metadata.items() if name.startswith("ss_")}
    }
    offset, ordered = 0, sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, tensor in ordered:
        place = [offset, offset := offset + tensor.nbytes]
        dtype = _SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    first = 0x100000 - 8 - -(-length // 8) * 8
    whole, window = hashlib.sha256(), hashlib.sha256()
    offset = 0
    for _, tensor in ordered:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(data)
        window.update(data[max(first - offset, 0) : max(first + 0x10000 - offset, 0)])
        offset += tensor.nbytes
    found = {"sshs_model_hash": whole.hexdigest()}
    # With more than a MiB of header, the second would depend on the order of its entries.
    return found | ({"sshs_legacy_hash": window.hexdigest()[:8]} if first >= 0 else {})


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file, those with larger items first."""
    with SafetensorsWriter(file, tensors, metadata) as writer:
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
            writer.add(name, tensor)
