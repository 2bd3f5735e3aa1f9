"""Host memory for what the forward keeps for the backward, in one piece that serves every step.

Pinned memory from torch's allocator is rounded up to a power of two, tensor by tensor: for a long
context, up to twice what it needs. An arena has exactly the size that it is asked for.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from litlora.errors import UserError, setting

ALIGNMENT = 64
"""Bytes at a multiple of which each tensor begins."""


class Arena:
    """Keeps tensors next to each other, and starts from its beginning once none of them is kept.

    On a GPU, copies have a stream of their own. The backward asks for what was kept last first; while
    it computes with that, what was kept before is already on its way.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises UserError if the machine does not have the memory."""
        self._memory = _host_memory(nbytes, pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._end, self._count = device, 0, 0
        self._last: weakref.ref[Kept] | None = None

    @property
    def room(self) -> int:
        """Bytes that are not in use."""
        return len(self._memory) - self._end

    def keep(self, tensor: Tensor) -> "Kept | None":
        """A copy of a tensor, until what is returned goes; None where there is no room for it."""
        size = aligned(tensor.nbytes)
        if size > self.room:
            return None
        place = self._memory[self._end :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._end, self._count = self._end + size, self._count + 1
        with self._copying():
            place.copy_(tensor, non_blocking=True)
        if self._stream is not None:
            tensor.record_stream(self._stream)  # its memory serves others only after the copy
        kept = Kept(self, place, self._last and self._last())
        self._last = weakref.ref(kept)
        return kept

    def copied(self, place: Tensor) -> Tensor:
        """Begin to copy a place to the device."""
        copy = torch.empty_like(place, device=self._device)
        with self._copying():
            return copy.copy_(place, non_blocking=True)

    def wait(self) -> None:
        """Let the device's work wait for all copies begun so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def gone(self) -> None:
        """A tensor is not kept any more."""
        self._count -= 1
        if not self._count:
            self._end = 0

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """A context for copies, which begin after all that is queued on the device so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield


class Kept:
    """A tensor in an arena."""

    def __init__(self, arena: Arena, place: Tensor, before: "Kept | None") -> None:
        """`before` was kept before this one."""
        self._arena, self._place, self._before = arena, place, before
        self._ahead: Tensor | None = None

    def fetched(self) -> Tensor:
        """A copy on the device; that of the one before is begun."""
        self._begin()
        copy, self._ahead = self._ahead, None
        self._arena.wait()
        if self._before is not None:
            self._before._begin()
        return copy

    def _begin(self) -> None:
        if self._ahead is None:
            self._ahead = self._arena.copied(self._place)

    def __del__(self) -> None:
        if self._ahead is not None:  # a backward that broke off: nobody has waited for this copy
            self._arena.wait()
        self._arena.gone()


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes in an arena."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _host_memory(nbytes: int, *, pinned: bool) -> Tensor:
    try:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        if pinned:
            runtime, address = torch.cuda.cudart(), memory.data_ptr()
            status = runtime.cudaHostRegister(address, nbytes, 0)
            if status != runtime.cudaError.success:
                raise RuntimeError(f"it cannot be pinned: {status}")
            weakref.finalize(memory, runtime.cudaHostUnregister, address)
    except RuntimeError as error:
        raise UserError(
            f"{setting('offload_activations')}: {nbytes / 2**30:.1f} GiB of the machine's memory for the "
            f"inputs of all blocks could not be had ({str(error).splitlines()[0]}); lower "
            f"{setting('micro_batch_tokens')} or {setting('max_seq_length')}"
        ) from None
    return memory
