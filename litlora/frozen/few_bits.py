"""A matrix that is stored in few bits, whatever stores it so: its values, some rows at a time."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.kernels.cpu import Layout, reads
from litlora.storage.blocks import LazyTensor, Memory, rows_at_a_time


@dataclass(frozen=True)
class Quantized(LazyTensor):
    """A matrix (out, in) that is stored in few bits. `matrix.rows(slice)` and `matrix[slice]`
    dequantise rows."""

    name: str
    file: Path
    """Where it comes from."""
    dtype: torch.dtype
    """What it is dequantised to."""
    columns: int
    stored_rows: range | Tensor
    """The numbers of the stored rows that make up this matrix, in order. The rows of a fused layer
    are divided among several matrices."""

    tool: ClassVar[str] = "bitsandbytes"
    """What stores weights so."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of the number format."""

    @property
    def bits(self) -> int:
        """Bits of an entry, without its share of the scales."""
        return 8

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That of the stored tensors."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors that identify the matrix, by their names."""

    def settled(self) -> "Quantized":
        """The matrix as it is to be kept: one that is still to be quantised is quantised now."""
        return self

    def in_rows(self) -> "Quantized":
        """The matrix, stored row by row as compiled code reads it, for columns that `cpu.reads`; itself if
        there is no need."""
        return self

    def layout(self) -> Layout | None:
        """How the stored rows lie in memory, for compiled code; None if there is none for them."""
        return None

    @property
    def is_readable(self) -> bool:
        """Whether compiled code reads it."""
        return reads(self.columns) and self.layout() is not None

    @abstractmethod
    def _largest(self) -> Tensor:
        """The largest magnitude in each of the parts that share a scale, in fp32."""

    @abstractmethod
    def _dequantised(self, first: int, last: int) -> Tensor:
        """The stored rows from `first` up to, not including, `last`, in fp32."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.stored_rows), self.columns))

    def size(self, axis: int) -> int:
        return self.shape[axis]

    @property
    def nbytes(self) -> int:
        """The memory that the stored tensors take."""
        return sum(tensor.nbytes for tensor in tensors_of(self))

    def take(self, stored_rows: Tensor) -> "Quantized":
        """The matrix of these stored rows, given by their numbers."""
        return replace(self, stored_rows=stored_rows)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        """The values of these rows, (n, in). Raises CheckpointError if one is not finite: they are
        checked where they are used."""
        parts = [part.to(self.dtype) for part in self._parts(self.stored_rows[rows], len(self.stored_rows))]
        result = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._require_finite(result)
        return result

    def write_to(self, W: Tensor) -> None:
        """Write all values to W (out, in), of any dtype, without a check."""
        step, row = rows_at_a_time(self.shape, torch.float32.itemsize), 0
        for values in self.parts(step):
            # Rounded to the dtype of the matrix, and then to that of W.
            W[row : row + len(values)] = values if W.dtype == self.dtype else values.to(self.dtype)
            row += len(values)

    def parts(self, step: int) -> Iterator[Tensor]:
        """The values before they are rounded, in fp32, at most `step` rows at a time; without a check."""
        return self._parts(self.stored_rows, step)

    def _parts(self, stored_rows: range | Tensor, step: int) -> Iterator[Tensor]:
        """These stored rows in order, in fp32, at most `step` at a time."""
        for start, stop in _runs(stored_rows):
            for first in range(start, stop, step):
                yield self._dequantised(first, min(first + step, stop))

    def check_finite(self) -> None:
        """Raise CheckpointError if a value of the stored matrix is not finite, without computing
        the values."""
        self._require_finite(self._largest().to(self.dtype))

    def _require_finite(self, values: Tensor) -> None:
        if not all(torch.isfinite(bound) for bound in values.aminmax()):
            raise CheckpointError(
                f"{self.file}: {self.name} holds values that are not finite (NaN or infinity); copy it or "
                "make it again"
            )

    def __getitem__(self, rows: slice) -> Tensor:
        return self.rows(rows)

    def blocks(self, memory: Memory | None = None) -> Iterator[Tensor]:
        # `memory` would save nothing: the intermediate results are larger.
        step = rows_at_a_time(self.shape, torch.float32.itemsize)
        return (self.rows(slice(first, first + step)) for first in range(0, len(self.stored_rows), step))

    def tensor(self) -> Tensor:
        """The whole matrix, in memory."""
        whole, first = torch.empty(self.shape, dtype=self.dtype), 0
        for block in self.blocks():
            whole[first : first + len(block)] = block
            first += len(block)
        return whole


def _runs(rows: range | Tensor) -> list[tuple[int, int]]:
    """Row numbers as (first, last + 1) of each stretch without a gap."""
    if isinstance(rows, range):
        return [(rows.start, rows.stop)]
    stretches = rows.tensor_split((rows.diff() != 1).nonzero().flatten() + 1)
    return [(int(stretch[0]), int(stretch[-1]) + 1) for stretch in stretches]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a stored matrix, or in a part of one."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
