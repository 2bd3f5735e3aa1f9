"""The tensors of a folder, while those that store one weight together are found among them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.frozen.bitsandbytes import DTYPES
from litlora.frozen.few_bits import Quantized
from litlora.storage.dtypes import dtype_name


class StoredTensors:
    """Tensors by name; what belongs to a quantized weight is taken out."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Mapping[str, Path]) -> None:
        """`where` is the file of each."""
        self.tensors: dict[str, Tensor | Quantized] = dict(tensors)
        self._where = where
        scales = ("scale", "scales", "scale_inv")
        plain = [
            tensor
            for name, tensor in tensors.items()
            if tensor.dtype in DTYPES.values() and not name.endswith(scales)
        ]
        self.dtype = max(plain, key=Tensor.numel).dtype if plain else torch.bfloat16
        """That of the largest tensor that is not quantized, usually the embedding."""

    def pop(self, name: str) -> Tensor:
        """Take a tensor. Raises ValueError if it is missing."""
        if not isinstance(tensor := self.tensors.pop(name, None), Tensor):
            raise ValueError(f"needs {name}, which is missing")
        return tensor

    def drop(self, name: str) -> None:
        """Leave out a tensor that has no effect on weights."""
        self.tensors.pop(name, None)

    def file(self, name: str) -> Path:
        return self._where[name]

    def ending(self, end: str) -> list[str]:
        """X of each tensor X + `end`."""
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    def put(self, name: str, make: Callable[[], Quantized]) -> None:
        """Put what `make` makes, which takes its parts, in the place of the tensor of this name.
        Raises CheckpointError, with file and name in front, for a ValueError of `make`."""
        try:
            matrix = make()
        except ValueError as error:
            raise CheckpointError(f"{self.file(name)}: {name} {error}; copy the folder again") from None
        if matrix.name in self.tensors:
            raise CheckpointError(f"{self.file(name)}: holds both {name} and {matrix.name}")
        self.tensors[matrix.name] = matrix


def floating(tensor: Tensor, name: str) -> Tensor:
    """Scales in fp32. Raises ValueError for other kinds of numbers, and for values that are not
    finite."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {dtype_name(tensor.dtype)}, not floating point")
    if not (tensor := tensor.float().contiguous()).isfinite().all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity)")
    return tensor


def integers(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Packed entries in int32. Raises ValueError unless they have this shape."""
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} in {dtype_name(tensor.dtype)}; it must be {shape} in int32"
        )
    return tensor


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The unsigned entries in int32 words (n, ...), the first in the lowest bits, along the first
    axis: (count, ...) in uint8."""
    mask, rest = 2**bits - 1, words.shape[1:]
    ones = (1,) * len(rest)
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).view(1, -1, *ones)
        entries = (words.unsqueeze(1) >> shifts).bitwise_and_(mask).to(torch.uint8)
        return entries.flatten(0, 1)[:count]
    # 32 entries in `bits` words, of which some are cut by the end of a word
    places = torch.arange(32, device=words.device) * bits
    wide = (words.long() & 0xFFFFFFFF).unflatten(0, (-1, bits))
    wide = torch.cat([wide, torch.zeros_like(wide[:, :1])], 1)
    low, high = wide[:, places // 32], wide[:, places // 32 + 1]
    shifts = (places % 32).view(1, -1, *ones)
    entries = ((low >> shifts) | (high << (32 - shifts))) & mask
    return entries.to(torch.uint8).flatten(0, 1)[:count]
