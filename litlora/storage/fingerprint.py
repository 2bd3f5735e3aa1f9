"""A fingerprint of tensors (a hash over a sample of their bytes), and a check that they are
finite."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.storage.blocks import LazyTensor


def fingerprint(tensors: Mapping[str, Tensor | LazyTensor], facts: str = "") -> str:
    """16 hex digits of a hash over names, shapes, dtypes, 4 KiB of each tensor's bytes, and
    `facts`.

    Takes milliseconds for a file of any size: of each tensor it reads 8 pieces of 512 bytes, evenly
    spread from the first byte to the last.
    """
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}\n".encode())
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().contiguous()
        pieces, size, total = 8, 512, tensor.shape.numel() * tensor.dtype.itemsize
        if total <= pieces * size:
            digest.update(_bytes(tensor, 0, total))
        else:
            for piece in range(pieces):
                start = piece * (total - size) // (pieces - 1)
                digest.update(_bytes(tensor, start, start + size))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor | LazyTensor, start: int, stop: int) -> bytes:
    """These bytes of a contiguous tensor, or of a lazy one, of which only the rows that hold them
    are computed."""
    if not isinstance(tensor, Tensor) and stop:
        row = tensor.shape[1:].numel() * tensor.dtype.itemsize
        first = start // row
        tensor = tensor[first : -(-stop // row)]
        start, stop = start - first * row, stop - first * row
    return tensor.reshape(-1).view(torch.uint8)[start:stop].cpu().numpy().tobytes()


def check_finite(tensors: Mapping[str, Tensor | LazyTensor], file: Path) -> None:
    """Raise CheckpointError for a weight from `file` that holds NaN or infinity.

    One such value would silently spoil every answer. Every byte is read once, on the device that
    holds the weights, which the first use would do anyway. Lazy tensors check themselves.
    """
    plain = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    bounds = {
        name: tensor.detach().aminmax()
        for name, tensor in plain.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    for name, (low, high) in bounds.items():
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{file}: {name} holds values that are not finite (NaN or infinity); copy it or make it again"
            )
