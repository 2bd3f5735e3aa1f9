"""Matrices of whole numbers in few bits with a scale, and perhaps a zero point, for each group of
columns of a row: W = (q - zero) · scale."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from litlora.frozen.few_bits import Quantized
from litlora.frozen.stored_tensors import floating, unpacked
from litlora.kernels.cpu import BY_ROW, STEP, Layout, power_of_two


@dataclass(frozen=True)
class Grouped(Quantized):
    """q is stored in `width` bits; a subclass knows how."""

    packed: Tensor
    scales: Tensor
    """(out, groups), in floating point."""
    zeros: Tensor | int
    """(out, groups), or the zero point of all."""
    groups: Tensor | int
    """The group of each column, (in,) in int32; or how many consecutive columns are a group."""
    width: int

    @property
    def kind(self) -> str:
        return f"{self.tool} {self.width} bits"

    @property
    def bits(self) -> int:
        return self.width

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def stored(self) -> dict[str, Tensor]:
        parts = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros, "groups": self.groups}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    @abstractmethod
    def _entries(self, first: int, last: int) -> Tensor:
        """q of these stored rows, (n, in), contiguous, in whole numbers of 8 bits."""

    def in_rows(self) -> "Grouped":
        rows, zeros = self.stored_rows, self.zeros
        count = len(rows)
        rows = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        return replace(
            self,
            stored_rows=range(count),
            packed=self.packed[rows].contiguous(),
            scales=self.scales[rows].float().contiguous(),
            zeros=zeros if isinstance(zeros, int) else zeros[rows].contiguous(),
        )

    def _layout(self, format: str) -> Layout:
        """Of entries that lie row by row, in a format of cpu.c."""
        groups, of_all, shift = self.groups, isinstance(self.zeros, int), BY_ROW
        if isinstance(groups, int) and groups != self.columns:
            shift = power_of_two(groups) if groups % STEP == 0 else None
            groups = groups if shift else (torch.arange(self.columns) // groups).to(torch.int32)
        return Layout(
            format=format,
            columns=self.columns,
            entries=self.packed,
            row_bytes=self.packed.size(1) * self.packed.itemsize,
            scales=self.scales.float(),
            zeros=None if of_all else self.zeros,
            offset=float(self.zeros) if of_all else 0.0,
            groups=groups if isinstance(groups, Tensor) else None,
            shift=shift or BY_ROW,
            scales_per_row=self.scales.size(1),
            rounded_to=self.dtype,
        )

    def _largest(self) -> Tensor:
        return (self.scales.float().abs() * 2**self.width).flatten()

    def _dequantised(self, first: int, last: int) -> Tensor:
        values = self._entries(first, last).float()
        scales = self.scales[first:last].float()
        zeros = self.zeros if isinstance(self.zeros, int) else self.zeros[first:last].float()
        if isinstance(self.groups, Tensor):
            zeros = zeros if isinstance(zeros, int) else zeros.index_select(1, self.groups)
            return values.sub_(zeros).mul_(scales.index_select(1, self.groups))
        grouped = values.view(last - first, -1, self.groups)
        grouped.sub_(zeros if isinstance(zeros, int) else zeros[..., None]).mul_(scales[..., None])
        return values


@dataclass(frozen=True)
class PackedRows(Grouped):
    """Unsigned numbers, packed along the rows of W: `packed` is (out, ⌈in · bits / 32⌉) in int32, in any
    order in memory, the first number in the lowest bits."""

    def layout(self) -> Layout:
        return self._layout(f"packed{self.width}")

    def _entries(self, first: int, last: int) -> Tensor:
        return unpacked(self.packed[first:last].t(), self.width, self.columns).t().contiguous()


def group_numbers(columns: int, size: int | None) -> Tensor | int:
    """The `groups` of columns that are grouped in order; None: all of them are one group."""
    if size is None or size >= columns:
        return columns
    return size if columns % size == 0 else (torch.arange(columns) // size).to(torch.int32)


def checked_groups(stored: Tensor, columns: int, count: int, size: int | None, name: str) -> Tensor | int:
    """The `groups` that a file stores. Raises ValueError for a number without a scale."""
    if stored.shape != (columns,) or stored.is_floating_point() or stored.dtype == torch.bool:
        raise ValueError(f"has a {name} {tuple(stored.shape)}; it needs {columns} whole numbers")
    low, high = (int(bound) for bound in stored.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"has a {name} with group {low if low < 0 else high}; there are {count} groups")
    regular = group_numbers(columns, size)
    in_order = torch.arange(columns) // regular if isinstance(regular, int) else regular
    return regular if torch.equal(stored.long(), in_order.long()) else stored.to(torch.int32)


def checked_scales(scales: Tensor, rows: int, columns: int, size: int | None) -> int:
    """How many groups of columns share a scale. Raises ValueError unless `scales` is (groups, out), in
    floating point."""
    count = 1 if size is None else -(-columns // size)
    if tuple(scales.shape) != (count, rows):
        raise ValueError(
            f"has scales {tuple(scales.shape)}; a weight of {rows} x {columns} in groups of "
            f"{size or columns} needs {count} x {rows}"
        )
    floating(scales, "scales")
    return count
