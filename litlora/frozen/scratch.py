"""Memory in which the values of a weight are computed for one use."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_memory = threading.local()


def scratch(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None = None
) -> Tensor:
    """Uninitialised memory, valid until this thread asks for more; `strides` must leave no gaps.

    It is the thread's own, as large as the largest tensor that it was asked for: fresh memory for each
    use would cost more than dequantising. Not so on a GPU, whose allocator hands the same memory out
    again at once, in the order of a stream's work: there two threads, such as that of the forward and
    that of the backward, need it once, and a recorded step (CUDA graphs) has its own.
    """
    if device.type == "cuda":
        if strides is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    buffers = _memory.__dict__.setdefault("buffers", {})
    size = torch.Size(shape).numel() * dtype.itemsize
    if device not in buffers or buffers[device].numel() < size:
        buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
    flat = buffers[device][:size].view(dtype)
    return flat.view(shape) if strides is None else flat.as_strided(shape, strides)
