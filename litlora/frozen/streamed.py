"""Frozen weights that stay in their memory-mapped file: read ahead of their use, and dropped behind
it. Only a block and a matrix of the next one are in memory at a time.

The values and the order of the arithmetic are those of the same weights in memory, so all results
are the same to the bit. Where the file has another dtype than the computation, a matrix is converted
for every use, into memory that all share.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.frozen.few_rows import FewRows, few_rows
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.scratch import scratch
from litlora.frozen.weight import FrozenWeight
from litlora.kernels.cpu import Compiled
from litlora.storage.pages import ReadAhead, mapped, read, release

TILE_BYTES = 32 << 20
"""About how much of an output head is in memory at a time."""


class Stream:
    """The matrices of a model's blocks, in the order of their use, and which of them are in memory.

    The forward goes through the blocks upwards, and the backward downwards from the last one, where
    something below it learns. A block that the backward comes to may be computed again first, so
    its matrices stay until `back` has used them; else they go once they were used. As each goes,
    the same one of the next block is read.
    """

    def __init__(self) -> None:
        self.blocks: list[list[Tensor]] = []
        """The matrices of each block, as their file has them."""
        self.pages = ReadAhead()
        self.head_bytes = 0
        """Of the output head, if it streams too."""
        self.speed = math.inf
        """Bytes that were read a second, when all of them were."""
        self._here = self._next = -1
        self._goes_down = False
        self._touched: set[int] = set()

    def add(self, block: int, W: Tensor) -> int:
        """Take up a matrix; returns its number within the block."""
        while len(self.blocks) <= block:
            self.blocks.append([])
        self.blocks[block].append(W)
        return len(self.blocks[block]) - 1

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(W.nbytes for block in self.blocks for W in block)

    def begin(self, block: int, *, learns: bool) -> None:
        """A matrix of this block is about to be used. `learns`: the backward will come to what is
        below."""
        if block == self._here:
            return
        came, self._here, last = self._here, block, len(self.blocks) - 1
        if block == last:
            self._goes_down, self._next = learns, max(0, block - 1) if learns else 0
        elif block == 0:
            self._goes_down, self._next = self._goes_down and came == 1, 1
        else:
            self._goes_down = block < came
            self._next = block - 1 if self._goes_down else block + 1
        for gone in self._touched - {block, self._next}:
            for W in self.blocks[gone]:
                self.pages.release(W)
        self._touched = {block, self._next}

    def end(self, block: int, number: int, *, back: bool) -> None:
        """A matrix was used."""
        if self._goes_down and not back:
            return
        self.pages.release(self.blocks[block][number])
        following, wanted = self.blocks[self._next], self._next
        if wanted != block and number < len(following):
            self.pages.read(following[number], lambda: wanted in (self._here, self._next))


class Mapped(FrozenWeight):
    """W in a mapped file."""

    _W: Tensor
    packed = False
    """Whether few rows go by compiled code, as those of a weight in memory do that is laid out for
    generation."""

    @property
    def compiled_for(self) -> tuple[torch.dtype, ...]:
        # In a wider dtype its values are exact.
        return (self.dtype, torch.float32)

    @property
    def shape(self) -> torch.Size:
        return self._W.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._W.dtype

    @property
    def device(self) -> torch.device:
        return self._W.device

    def rows(self, rows: slice = slice(None)) -> Tensor:
        return self._W[rows]


class StreamedWeight(Mapped):
    """W of a linear layer in a block."""

    def __init__(self, stream: Stream, block: int, W: Tensor) -> None:
        """W must lie in a mapped file."""
        self._stream, self._block, self._W = stream, block, W
        self._number = stream.add(block, W)

    @property
    def compiled(self) -> Compiled | None:
        return None if self._plain is None else self._plain.compiled

    @property
    def around(self) -> tuple[Callable[[], None], Callable[[], None]]:
        begin = partial(self._stream.begin, self._block, learns=False)
        return begin, partial(self._stream.end, self._block, self._number, back=False)

    @property
    def _plain(self) -> FewRows | None:
        return self._few_rows if self.packed else None

    @cached_property
    def _few_rows(self) -> FewRows | None:
        return few_rows(self._W)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self._stream.begin(self._block, learns=x.requires_grad)
        with torch.no_grad():  # W is gone before a backward could read it
            y = _product(x, self._W, bias, self._plain)
        self._stream.end(self._block, self._number, back=False)
        return y

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        self._stream.begin(self._block, learns=True)
        W = values(self._W, dy.dtype)
        dx = dy @ W if into is None else into.addmm_(dy, W)
        self._stream.end(self._block, self._number, back=True)
        return dx


class StreamedHead(Mapped):
    """W of an output head, of which some rows are in memory at a time."""

    def __init__(self, stream: Stream, W: Tensor) -> None:
        """W must lie in a mapped file."""
        self._pages, self._W = stream.pages, W
        rows = TILE_BYTES // max(1, W[:1].nbytes)
        self._step = max(1, rows // 1024 * 1024 or rows)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # The dtype is that of a product: under autocast it is not that of x.
        parts = []
        with torch.no_grad():
            for first in range(0, len(self._W), self._step):
                rows = slice(first, first + self._step)
                own = None if bias is None else bias[rows]
                W = self._moved_to(rows)
                parts.append(_product(x, W, own, few_rows(W) if self.packed else None))
        return torch.cat(parts, dim=-1)

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        W = values(self._W, dy.dtype)  # whole: sums over tiles would round otherwise
        dx = dy @ W if into is None else into.addmm_(dy, W)
        release(self._W)
        return dx

    def tile(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """These rows in this dtype, valid until this thread asks for others."""
        return values(self._moved_to(rows), dtype)

    def _moved_to(self, rows: slice) -> Tensor:
        """These rows. Those before them are dropped, and as many behind them read ahead."""
        first, count = rows.start, rows.stop - rows.start
        if count < len(self._W):
            self._pages.release(self._W[max(0, first - count) : first] if first else self._W[-count:])
            self._pages.read(self._W[rows.stop : rows.stop + count], lambda: True)
        return self._W[rows]

    def picked(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, exact, in memory of their own."""
        rows = self._W[ids]
        self._pages.release(self._W)
        return rows


class StreamedEmbedding(nn.Module):
    """An embedding whose rows are read from the file as they are needed."""

    def __init__(self, stream: Stream, W: Tensor) -> None:
        """W must lie in a mapped file."""
        super().__init__()
        self.storage = StreamedHead(stream, W)
        self.dtype = W.dtype
        """Of what it returns."""

    @property
    def weight(self) -> Tensor:
        """The exact values of W, (V, C), in the mapped file."""
        return self.storage.rows()

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and the device of what it returns."""
        return torch.empty(0, dtype=self.dtype, device=self.storage.device)

    def forward(self, ids: Tensor) -> Tensor:
        return self.storage.picked(ids.flatten()).view(*ids.shape, -1).to(self.dtype)


def _product(x: Tensor, W: Tensor, bias: Tensor | None, plain: FewRows | None) -> Tensor:
    """x Wᵀ + b of a mapped W, by compiled code if there is some."""
    y = None if plain is None else plain.product(x, bias)
    return F.linear(x, values(W, x.dtype), bias) if y is None else y


def stream_linears(stream: Stream, blocks: Sequence[nn.Module]) -> None:
    """Let the frozen linear layers of these blocks stream the weights that lie in mapped files; others
    stay: giving back their pages would lose them."""
    weights = (m.weight.detach() for block in blocks for m in block.modules() if type(m) is nn.Linear)
    addresses = {W.data_ptr() for W in mapped(weights)}
    for number, block in enumerate(blocks):
        for name, linear in list(block.named_modules()):
            if type(linear) is nn.Linear and linear.weight.data_ptr() in addresses:
                W = StreamedWeight(stream, number, linear.weight.detach())
                block.set_submodule(name, FrozenLinear(W, linear.bias))


def values(W: Tensor, dtype: torch.dtype) -> Tensor:
    """A mapped matrix in this dtype: itself, or converted into shared memory, with the strides that
    a copy of it would have."""
    read(W)
    if W.dtype == dtype:
        return W
    strides = torch.empty_like(W, dtype=dtype, device="meta").stride()
    return scratch(W.shape, dtype, W.device, strides).copy_(W)
