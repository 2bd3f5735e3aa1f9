"""What identifies tensors (a hash over a sample of their bytes), and whether they are finite."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.storage.torch_file import LazyTensor


def fingerprint(tensors: Mapping[str, Tensor | LazyTensor], facts: str = "") -> str:
    """16 hex digits over names, shapes, dtypes, 4 KiB of every tensor's bytes at fixed places, and
    `facts`.

    Reads milliseconds' worth of a file of any size: 8 pieces of 512 bytes spread evenly from the
    first byte to the last.
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
    """These bytes of a contiguous tensor, or of what a lazy one stands for, of which only their
    rows are computed."""
    if not isinstance(tensor, Tensor) and stop:
        row = tensor.shape[1:].numel() * tensor.dtype.itemsize
        first = start // row
        tensor = tensor[first : -(-stop // row)]
        start, stop = start - first * row, stop - first * row
    return tensor.reshape(-1).view(torch.uint8)[start:stop].numpy().tobytes()


def check_finite(tensors: Mapping[str, Tensor | LazyTensor], file: Path) -> None:
    """Raise CheckpointError for a weight that holds NaN or infinity; `file` is where they come
    from.

    Every byte is read once, at some GB/s and where the weights are (so, on a GPU, in no time): the
    first use would read them all the same, and one broken number spoils every answer without a
    word. Lazy ones look at themselves.
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
                f"{file}: {name} holds numbers that are not finite (NaN or infinity); copy or make it again"
            )
