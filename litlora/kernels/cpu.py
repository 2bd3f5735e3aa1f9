"""Compiled code for the CPU (cpu.c): products of a few rows with weights as they are stored, their values,
and what lies between the products of a token.

Where there is no compiler, torch computes the same in several steps, and slower.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litlora.kernels.cpu_build import library

STEP = 32
"""Columns of a weight must be a multiple of it."""
MOST_ROWS = 16
"""Of x in one product."""
MOST_RANK = 128
"""Of an update."""
MOST_HEADS = 64
"""That share keys."""
MOST_QUERIES = 16384
"""Numbers of the queries that share keys."""
SMALL = 1 << 16
"""Numbers up to which RMSNorm by one thread is no slower than torch's."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
"""Their numbers in cpu.c."""
BY_ROW = 63
"""The shift of a scale that all columns of a row share."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What values are rounded to and written in, by their numbers in cpu.c."""


class Weight(ctypes.Structure):
    """A stored matrix, as cpu.c reads it."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("outer_table", ctypes.c_void_p),
        ("scale_bytes", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("shift", ctypes.c_int64),
        ("outer_shift", ctypes.c_int64),
        ("rows_per_scale", ctypes.c_int64),
        ("scales_per_row", ctypes.c_int64),
        ("offset", ctypes.c_float),
        ("rounding", ctypes.c_int),
    ]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a matrix (out, in) is stored, in the terms of cpu.c. All tensors are contiguous and on the CPU."""

    format: str
    """Its name in cpu.c."""
    columns: int
    entries: Tensor
    row_bytes: int = 0
    """Of the entries; formats whose blocks run on from row to row do without."""
    scales: Tensor | None = None
    """fp32."""
    table: Tensor | None = None
    """(16,) in fp32: what an entry of 4 bits means."""
    scale_bytes: Tensor | None = None
    """Scales of 8 bits: exponents, or entries of `outer_table`, (256,) in fp32."""
    outer_table: Tensor | None = None
    zeros: Tensor | None = None
    """Zero points of 8 bits, one for each scale."""
    groups: Tensor | None = None
    """(columns,) in int32: which of a row's scales is that of each column, if they are not in order."""
    shift: int = BY_ROW
    """2^shift values share a scale."""
    outer_shift: int = 0
    """2^outer_shift scales share a scale."""
    rows_per_scale: int = 1
    scales_per_row: int = 1
    offset: float = 0.0
    """Added to scales that have scales; the zero point of all, where there are no `zeros`."""
    rounded_to: torch.dtype | None = None
    """What the values are rounded to in products, too; None: they are not."""


class PartStruct(ctypes.Structure):
    """A linear layer, as cpu.c reads it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "updates", "scales")),
        ("number", ctypes.c_int),
    ]


class Compiled:
    """A stored matrix, for compiled code."""

    def __init__(self, layout: Layout, stored_rows: range | Tensor) -> None:
        """W is made up of `stored_rows`, by their numbers, in order."""
        order = stored_rows.to(torch.int64).contiguous() if isinstance(stored_rows, Tensor) else None
        self._kept = layout, order  # the memory that is pointed to
        self.rows, self.columns = len(stored_rows), layout.columns
        self.rounded = layout.rounded_to is not None
        """Whether the values are those of the matrix in its own dtype."""
        self.number = library().format_number(layout.format.encode())
        assert self.number >= 0, layout.format
        tensors = {
            name: None if (tensor := getattr(layout, name)) is None else tensor.data_ptr()
            for name in ("entries", "scales", "table", "outer_table", "scale_bytes", "zeros", "groups")
        }
        numbers = ("columns", "row_bytes", "shift", "outer_shift", "rows_per_scale", "scales_per_row")
        self.struct = Weight(
            rows=self.rows,
            first=0 if order is not None else stored_rows.start,
            order=None if order is None else order.data_ptr(),
            offset=layout.offset,
            rounding=DTYPES.get(layout.rounded_to, 0),
            **tensors,
            **{name: getattr(layout, name) for name in numbers},
        )
        self._alone = PartStruct(weight=ctypes.addressof(self.struct), number=self.number)
        self._pointers = ctypes.byref(self._alone), ctypes.byref(self.struct)

    def times(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., out) in fp32 for x (..., in), at most MOST_ROWS rows; W's values are not rounded, but
        where the layout says so."""
        x = x.float().contiguous()
        y = torch.empty((*x.shape[:-1], self.rows))
        places = x.data_ptr(), x.numel() // x.size(-1), y.data_ptr()
        library().project(self._pointers[0], 1, *places, torch.get_num_threads())
        return y

    def write_to(self, W: Tensor, dtype: torch.dtype) -> bool:
        """Write the values to W (out, in), rounded to `dtype` and then to W's own; False where it cannot."""
        if not {W.dtype, dtype} <= DTYPES.keys() or not W.is_contiguous():
            return False
        places = W.data_ptr(), DTYPES[W.dtype], torch.get_num_threads()
        library().values(self.number, self._pointers[1], DTYPES[dtype], *places)
        return True


class _Update(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("A", "Bt")),
        *((name, ctypes.c_int64) for name in ("in", "rank", "out")),
        ("dtype", ctypes.c_int),
    ]


class CompiledUpdate:
    """The factors of a low-rank update, as cpu.c reads them."""

    def __init__(self, A: Tensor, Bt: Tensor) -> None:
        self._kept = A, Bt
        sizes = A.size(1), A.size(0), Bt.size(1)
        self.struct = _Update(A.data_ptr(), Bt.data_ptr(), *sizes, DTYPES[A.dtype])


def compiled_update(A: Tensor, Bt: Tensor) -> CompiledUpdate | None:
    """Of A (r, in) and Bt (r, out), contiguous; None where there is no code for them."""
    fits = A.size(1) % 8 == 0 and Bt.size(1) % 8 == 0 and 0 < len(A) <= MOST_RANK
    if not fits or A.device.type != "cpu" or A.dtype not in DTYPES:
        return None
    return None if library() is None else CompiledUpdate(A, Bt)


Scaled = tuple[CompiledUpdate, float]
"""An update and its scale."""


class Part:
    """A linear layer for few rows: y = W x + b + s · B A x, with sums in fp32 that are rounded once."""

    def __init__(
        self,
        weight: Compiled,
        dtypes: tuple[torch.dtype, ...],
        bias: Tensor | None = None,
        updates: Sequence[Scaled | None] = (),
    ) -> None:
        """For x in one of `dtypes`. `updates`: of each row of x its own or none; or none of any."""
        self.weight, self.dtypes, self.rows, self.columns = weight, dtypes, weight.rows, weight.columns
        self.around: tuple[Callable[[], None], Callable[[], None]] | None = None
        """What is to be called before and after each use."""
        self.count: int | None = len(updates) or None
        """For so many rows; None: for any number."""
        self.bias = None if bias is None else bias.detach().float().contiguous()
        places = [None if one is None else ctypes.addressof(one[0].struct) for one in updates]
        scales = [0.0 if one is None else one[1] for one in updates]
        pointers, factors = (ctypes.c_void_p * len(places))(*places), (ctypes.c_float * len(scales))(*scales)
        self._kept = updates, pointers, factors  # the memory that is pointed to
        self.struct = PartStruct(
            weight=ctypes.addressof(weight.struct),
            bias=None if bias is None else self.bias.data_ptr(),
            updates=ctypes.addressof(pointers) if updates else None,
            scales=ctypes.addressof(factors) if updates else None,
            number=weight.number,
        )

    def with_update(self, update: CompiledUpdate, scale: float) -> "Part":
        """The layer with s · B A, for all rows."""
        part = self.with_updates([(update, scale)] * MOST_ROWS)
        part.count = None
        return part

    def with_updates(self, updates: Sequence[Scaled | None]) -> "Part":
        """The layer with an update for each of so many rows, or none."""
        part = Part(self.weight, self.dtypes, self.bias, updates)
        part.around = self.around
        return part

    def serves(self, n: int) -> bool:
        """Whether it is for x of n rows."""
        return self.count in (None, n)


def project(x: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, ...] | None:
    """Each layer applied to x (..., in), few rows: a tuple of (..., out), of its dtype; None where
    this does not suit."""
    if not _all_fit(x, parts):
        return None
    n, whole = x.numel() // x.size(-1), x.float().contiguous()
    y = torch.empty(n * sum(part.rows for part in parts))
    with _in_use(parts):
        places = whole.data_ptr(), n, y.data_ptr()
        library().project(_array(parts), len(parts), *places, torch.get_num_threads())
    outputs = y.to(x.dtype).split([n * part.rows for part in parts])
    return tuple(one.view(*x.shape[:-1], -1) for one in outputs)


def gated_mlp(x: Tensor, parts: tuple[Part, ...], activation: str) -> Tensor | None:
    """down(activation(gate(x)) · up(x)) for x (..., in), few rows, of gate, up and down; None where
    this does not suit."""
    if activation not in ACTIVATIONS or not _all_fit(x, parts[:2]) or parts[0].rows % 8:
        return None
    n, whole = x.numel() // x.size(-1), x.float().contiguous()
    if not parts[2].serves(n):
        return None
    inner, y = torch.empty(2 * n * parts[0].rows), torch.empty((*x.shape[:-1], parts[2].rows))
    with _in_use(parts):
        places = whole.data_ptr(), n, inner.data_ptr(), y.data_ptr()
        library().gated_mlp(_array(parts), ACTIVATIONS[activation], *places, torch.get_num_threads())
    return y.to(x.dtype)


def _array(parts: tuple[Part, ...]) -> Any:
    return (PartStruct * len(parts))(*(part.struct for part in parts))


def _all_fit(x: Tensor, parts: tuple[Part, ...]) -> bool:
    if not is_few(x) or not is_plain(x):
        return False
    n, size = x.numel() // x.size(-1), x.size(-1)
    return all(x.dtype in part.dtypes and part.columns == size and part.serves(n) for part in parts)


@contextmanager
def _in_use(parts: tuple[Part, ...]) -> Iterator[None]:
    around = [part.around for part in parts if part.around is not None]
    for begin, _ in around:
        begin()
    yield
    for _, end in around:
        end()


def is_few(x: Tensor) -> bool:
    """Whether x (..., in) is few rows."""
    return 0 < x.numel() <= MOST_ROWS * x.size(-1)


def is_plain(x: Tensor) -> bool:
    """Whether it is on the CPU, and nothing learns from what is computed with it."""
    # A compiler cannot follow what is asked below. Subclasses of a tensor have no memory.
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    return torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


class NormStruct(ctypes.Structure):
    """RMSNorm, as cpu.c reads it."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("eps", "more")),
        ("dtype", ctypes.c_int),
    ]


def norm_struct(weight: Tensor, eps: float, more: float = 0.0) -> NormStruct:
    """RMSNorm by weight + more."""
    return NormStruct(weight.data_ptr(), eps, more, DTYPES[weight.dtype])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x / √(mean(x²) + eps) · weight over the last dimension, in fp32, rounded once; None where this does
    not suit, or is no faster."""
    size = x.size(-1)
    if not 0 < x.numel() <= SMALL or size % 8 or not {x.dtype, weight.dtype} <= DTYPES.keys():
        return None
    if not (is_plain(x) and x.is_contiguous() and weight.is_contiguous()) or (found := library()) is None:
        return None
    y, norm = torch.empty_like(x), ctypes.byref(norm_struct(weight, eps))
    places = x.data_ptr(), y.data_ptr()
    found.rms_norm(norm, *places, x.numel() // size, size, DTYPES[x.dtype])
    return y


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "sinks", "y")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "tokens", "key_size", "value_size")),
        *((name, ctypes.c_int64) for name in ("q_stride", "key_group", "key_stride")),
        *((name, ctypes.c_int64) for name in ("value_group", "value_stride")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int) for name in ("query_dtype", "dtype")),
    ]


def heads_fit(heads: int, groups: int, *sizes: int) -> bool:
    """Whether there is code for attention with heads of these sizes, which share groups of keys."""
    sharing = heads // groups
    fits = sharing <= MOST_HEADS and max(sizes) * sharing <= MOST_QUERIES
    return fits and not any(size % 8 for size in sizes)


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor | None:
    """softmax(scale · q kᵀ) v of one token, (1, H, 1, E): q (1, H, 1, D), k (1, G, S, D), v (1, G, S, E), and
    of each head a score of a value that is zero, (H,), if there are `sinks`; in fp32, rounded once. With a
    softcap the scores are cap · tanh(scores / cap). None where this does not suit."""
    (B, H, T, D), (_, G, S, E) = q.shape, v.shape
    if B != 1 or T != 1 or not S or not heads_fit(H, G, D, E) or not is_plain(q):
        return None
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return None
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1 or (found := library()) is None:
        return None
    y = torch.empty((1, H, 1, E), dtype=q.dtype)
    sinks = None if sinks is None else sinks.float().contiguous()
    places = [None if one is None else one.data_ptr() for one in (q, k, v, sinks, y)]
    strides = q.stride(1), *k.stride()[1:3], *v.stride()[1:3]
    dtypes = [DTYPES[q.dtype]] * 2
    one = _Attention(*places, H, G, S, D, E, *strides, scale, softcap or 0.0, *dtypes)
    found.attend(ctypes.byref(one), torch.get_num_threads())
    return y


def compiled(layout: Layout | None, stored_rows: range | Tensor) -> Compiled | None:
    """None where there is no compiler, or no code for it."""
    if layout is None or not reads(layout.columns) or not len(stored_rows):
        return None
    if isinstance(stored_rows, range) and stored_rows.step != 1:
        return None
    tensors = [value for value in vars(layout).values() if isinstance(value, Tensor)]
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return None
    return Compiled(layout, stored_rows)


def reads(columns: int) -> bool:
    """Whether there is compiled code for a matrix of so many columns."""
    return columns > 0 and columns % STEP == 0 and library() is not None


def has_threads() -> bool:
    """Whether there is compiled code that uses as many threads as torch does."""
    return (found := library()) is not None and (found.has_threads() or torch.get_num_threads() == 1)


def power_of_two(number: int) -> int | None:
    """Its exponent; None for any other number."""
    return number.bit_length() - 1 if number > 0 and not number & (number - 1) else None
