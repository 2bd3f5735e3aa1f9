"""Matrices in the block formats of ggml, as GGUF files hold them: each row of W is a number of
blocks, of 32 or 256 values with their scales.

    Q8_0              d, 32 bytes: q · d
    Q4_0, Q5_0        d, 32 unsigned numbers of 4 or 5 bits: (q - 8) · d, (q - 16) · d
    Q4_1, Q5_1        d, m: q · d + m
    Q4_K, Q5_K        256 values in 8 parts: q · (d · scale) - dmin · minimum, both of 6 bits
    Q6_K              256 values in 16 parts: (q - 32) · (d · scale), scales of 8 bits

The products are those of the gguf package's `dequantize`, in its order, in fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.frozen.few_bits import Quantized
from litlora.kernels.cpu import Layout


@dataclass(frozen=True)
class BlockFormat:
    """How a block is stored."""

    name: str
    values: int
    """Of one block."""
    num_bytes: int
    """Of one block."""
    bits: int
    dequantise: Callable[[Tensor], Tensor]
    """(n, num_bytes) in uint8 to (n, values) in fp32."""
    scales: tuple[int, ...]
    """Where in a block the fp16 numbers are."""


@dataclass(frozen=True)
class GGML(Quantized):
    """Rows of blocks."""

    tool = "GGUF"
    packed: Tensor
    """(out, bytes of a row)."""
    format: BlockFormat

    @property
    def kind(self) -> str:
        return self.format.name

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def stored(self) -> dict[str, Tensor]:
        return {"packed": self.packed}

    def layout(self) -> Layout:
        sizes = {"columns": self.columns, "row_bytes": self.packed.size(1)}
        return Layout(format=self.format.name.lower(), entries=self.packed, **sizes)

    def _largest(self) -> Tensor:
        # 6 bits of a scale times 5 of an entry, or 8 times 6: finite if the scales are.
        blocks = self.packed.view(-1, self.format.num_bytes)
        found = [_half(blocks, place).abs().max() for place in self.format.scales]
        return torch.stack(found)

    def _dequantised(self, first: int, last: int) -> Tensor:
        return self._values(self.packed[first:last])

    def _parts(self, stored_rows: range | Tensor, step: int) -> Iterator[Tensor]:
        if isinstance(stored_rows, range):
            yield from super()._parts(stored_rows, step)
            return
        for rows in stored_rows.split(step):  # rotated heads are stored in another order of rows
            yield self._values(self.packed.index_select(0, rows.to(self.device)))

    def _values(self, packed: Tensor) -> Tensor:
        blocks = packed.reshape(-1, self.format.num_bytes)
        return self.format.dequantise(blocks).view(len(packed), self.columns)


def _half(blocks: Tensor, place: int) -> Tensor:
    """The fp16 number at a place of each block, (n, 1) in fp32."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(n, m) bytes to (n, 2 m): the lower halves of all, then the upper halves."""
    return torch.cat([packed & 15, packed >> 4], 1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(n, 4) bytes to (n, 32): their bits, worth 16 each."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1) << 4


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    entries = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (entries.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    entries = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return entries.float() * _half(blocks, 0) + _half(blocks, 2)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes to 8 scales and 8 minima of 6 bits, (n, 8) each in fp32. The last four of both have
    their upper two bits in the bytes of the first four."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales.float(), minima.float()


def _parts_of_32(packed: Tensor) -> Tensor:
    """(n, 128) bytes to (n, 8, 32): of each 32 bytes the lower halves, then the upper halves."""
    rows = packed.reshape(-1, 4, 1, 32)
    return torch.cat([rows & 15, rows >> 4], 2).view(-1, 8, 32)


def _with_minima(blocks: Tensor, entries: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    d, dmin = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (entries.float() * d[..., None] - dmin[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _parts_of_32(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[None, :, None]
    fifth = ((blocks[:, None, 16:48] >> shifts) & 1) << 4  # bit n of all 32 bytes is of part n
    return _with_minima(blocks, _parts_of_32(blocks[:, 48:]) | fifth)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[None, None, :, None]
    entries = (low | (((high >> shifts) & 3) << 4).view(-1, 8, 32)).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return (entries.view(-1, 16, 16) * scales[..., None]).flatten(1)


BLOCK_FORMATS = {
    one.name: one
    for one in (
        BlockFormat("Q8_0", 32, 34, 8, _q8_0, (0,)),
        BlockFormat("Q4_0", 32, 18, 4, _q4_0, (0,)),
        BlockFormat("Q4_1", 32, 20, 4, _q4_1, (0, 2)),
        BlockFormat("Q5_0", 32, 22, 5, _q5_0, (0,)),
        BlockFormat("Q5_1", 32, 24, 5, _q5_1, (0, 2)),
        BlockFormat("Q4_K", 256, 144, 4, _q4_k, (0, 2)),
        BlockFormat("Q5_K", 256, 176, 5, _q5_k, (0, 2)),
        BlockFormat("Q6_K", 256, 210, 6, _q6_k, (208,)),
    )
}
"""By their names in ggml."""
