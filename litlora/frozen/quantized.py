"""A frozen weight that stays in the few bits in which a file stores it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.frozen import fp8_units
from litlora.frozen.few_bits import Quantized, tensors_of
from litlora.frozen.few_rows import is_emulated, product
from litlora.frozen.scratch import scratch
from litlora.frozen.weight import FrozenWeight
from litlora.kernels import cpu
from litlora.storage.pages import mapped, release

ALIGNMENT = 16
"""Of the tensors among the bytes of a weight."""


class QuantizedWeight(nn.Module, FrozenWeight):
    """W is dequantised for every use, into memory that all uses of a thread share, and never kept
    for the backward: QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

    def __init__(self, matrix: Quantized) -> None:
        """Raises CheckpointError if a value is not finite."""
        super().__init__()
        matrix.check_finite()
        self._matrix, self._shape = matrix, matrix.shape
        self.rounds = False
        """Whether all products see the values in W's dtype, as a file that is dequantised has them; else
        those of few rows see what was not rounded. To be set before the first use."""
        self.register_parameter("stored_bytes", None)

    @property
    def matrix(self) -> Quantized:
        """W as it is stored."""
        flat = self.stored_bytes
        if flat is None:
            return self._matrix
        return _each(self._matrix, lambda part: part.of(flat))

    def as_one_parameter(self) -> None:
        """Hold all that is stored as the bytes of a single parameter, `stored_bytes`, which FSDP can
        divide among devices and put together again for each use."""
        parts: list[Tensor] = []

        def moved(value: Tensor) -> _Part:
            part = _Part(sum(map(len, parts)), value.dtype, value.shape)
            stored = value.contiguous().flatten().view(torch.uint8)
            parts.append(torch.cat([stored, stored.new_zeros(-len(stored) % ALIGNMENT)]))
            return part

        self._matrix = _each(self._matrix, moved)
        self.stored_bytes = nn.Parameter(torch.cat(parts), requires_grad=False)
        self.__dict__.pop("compiled", None)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._matrix.dtype

    @property
    def device(self) -> torch.device:
        return self._matrix.device if self.stored_bytes is None else self.stored_bytes.device

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self._matrix.nbytes if self.stored_bytes is None else self.stored_bytes.nbytes

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.times_shared(x, bias, {})

    def times_shared(self, x: Tensor, bias: Tensor | None, made: dict[str, Any]) -> Tensor:
        # Asked last, as a compiler cannot follow how that code is found.
        compiled = self.compiled if cpu.is_plain(x) and x.dtype in self.compiled_for else None
        matrix = self.matrix
        y = product(x, matrix, compiled)
        y = fp8_units.times(x, matrix, made) if y is None else y
        if y is not None:
            return y if bias is None else y + bias
        with torch.no_grad():  # the values are gone before a backward could read them
            if cpu.is_plain(x) and is_emulated(x):
                bias = None if bias is None else bias.float()
                return F.linear(x.float(), self.values(torch.float32), bias).to(x.dtype)
            return F.linear(x, self.values(x.dtype), bias)

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        if (dx := fp8_units.back(dy, self.matrix)) is not None:
            return dx if into is None else into.add_(dx)
        W = self.values(dy.dtype)
        return dy @ W if into is None else into.addmm_(dy, W)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        return self.matrix.rows(rows)

    def values(self, dtype: torch.dtype) -> Tensor:
        """W in this dtype, valid until this thread asks for another one."""
        W = scratch(self.shape, dtype, self.device)
        compiled = self.compiled if self.device.type == "cpu" else None
        if compiled is None or not compiled.write_to(W, self.dtype):
            self.matrix.write_to(W)
        return W

    @cached_property
    def compiled(self) -> cpu.Compiled | None:
        """The code that reads it as it is stored, on a CPU; None where there is none."""
        if self.stored_bytes is not None:  # which FSDP gathers in other memory for each use
            return None
        if self.device.type == "cpu" and cpu.reads(self._matrix.columns):
            before, self._matrix = self._matrix, self._matrix.in_rows()
            if before is not self._matrix:
                _let_go(before, self._matrix)
        layout = self._matrix.layout()
        if layout is not None and self.rounds:
            layout = replace(layout, rounded_to=self.dtype)
        return cpu.compiled(layout, self._matrix.stored_rows)

    @property
    def compiled_for(self) -> tuple[torch.dtype, ...]:
        # Values that are rounded are the same in every product.
        rounded = self.compiled is not None and self.compiled.rounded
        return tuple(cpu.DTYPES) if rounded else (self.dtype,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        # A change of dtype would round the scales: only the device follows.
        device = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        if self.stored_bytes is None and device != self.device:
            self._matrix = _each(self._matrix, lambda part: part.to(device))
            self.__dict__.pop("compiled", None)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self._matrix.kind}, {tuple(self.shape)}"


def _let_go(matrix: Quantized, instead: Quantized) -> None:
    """Give back the memory of a matrix in a mapped file that another one is used instead of."""
    kept = {tensor.data_ptr() for tensor in tensors_of(instead)}
    for tensor in mapped(tensor for tensor in tensors_of(matrix) if tensor.data_ptr() not in kept):
        release(tensor)


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in the bytes of a weight."""

    start: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, stored_bytes: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return stored_bytes[self.start : self.start + size].view(self.dtype).view(self.shape)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A stored matrix, or a part of one, with every tensor (or `_Part`) in it changed."""
    if isinstance(value, Tensor | _Part):
        return change(value)
    if is_dataclass(value):
        return replace(value, **{f.name: _each(getattr(value, f.name), change) for f in fields(value)})
    return value
