"""Weights that bitsandbytes stored in 4 or 8 bits: found among a folder's tensors, and dequantised
some rows at a time.

    4 bits   X.weight          packed entries, row by row, two in a byte, the first in the high half
             X.weight.absmax   the scale of each block of entries: W = table[entry] * absmax
             X.weight.quant_state.bitsandbytes__nf4 (or __fp4)
                               JSON as bytes: shape, dtype, blocksize
             X.weight.nested_absmax, .nested_quant_map
                               double quantization: absmax = map[byte] * nested_absmax +
                               nested_offset
    8 bits   X.weight          int8 (out, in)
             X.SCB             (out,), the largest magnitude in each row: W = entry * SCB / 127

Everything is computed in fp32 and rounded once, to the dtype that the 4-bit format names, or to the
dtype of the weights that are not quantized. The values equal those of bitsandbytes' own
dequantisation bit for bit. A matrix is (out, in), even for a layer that its family stores
transposed. Sources: NF4, Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.frozen.few_bits import Quantized
from litlora.frozen.native import four_bit_on, nf4_of_bitsandbytes
from litlora.kernels.cpu import STEP, Layout, power_of_two
from litlora.storage.dtypes import dtype_name
from litlora.storage.untrusted import parse_json

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution, scaled to a largest magnitude of 1 (Appendix E of the
paper)."""
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
"""A sign bit, two exponent bits and one mantissa bit."""
TABLES = {"nf4": NF4, "fp4": FP4}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What a weight may be dequantised to, by its name in a file."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE_BYTES = 4096
"""The JSON of one weight; real ones have about 170 bytes."""
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class FourBit(Quantized):
    """nf4 or fp4."""

    packed: Tensor
    """Bytes, two entries in each."""
    table: str
    absmax: "Tensor | NestedScales"
    blocksize: int

    @property
    def kind(self) -> str:
        return self.table

    @property
    def bits(self) -> int:
        return 4

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def stored(self) -> dict[str, Tensor]:
        scales = {"absmax": self.absmax} if isinstance(self.absmax, Tensor) else {}
        return {"packed": self.packed, **scales}

    def layout(self) -> Layout | None:
        shift = power_of_two(self.blocksize)
        if shift is None or self.blocksize < STEP:
            return None
        table, absmax = torch.tensor(TABLES[self.table]), self.absmax
        common: dict[str, Any] = {
            "columns": self.columns,
            "entries": self.packed,
            "table": table,
            "shift": shift,
        }
        if isinstance(absmax, Tensor):
            return Layout(format="four_bits", scales=absmax.float().contiguous(), **common)
        if (outer_shift := power_of_two(absmax.blocksize)) is None:
            return None
        return Layout(
            format="four_bits_nested",
            **common,
            scale_bytes=absmax.entries,
            outer_table=absmax.table.float().contiguous(),
            scales=absmax.absmax.float().contiguous(),
            outer_shift=outer_shift,
            offset=absmax.offset,
        )

    def write_to(self, W: Tensor) -> None:
        rows, size = self.stored_rows, self.blocksize
        once = self.dtype in (W.dtype, torch.float32)  # the kernel rounds to the dtype of W, and no other
        dequantise = four_bit_on(self.device) if once else None
        start, stop = (rows.start * self.columns, rows.stop * self.columns) if type(rows) is range else (1, 1)
        if dequantise is None or start % size or stop % 2:
            return super().write_to(W)
        scales = self.absmax[start // size : -(-stop // size)].float().contiguous()
        dequantise(self.packed[start // 2 : stop // 2].contiguous(), scales, W, self.table, size)

    def _largest(self) -> Tensor:
        return self.absmax[0 : len(self.absmax)].float()  # the largest entry of both tables is 1

    def _dequantised(self, first: int, last: int) -> Tensor:
        start, stop = first * self.columns, last * self.columns
        block, end = start // self.blocksize, -(-stop // self.blocksize)
        packed = self.packed[block * self.blocksize // 2 : end * self.blocksize // 2]
        scales = self.absmax[block:end].float()
        values = self._native(packed, scales)
        if values is None:
            # The two values of a byte are looked up as one entry of 8 bytes.
            values = _pairs(self.table, packed.device).index_select(0, packed.int()).view(torch.float32)
            whole = len(values) // self.blocksize
            values[: whole * self.blocksize].view(whole, self.blocksize).mul_(scales[:whole, None])
            values[whole * self.blocksize :].mul_(scales[-1])  # the last block may be shorter
        return values[start - block * self.blocksize :][: stop - start].view(-1, self.columns)

    def _native(self, packed: Tensor, scales: Tensor) -> Tensor | None:
        """The values of whole blocks by bitsandbytes' own code; None if that cannot be used."""
        # Its fast form is off in the last bits of larger blocks.
        usable = self.table == "nf4" and packed.device.type == "cpu" and self.blocksize <= 1024
        if not usable or len(packed) * 2 != len(scales) * self.blocksize:
            return None
        if (dequantise := nf4_of_bitsandbytes()) is None:
            return None
        values = torch.empty(len(packed) * 2)
        dequantise(packed.contiguous(), scales.contiguous(), values, self.blocksize)
        return values


@dataclass(frozen=True)
class NestedScales:
    """Scales that are themselves stored in 8 bits."""

    entries: Tensor
    table: Tensor
    """(256,)"""
    absmax: Tensor
    blocksize: int
    offset: float

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, blocks: slice) -> Tensor:
        numbers = torch.arange(blocks.start, blocks.stop, device=self.absmax.device)
        outer = self.absmax[numbers // self.blocksize]
        return self.table[self.entries[blocks].int()] * outer + self.offset


@dataclass(frozen=True)
class EightBit(Quantized):
    """int8, with one scale for each row."""

    entries: Tensor
    """(out, in), int8."""
    largest: Tensor
    """(out,), fp32."""

    @property
    def kind(self) -> str:
        return "int8"

    @property
    def device(self) -> torch.device:
        return self.entries.device

    def stored(self) -> dict[str, Tensor]:
        return {"entries": self.entries, "largest": self.largest}

    def layout(self) -> Layout:
        sizes = {"columns": self.columns, "row_bytes": self.columns}
        return Layout(format="int8", entries=self.entries, scales=self.largest, **sizes)

    def _largest(self) -> Tensor:
        return self.largest * (128 / 127)

    def _dequantised(self, first: int, last: int) -> Tensor:
        return (self.entries[first:last] * self.largest[first:last, None]).mul_(1 / 127)


def _pairs(table: str, device: torch.device) -> Tensor:
    """(256,): the two fp32 values of every byte, side by side, as one int64."""
    values = torch.tensor(TABLES[table], device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).view(torch.int64).flatten()


# ---- finding them


def find_quantized(tensors: Mapping[str, Tensor], where: Mapping[str, Path]) -> dict[str, Tensor | Quantized]:
    """The tensors, with each quantized weight and its parts replaced by one Quantized.

    `where` is the file of each tensor. Raises CheckpointError, with that path in front, for parts
    that are missing or contradict each other.
    """
    found: dict[str, Tensor | Quantized] = dict(tensors)
    dtype = _plain_dtype(tensors)
    for name in tensors:
        try:
            if state := _STATE.fullmatch(name):
                found[state[1]] = _four_bit(found, where[name], state[1], state[2])
            elif name.endswith(".SCB"):
                weight = f"{name.removesuffix('.SCB')}.weight"
                found[weight] = _eight_bit(found, where[name], weight, dtype)
        except ValueError as error:
            raise CheckpointError(f"{where[name]}: {name}: {error}") from None
    return found


def _plain_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the largest tensor that is not quantized, usually the embedding."""
    plain = [
        tensor
        for name, tensor in tensors.items()
        if tensor.dtype in DTYPES.values() and not name.endswith(("SCB", *_SCALES))
    ]
    return max(plain, key=Tensor.numel).dtype if plain else torch.bfloat16


def _pop(found: dict[str, Tensor | Quantized], name: str) -> Tensor:
    if not isinstance(tensor := found.pop(name, None), Tensor):
        raise ValueError(f"goes with {name}, which is missing")
    return tensor


def _four_bit(found: dict[str, Tensor | Quantized], file: Path, name: str, table: str) -> FourBit:
    """Take a weight and its parts out of `found`. Raises ValueError."""
    parts = {part: _pop(found, f"{name}.{part}") for part in _SCALES if f"{name}.{part}" in found}
    weight = _pop(found, name)
    state = _state(_pop(found, f"{name}.quant_state.bitsandbytes__{table}"))
    if table not in TABLES or state.get("quant_type") != table:
        raise ValueError(
            f"quant_type {state.get('quant_type')!r} is not supported; it must be nf4 or fp4, as in the "
            "tensor's name"
        )
    (rows, columns), blocksize, dtype = _shape(state), state.get("blocksize"), state.get("dtype")
    if type(blocksize) is not int or blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocksize {blocksize!r} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    count = rows * columns
    packed = weight.contiguous().reshape(-1).view(torch.uint8)  # some files store the bytes in another dtype
    if len(packed) != -(-count // 2):
        raise ValueError(
            f"says that the weight is {rows} x {columns}, but it has {len(packed):,} bytes of 4-bit values"
        )
    if (quant_map := parts.get("quant_map")) is not None:
        standard = torch.tensor(TABLES[table])
        if quant_map.shape != standard.shape or not torch.allclose(quant_map.float(), standard, atol=5e-3):
            raise ValueError(f"quant_map is not that of {table}")
    is_nested = "nested_absmax" in parts
    absmax = _flat(parts, "absmax", -(-count // blocksize), quantized=is_nested)
    scales = _nested(absmax, state, parts) if is_nested else absmax
    return FourBit(name, file, DTYPES[dtype], columns, range(rows), packed, table, scales, blocksize)


def _state(tensor: Tensor) -> dict[str, Any]:
    """The JSON object in a tensor of bytes. Raises ValueError."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > MAX_STATE_BYTES:
        raise ValueError(f"must be JSON of at most {MAX_STATE_BYTES} bytes")
    try:
        state = parse_json(bytes(tensor.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError("must hold a JSON object")
    return state


def _shape(state: dict[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    is_matrix = type(shape) is list and len(shape) == 2
    if not is_matrix or any(type(size) is not int or not 0 < size < 2**31 for size in shape):
        raise ValueError(f"shape {shape!r} is not that of a matrix")
    return shape[0], shape[1]


def _nested(entries: Tensor, state: dict[str, Any], parts: dict[str, Tensor]) -> NestedScales:
    blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(blocksize) is not int or not 0 < blocksize < 2**31:
        raise ValueError(f"nested_blocksize {blocksize!r} is not a block size")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset {offset!r} is not a finite number")
    outer = _flat(parts, "nested_absmax", -(-len(entries) // blocksize)).float()
    table = _flat(parts, "nested_quant_map", 256).float()
    return NestedScales(entries, table, outer, blocksize, float(offset))


def _flat(parts: dict[str, Tensor], part: str, count: int, *, quantized: bool = False) -> Tensor:
    """A part of a weight, as a vector; of bytes if it is `quantized` itself. Raises ValueError
    unless it has `count` values."""
    if (tensor := parts.get(part)) is None:
        raise ValueError(f"goes with {part}, which is missing")
    fits = tensor.dtype == torch.uint8 if quantized else tensor.is_floating_point()
    if tensor.numel() != count or not fits:
        raise ValueError(
            f"{part} has {tensor.numel():,} values in {dtype_name(tensor.dtype)}; it needs {count:,} in "
            f"{'uint8' if quantized else 'floating point'}"
        )
    return tensor.contiguous().reshape(-1)


def _eight_bit(found: dict[str, Tensor | Quantized], file: Path, name: str, dtype: torch.dtype) -> EightBit:
    """Take a weight and its parts out of `found`. Raises ValueError."""
    layout = found.pop(f"{name}_format", None)
    weight, largest = _pop(found, name), _pop(found, f"{name.removesuffix('.weight')}.SCB")
    if isinstance(layout, Tensor) and (layout.numel() != 1 or layout.item() != 0):
        raise ValueError(
            "weight_format is a layout for GPUs; save the model again with a newer version of bitsandbytes"
        )
    if weight.dtype != torch.int8 or weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"its weight {tuple(weight.shape)} in {dtype_name(weight.dtype)} is not a matrix in int8"
        )
    if largest.shape != weight.shape[:1] or not largest.is_floating_point():
        raise ValueError(f"holds {largest.numel():,} scales; the weight has {weight.size(0):,} rows")
    return EightBit(name, file, dtype, weight.size(1), range(weight.size(0)), weight, largest.float())
