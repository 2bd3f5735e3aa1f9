"""Quantising weights: the entries and scales that stand for a matrix W (out, in) in 4 or 8 bits.

    nf4      4 bits. W is cut into blocks of 64 values, row by row. A block's scale is its largest
             magnitude; an entry is the nearest of 16 quantiles of the normal distribution
    nf4-dq   the same, double quantisation: the scales less their mean are cut into blocks of 256
             and stored as the nearest of 256 values times the largest magnitude of their block
    int8     a scale for each row, its largest magnitude: entry = round(127 W / scale)
    fp8      a scale for each row, its largest magnitude / 448: entry = W / scale in float8_e4m3fn

nf4, nf4-dq and int8 are bitsandbytes' formats, and the bits are those of its `quantize_4bit` and
`int8_vectorwise_quant`; fp8 is compressed-tensors' with the strategy "channel", which vLLM reads.
Sources: Dettmers et al. 2023, arXiv:2305.14314; Dettmers et al. 2022, arXiv:2208.07339; Micikevicius
et al. 2022, arXiv:2209.05433.

All is computed in fp32, a piece at a time. What the dequantised values are rounded to is the dtype
of W.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import BaseMismatchError, setting
from litlora.frozen.bitsandbytes import TABLES, EightBit, FourBit, NestedScales
from litlora.frozen.few_bits import Quantized
from litlora.frozen.low_rank import LowRank
from litlora.kernels.cpu import Layout
from litlora.storage.blocks import one_thread
from litlora.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Quantizer:
    """All that the quantised form of a weight depends on."""

    kind: str
    """nf4, int8 or fp8."""
    blocksize: int | None = None
    """Values that share a scale; None: those of a row."""
    nested_blocksize: int | None = None
    """Scales that share a scale, with double quantisation."""

    @property
    def name(self) -> str:
        """As the settings call it."""
        return next((name for name, one in QUANTIZERS.items() if one == self), self.kind)

    def describe(self) -> str:
        """For a person."""
        if self.blocksize is None:
            return f"{self.name} (a scale for each row)"
        nested = f", whose scales are quantised in blocks of {self.nested_blocksize}"
        return f"{self.name} (blocks of {self.blocksize}{nested if self.nested_blocksize else ''})"

    def settings(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "Quantizer":
        """What `settings` gave. Raises ValueError for anything that this version does not know: it
        could mean other weights."""
        known = {field.name for field in fields(cls)}
        if odd := sorted(map(str, settings.keys() - known)):
            raise ValueError(f"the quantiser's {odd[0]} is not known to this version of litlora")
        quantizer = cls(**settings)
        if quantizer not in QUANTIZERS.values():
            raise ValueError(f"the quantiser {dict(settings)} is not one of {', '.join(QUANTIZERS)}")
        return quantizer

    def problem(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape cannot be quantised; None if it can."""
        if self.blocksize is None or shape.numel() >= self.blocksize:
            return None
        size = " x ".join(map(str, shape))
        return f"is {size}, {shape.numel()} values, and a block has {self.blocksize}"

    def quantised(self, W: Tensor, name: str, file: Path, taken_out: LowRank | None = None) -> Quantized:
        """W (out, in), less what is taken out of it, in few bits; `name` and `file` say where it comes
        from."""
        facts = (name, file, W.dtype, W.size(1), range(W.size(0)))
        return _QUANTISE[self.kind](self, _Values(W.detach(), taken_out), facts)


QUANTIZERS = {
    "nf4": Quantizer("nf4", 64),
    "nf4-dq": Quantizer("nf4", 64, 256),
    "int8": Quantizer("int8"),
    "fp8": Quantizer("fp8"),
}
"""By their names in the settings."""


@dataclass(frozen=True)
class QuantizedBase:
    """The base of an adapter as its training saw it: the weights of its blocks in few bits."""

    quantizer: Quantizer
    fingerprint: str | None
    """Of the entries: see `fingerprint_of`. None until all of them are there."""
    taken_out: Mapping[str, LowRank] = field(default_factory=dict, compare=False)
    """What was taken out of some weights before they were quantised, by the layer's name: LoftQ in more
    than one iteration. The fingerprint tells whether two are equal."""


@dataclass(frozen=True)
class Float8(Quantized):
    """float8_e4m3fn, with one scale for each row."""

    entries: Tensor
    """(out, in)."""
    scales: Tensor
    """(out,), fp32."""

    @property
    def kind(self) -> str:
        return "fp8"

    @property
    def device(self) -> torch.device:
        return self.entries.device

    def stored(self) -> dict[str, Tensor]:
        return {"entries": self.entries.view(torch.uint8), "scales": self.scales}

    def layout(self) -> Layout | None:
        sizes = {"columns": self.columns, "row_bytes": self.columns}
        return Layout(format="e4m3", entries=self.entries, scales=self.scales, **sizes)

    @property
    def scales_rows(self) -> bool:
        """Whether all entries of a row share a scale."""
        return True

    def row_scales(self) -> Tensor:
        """That of each stored row, if it `scales_rows`: (out,), contiguous, in fp32."""
        return self.scales

    def _largest(self) -> Tensor:
        return self.scales * torch.finfo(self.entries.dtype).max

    def _dequantised(self, first: int, last: int) -> Tensor:
        return eight_bits_below(self.entries[first:last]).mul_(self.scales[first:last, None] * 256)


def float8_values(entries: Tensor) -> Tensor:
    """Finite entries in float8_e4m3fn as fp32."""
    return eight_bits_below(entries).mul_(256)


def eight_bits_below(entries: Tensor, memory: Tensor | None = None) -> Tensor:
    """Finite entries in float8_e4m3fn times 2^-8, as fp32; `memory`, int16 and as large, is overwritten."""
    # Moved into the places of fp16's exponent and fraction, the bits mean 2^-8 of their value;
    # torch's own conversion takes several times as long.
    entries = entries.view(torch.int8)
    bits = entries.to(torch.int16) if memory is None else memory.copy_(entries)
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float()


@dataclass(frozen=True)
class ToQuantize(Quantized):
    """A matrix that is quantised when its values are first asked for."""

    source: Callable[[], Tensor]
    """The values (out, in) to quantise, in `dtype`."""
    quantizer: Quantizer
    done: Callable[[Tensor, Quantized], None] = lambda values, matrix: None
    """Told once of both."""
    taken_out: LowRank | None = None
    """What is subtracted from the values first."""

    @cached_property
    def matrix(self) -> Quantized:
        """What it is quantised to."""
        W = self.source()
        matrix = self.quantizer.quantised(W, self.name, self.file, self.taken_out)
        self.done(W, matrix)
        return matrix

    @property
    def kind(self) -> str:
        return self.quantizer.kind

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def settled(self) -> Quantized:
        return self.matrix

    def stored(self) -> dict[str, Tensor]:
        return self.matrix.stored()

    def _largest(self) -> Tensor:
        return self.matrix._largest()

    def _dequantised(self, first: int, last: int) -> Tensor:
        return self.matrix._dequantised(first, last)


def fingerprint_of(matrices: Mapping[str, Quantized]) -> str:
    """Identifies quantised weights by their stored entries. The scales of scales are left out: they
    depend on a sum, whose last bit differs between processors."""
    return joined({name: fingerprint(matrix.stored()) for name, matrix in matrices.items()})


class Expected:
    """The fingerprint that weights must have once all of them are quantised."""

    def __init__(self, fingerprint: str, count: int, what: str) -> None:
        """Of so many weights; `what` begins the message of the error."""
        self._wanted, self._count, self._what = fingerprint, count, what
        self._found: dict[str, str] = {}

    def add(self, name: str, matrix: Quantized) -> None:
        """One more is quantised. Raises BaseMismatchError with the last if they are not those that
        were expected."""
        self._found[name] = fingerprint(matrix.stored())
        if len(self._found) == self._count and (found := joined(self._found)) != self._wanted:
            raise BaseMismatchError(
                f"{self._what} (fingerprint {found}, not {self._wanted}); "
                f"go on with {setting('allow_base_mismatch')}"
            )


def joined(fingerprints: Mapping[str, str]) -> str:
    """One fingerprint of those of many weights, by their names."""
    return fingerprint({}, "".join(f"{name} {fingerprints[name]}\n" for name in sorted(fingerprints)))


# ---- the quantisers


_Facts = tuple[str, Path, torch.dtype, int, range]
"""The first fields of a Quantized."""
DYNAMIC_EXPONENTS = 7
PIECE = 2**17
"""About how many values are quantised at a time: what fits into the caches."""


def _pieces(shape: torch.Size, multiple: int = 1) -> Iterator[slice]:
    """Stretches of a tensor of this shape along its first axis."""
    step = PIECE // max(1, shape[1:].numel())
    step = max(multiple, step - step % multiple)
    return (slice(first, first + step) for first in range(0, shape[0], step))


class _Values:
    """Those of a weight W (out, in) less what is taken out of it, in fp32, a piece at a time."""

    def __init__(self, W: Tensor, taken_out: LowRank | None) -> None:
        self._W, self._taken_out, self.shape = W, taken_out, W.shape

    @cached_property
    def _flat(self) -> Tensor:
        return self._W.reshape(-1)

    def rows(self, rows: slice) -> Tensor:
        if self._taken_out is None:
            return self._W[rows].float()
        values = self._W[rows].to(torch.float32, copy=True)
        self._taken_out.take_out(values, rows)
        return values

    def flat(self, piece: slice) -> Tensor:
        """A stretch of all values, row by row."""
        if self._taken_out is None:
            return self._flat[piece].float()
        columns = self.shape[1]
        first, last = piece.start // columns, -(-piece.stop // columns)
        start = first * columns
        return self.rows(slice(first, last)).reshape(-1)[piece.start - start : piece.stop - start]


def _four_bit(quantizer: Quantizer, W: _Values, facts: _Facts) -> FourBit:
    count, size = W.shape.numel(), quantizer.blocksize
    packed = torch.empty(-(-count // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-count // size))
    table = torch.tensor(TABLES[quantizer.kind])
    for piece in _pieces(torch.Size((count,)), multiple=size * 2):
        entries, scales = _nearest(W.flat(piece), table, size)
        if len(entries) % 2:  # the byte after the end stands for 0
            entries = torch.cat([entries, torch.bucketize(torch.zeros(1), _middles(table)).to(torch.uint8)])
        first = piece.start // 2
        packed[first : first + len(entries) // 2] = (entries[::2] << 4) | entries[1::2]
        absmax[piece.start // size :][: len(scales)] = scales
    nested = quantizer.nested_blocksize
    scales = absmax if nested is None else _nested(absmax, nested)
    return FourBit(*facts, packed, quantizer.kind, scales, size)


def _nearest(values: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(the number of the table's nearest entry for each value over its block's scale, the scales)."""
    whole = len(values) - len(values) % blocksize
    blocks, rest = values[:whole].view(-1, blocksize), values[whole:]
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    parts = [scaled.flatten()]
    if len(rest):  # divided, as bitsandbytes does: the last bit may differ
        last = rest.abs().max().clamp(min=1e-38)
        parts.append(rest / last)
        absmax = torch.cat([absmax, last[None]])
    scaled, middles = torch.cat(parts).clamp_(-1, 1), _middles(table)
    if len(table) > 16:
        return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8), absmax
    entries = torch.zeros(len(scaled), dtype=torch.uint8)
    for middle in middles:  # a third of the time of a search
        entries += (scaled > middle).view(torch.uint8)
    return entries, absmax


def _middles(table: Tensor) -> Tensor:
    return (table[:-1] + table[1:]) / 2


def _nested(absmax: Tensor, blocksize: int) -> NestedScales:
    with one_thread():  # the last bit of a sum depends on the number of threads
        offset = absmax.mean()
    table = dynamic_table()
    entries, outer = _nearest(absmax - offset, table, blocksize)
    return NestedScales(entries, table, outer, blocksize, offset.item())


def dynamic_table() -> Tensor:
    """(256,), ascending: bitsandbytes' 8-bit numbers with a sign, a dynamic exponent and a fraction
    (Dettmers 2015, arXiv:1511.04561): the longer the exponent, the shorter the fraction."""
    values = [0.0, 1.0]
    for exponent in range(DYNAMIC_EXPONENTS):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        magnitudes = 10 ** (exponent - DYNAMIC_EXPONENTS + 1) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return torch.tensor(sorted(values))


def _eight_bit(quantizer: Quantizer, W: _Values, facts: _Facts) -> EightBit:
    entries, largest = torch.empty(W.shape, dtype=torch.int8), torch.empty(W.shape[0])
    for rows in _pieces(W.shape):
        values = W.rows(rows)
        largest[rows] = scale = values.abs().amax(1)
        factor = torch.where(scale > 0, 127.0 / scale, torch.zeros_like(scale))
        entries[rows] = (values * factor[:, None]).round_()
    return EightBit(*facts, entries, largest)


def _float8(quantizer: Quantizer, W: _Values, facts: _Facts) -> Float8:
    entries, scales = torch.empty(W.shape, dtype=torch.float8_e4m3fn), torch.empty(W.shape[0])
    most = torch.finfo(entries.dtype).max
    for rows in _pieces(W.shape):
        values = W.rows(rows)
        # The smallest normal number keeps a row of zeros, or of subnormal ones, from dividing by 0.
        scales[rows] = scale = (values.abs().amax(1) / most).clamp_(min=torch.finfo(torch.float32).tiny)
        entries[rows] = (values / scale[:, None]).clamp_(-most, most).to(entries.dtype)
    return Float8(*facts, entries, scales)


_QUANTISE = {"nf4": _four_bit, "int8": _eight_bit, "fp8": _float8}
