"""A frozen weight that stays in the few bits in which a file stores it."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.frozen.bitsandbytes import Quantized
from litlora.frozen.scratch import scratch
from litlora.frozen.weight import FrozenWeight


class QuantizedWeight(nn.Module, FrozenWeight):
    """W is dequantised for every use, into memory that all uses of a thread share, and never kept
    for the backward: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

    def __init__(self, matrix: Quantized) -> None:
        """Raises CheckpointError if a value is not finite."""
        super().__init__()
        matrix.check_finite()
        self.matrix = matrix

    @property
    def shape(self) -> torch.Size:
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.matrix.nbytes

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        with torch.no_grad():  # the values are gone before a backward could read them
            return F.linear(x, self.values(x.dtype), bias)

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        W = self.values(dy.dtype)
        return dy @ W if into is None else into.addmm_(dy, W)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        return self.matrix.rows(rows)

    def values(self, dtype: torch.dtype) -> Tensor:
        """W in this dtype, valid until this thread asks for another one."""
        W = scratch(self.shape, dtype, self.device)
        self.matrix.write_to(W)
        return W

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        # A change of dtype would round the scales: only the device follows.
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        if device != self.device:
            self.matrix = _moved(self.matrix, device)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.matrix.kind}, {tuple(self.shape)}"


def _moved(value: Any, device: torch.device) -> Any:
    """A stored matrix, or a part of one, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value
