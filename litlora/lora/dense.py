"""Updates whose ΔW is not s · B A: products of two matrices (LyCORIS, Yeh et al. 2023,
arXiv:2309.14859), and DoRA around any of them (Liu et al. 2024, arXiv:2402.09353). They are added
to weights, and never trained here.

    LoHa    ΔW = s · (B1 A1) * (B2 A2), entry by entry
    LoKr    ΔW = s · w1 (x) w2, Kronecker's product: entry (i, j) of w1 times all of w2 is block (i, j)
    DoRA    W' = m · V / ‖V‖ with V = W + ΔW; the norm is that of each row of V, or of each column
    experts ΔW of each of a layer's experts is s · B A; W is (experts, out, in)
    rows    some rows of W, an embedding's, are replaced

All matrices are (out, in), of a convolution (out, in · kernel), as the weight is stored. No more
than some rows of ΔW are in memory at a time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from litlora.lora.update import Update
from litlora.storage.blocks import rows_at_a_time

Pair = tuple[Tensor, Tensor]
"""B (out, r) and A (r, in)."""
Rows = Callable[[slice], Tensor]
"""Gives some rows of a matrix."""


class DenseUpdate(ABC):
    """What is added to one layer's weight."""

    name: ClassVar[str]
    """As people call it."""
    shape: tuple[int, ...]
    """The shape of the weight; (out, in · kernel) if that is all that the tensors tell."""
    scale: float
    rank: int | None
    """The rank that it was trained with; None: it has none."""

    @abstractmethod
    def change(self, before: Tensor, first: int = 0) -> Rows:
        """The rows of W' - W in the dtype of `before`, which is W (out, in), or its rows from
        `first`."""

    def add_to(self, total: Tensor, before: Tensor, factor: float = 1.0, first: int = 0) -> Tensor:
        """Add factor · (W' - W) to `total`, contiguous and in fp32 or better, in place; `before` is
        W, the weight that the update was trained on. Both may be some rows of it, from `first`.
        Returns it."""
        matrix, W = total.view(len(total), -1), before.flatten(1)
        change = self.change(W if W.dtype == total.dtype else W.to(total.dtype), first)
        for rows in _slices(matrix):
            matrix[rows].add_(change(rows), alpha=factor)
        return total

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight has the shape that this is for."""
        own = self.shape
        if len(own) == 2:
            return own == (shape[0], math.prod(shape[1:]))
        return own == shape or (own[:2] == shape and math.prod(own[2:]) == 1)

    def norm(self) -> float | None:
        """‖ΔW‖, Frobenius; None if only the weight tells."""
        return None


class ProductUpdate(DenseUpdate):
    """A ΔW that does not depend on W."""

    @abstractmethod
    def rows(self, dtype: torch.dtype) -> Rows:
        """The rows of ΔW, (out, in)."""

    def change(self, before: Tensor, first: int = 0) -> Rows:
        return _from(first, self.rows(before.dtype), len(before))

    def norm(self) -> float:
        rows_of = self.rows(torch.float64)
        slices = _slices(torch.empty(self.shape, dtype=torch.float64, device="meta"))
        return math.hypot(*(torch.linalg.norm(rows_of(rows)).item() for rows in slices))


@dataclass(frozen=True)
class HadamardUpdate(ProductUpdate):
    """LoHa."""

    name: ClassVar[str] = "LoHa"
    shape: tuple[int, ...]
    left: Pair
    right: Pair
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.left[0].size(1)

    def rows(self, dtype: torch.dtype) -> Rows:
        (B1, A1), (B2, A2) = ([factor.to(dtype) for factor in pair] for pair in (self.left, self.right))
        return lambda rows: self.scale * (B1[rows] @ A1) * (B2[rows] @ A2)


@dataclass(frozen=True)
class KroneckerUpdate(ProductUpdate):
    """LoKr."""

    name: ClassVar[str] = "LoKr"
    shape: tuple[int, ...]
    left: Tensor | Pair
    right: Tensor | Pair
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        pairs = [side for side in (self.right, self.left) if not isinstance(side, Tensor)]
        return pairs[0][0].size(1) if pairs else None

    def rows(self, dtype: torch.dtype) -> Rows:
        w1, w2 = (
            side.to(dtype) if isinstance(side, Tensor) else side[0].to(dtype) @ side[1].to(dtype)
            for side in (self.left, self.right)
        )

        def rows_of(rows: slice) -> Tensor:
            index = torch.arange(self.shape[0])[rows]
            outer, inner = w1[index // len(w2)], w2[index % len(w2)]
            return (outer[:, :, None] * inner[:, None, :]).flatten(1) * self.scale

        return rows_of


@dataclass(frozen=True)
class ExpertsUpdate(ProductUpdate):
    """LoRA of one parameter of a layer's experts, as PEFT has it (target_parameters)."""

    name: ClassVar[str] = "LoRA of experts"
    A: Tensor
    """(experts, r, in)."""
    B: Tensor
    """(experts, out, r)."""
    scale: float
    experts: str
    """What the layer's experts are called."""
    parameter: str
    """What the parameter is called in them."""
    transposed: bool = False
    """Whether the parameter is (experts, in, out)."""

    @property
    def rank(self) -> int:
        return self.A.size(1)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = (self.B.size(1), self.A.size(2))
        return (len(self.A), *(sizes[::-1] if self.transposed else sizes))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape == self.shape

    def rows(self, dtype: torch.dtype) -> Rows:
        def rows_of(rows: slice) -> Tensor:
            B, A = self.B[rows].to(dtype), self.A[rows].to(dtype)
            product = A.mT @ B.mT if self.transposed else B @ A
            return self.scale * product.flatten(1)

        return rows_of

    def of_expert(self, expert: int, part: int, parts: int) -> Update:
        """The update of one expert's layer that has one of `parts` equal shares of the rows."""
        return Update(self.A[expert], self.B[expert].chunk(parts)[part], self.scale)


@dataclass(frozen=True)
class ReplacedRows(DenseUpdate):
    """Rows that replace those of some tokens."""

    name: ClassVar[str] = "rows of tokens"
    scale: ClassVar[float] = 1.0
    rank: ClassVar[None] = None
    values: Tensor
    """(tokens, width)."""
    tokens: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return max(self.tokens) + 1, self.values.size(1)

    def fits(self, shape: tuple[int, ...]) -> bool:
        rows, width = self.shape
        return len(shape) == 2 and shape[0] >= rows and shape[1] == width

    def change(self, before: Tensor, first: int = 0) -> Rows:
        tokens = torch.tensor(self.tokens) - first

        def rows_of(rows: slice) -> Tensor:
            start, stop, _ = rows.indices(len(before))
            changed = torch.zeros_like(before[rows])
            inside = (tokens >= start) & (tokens < stop)
            here = tokens[inside]
            changed[here - start] = self.values[inside].to(before.dtype) - before[here]
            return changed

        return rows_of


@dataclass(frozen=True)
class DecomposedUpdate(DenseUpdate):
    """DoRA around another update."""

    name: ClassVar[str] = "DoRA"
    update: Update | DenseUpdate
    magnitude: Tensor
    """One value for each row, or for each column, of the weight as it is stored."""
    axis: Literal["out", "in"] = "out"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.update.shape

    @property
    def scale(self) -> float:
        return self.update.scale

    @property
    def rank(self) -> int | None:
        return self.update.rank

    def fits(self, shape: tuple[int, ...]) -> bool:
        size = shape[0] if self.axis == "out" else shape[1]
        inner = self.update
        fits = inner.fits(shape) if isinstance(inner, DenseUpdate) else fits_plain(inner, shape)
        return fits and size == len(self.magnitude)

    def change(self, before: Tensor, first: int = 0) -> Rows:
        inner = (
            self.update.change(before, first)
            if isinstance(self.update, DenseUpdate)
            else _from(first, _product_rows(self.update, before.dtype), len(before))
        )
        magnitude = self.magnitude.to(before.dtype)
        if self.axis == "out":
            magnitude = magnitude[first : first + len(before)]

            def by_output(rows: slice) -> Tensor:
                V = before[rows] + inner(rows)
                norm = torch.linalg.vector_norm(V, dim=1, keepdim=True)
                return V * (magnitude[rows, None] / _nonzero(norm)) - before[rows]

            return by_output
        squares = torch.zeros(len(magnitude), dtype=torch.float64)
        for rows in _slices(before):
            V = before[rows] + inner(rows)
            squares += V.view(len(V), len(magnitude), -1).double().square().sum((0, 2))
        factors = magnitude / _nonzero(squares.sqrt()).to(before.dtype)

        def by_input(rows: slice) -> Tensor:
            V = before[rows] + inner(rows)
            scaled = V.view(len(V), len(magnitude), -1) * factors[None, :, None]
            return scaled.flatten(1) - before[rows]

        return by_input


def fits_plain(update: Update, shape: tuple[int, ...]) -> bool:
    """Whether a weight has the shape that an update s · B A is for. Factors of a linear layer and
    of a convolution of kernel 1 serve for each other."""
    own = update.shape
    return own == shape or (own[:2] == shape[:2] and math.prod(own[2:]) == math.prod(shape[2:]) == 1)


def _product_rows(update: Update, dtype: torch.dtype) -> Rows:
    B, A = (matrix.to(dtype) for matrix in update.matrices)
    if update.kind != "linear":
        B, A = A.T, B.T
    return lambda rows: update.scale * (B[rows] @ A)


def _from(first: int, rows_of: Rows, count: int) -> Rows:
    """Gives some of the `count` rows from `first`."""
    return lambda rows: rows_of(slice(first + rows.start, first + min(rows.stop, count)))


def _nonzero(norm: Tensor) -> Tensor:
    """A row of zeros has no direction, and stays zero."""
    return torch.where(norm == 0, 1.0, norm)


def _slices(matrix: Tensor) -> list[slice]:
    """Slices of rows of about the size of a block."""
    step = rows_at_a_time(matrix.shape, matrix.dtype.itemsize)
    return [slice(start, start + step) for start in range(0, len(matrix), step)]
