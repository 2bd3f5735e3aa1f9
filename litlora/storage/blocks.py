"""Tensors in blocks of rows, so that no more than a block needs to be in memory."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK_BYTES = 2 << 20
"""About how much is read, computed or written at a time: what fits into the caches."""


class LazyTensor(ABC):
    """A tensor that is computed while it is written, a block of rows at a time."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def blocks(self, memory: "Memory | None" = None) -> Iterator[Tensor]:
        """The tensor in order, some rows (of the first axis) at a time. `memory`, if given, is
        where they are computed."""

    def sources(self) -> Sequence[Tensor]:
        """Stored tensors that it is computed from, and that nothing else needs soon."""
        return ()


class Memory:
    """Reused memory for the most recent blocks: allocating fresh memory costs more than computing a
    block in it."""

    def __init__(self, count: int) -> None:
        self._buffers = deque(torch.empty(0, dtype=torch.uint8) for _ in range(count))

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor. It is valid until `count` more have been requested."""
        size = shape.numel() * dtype.itemsize
        buffer = self._buffers.popleft()
        self._buffers.append(buffer if buffer.numel() >= size else torch.empty(size, dtype=torch.uint8))
        return self._buffers[-1][:size].view(dtype).view(shape)


def row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as views of about BLOCK_BYTES, in order."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(BLOCK_BYTES // tensor.dtype.itemsize)
    else:
        yield from tensor.split(rows_at_a_time(tensor.shape, tensor.dtype.itemsize))


def rows_at_a_time(shape: torch.Size, itemsize: int) -> int:
    """How many rows (of the first axis) of a tensor are about BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // max(1, shape[1:].numel() * itemsize))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: blocks are too small to share among cores, and the last bit of a
    product depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
