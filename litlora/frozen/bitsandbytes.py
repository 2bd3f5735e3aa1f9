"""Weights that bitsandbytes stored in 4 or 8 bits: found among a folder's tensors, and dequantised
some rows at a time.

    4 bits   X.weight                  packed entries, two a byte, the first in the high half; rows one after the other
             X.weight.absmax           the scale of every `blocksize` entries: W = table[entry] * absmax
             X.weight.quant_state.bitsandbytes__nf4 (or __fp4)    JSON as bytes: shape, dtype, blocksize
             X.weight.nested_absmax, .nested_quant_map    double quantization: absmax = map[byte] * nested_absmax + nested_offset
    8 bits   X.weight, int8 (out, in), and X.SCB (out,), the largest magnitude of every row: W = entry * SCB / 127

Everything is computed in fp32 and rounded once, to the dtype that the 4-bit format names, or to
that of the weights that were not quantized: the numbers that bitsandbytes' own dequantization
gives, bit for bit. A matrix is (out, in), also of a layer that its family stores transposed.
Sources: NF4, Dettmers et al. 2023, arXiv:2305.14314; LLM.int8(), Dettmers et al. 2022,
arXiv:2208.07339.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.storage.torch_file import LazyTensor, Memory, rows_at_a_time
from litlora.storage.untrusted import parse_json

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution, the largest magnitude being 1 (Appendix E of the paper)."""
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
"""A sign, two bits of exponent and one of mantissa."""
TABLES = {"nf4": NF4, "fp4": FP4}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What a weight may be dequantised to, by the name that a file has for it."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGEST_STATE = 4096
"""Bytes of the JSON of one weight; real ones have some 170."""
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class Quantized(LazyTensor):
    """A matrix (out, in) that is stored in few bits: `matrix[rows]` dequantises those rows."""

    name: str
    file: Path
    """Where it comes from."""
    dtype: torch.dtype
    """What it is dequantised to."""
    columns: int
    rows: range | Tensor
    """Which of the stored rows make up this matrix, and in what order: a fused layer's are divided
    among several."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What bitsandbytes calls it."""

    @abstractmethod
    def _exact(self, first: int, last: int) -> Tensor:
        """The stored rows from the first up to the last, in fp32."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), self.columns))

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def take(self, rows: Tensor) -> "Quantized":
        """The matrix of these of the stored rows, by their numbers."""
        return replace(self, rows=rows)

    def __getitem__(self, rows: slice) -> Tensor:
        """These rows, (n, in). Raises CheckpointError for numbers that are not finite: it is read
        where it is used, not before."""
        found = [self._exact(first, last).to(self.dtype) for first, last in _runs(self.rows[rows])]
        result = found[0] if len(found) == 1 else torch.cat(found)
        if not all(torch.isfinite(bound) for bound in result.aminmax()):
            raise CheckpointError(
                f"{self.file}: {self.name} holds numbers that are not finite (NaN or infinity); copy or make it again"
            )
        return result

    def blocks(
        self, memory: Memory | None = None
    ) -> Iterator[Tensor]:  # which would save nothing: what is in between is larger
        step = rows_at_a_time(self.shape, torch.float32.itemsize)
        return (self[first : first + step] for first in range(0, len(self.rows), step))

    def tensor(self) -> Tensor:
        """All of it, in memory."""
        whole, first = torch.empty(self.shape, dtype=self.dtype), 0
        for block in self.blocks():
            whole[first : first + len(block)] = block
            first += len(block)
        return whole


@dataclass(frozen=True)
class FourBit(Quantized):
    """nf4 or fp4."""

    packed: Tensor
    """Bytes."""
    table: str
    absmax: "Tensor | NestedScales"
    blocksize: int

    @property
    def kind(self) -> str:
        return self.table

    def _exact(self, first: int, last: int) -> Tensor:
        start, stop = first * self.columns, last * self.columns
        block, end = start // self.blocksize, -(-stop // self.blocksize)
        packed = self.packed[block * self.blocksize // 2 : end * self.blocksize // 2]
        # A byte's two numbers, looked up as if they were one of 8 bytes.
        entries = _pairs(self.table).index_select(0, packed.int()).view(torch.float32)
        scales = self.absmax[block:end].float()
        whole = len(entries) // self.blocksize
        entries[: whole * self.blocksize].view(whole, self.blocksize).mul_(scales[:whole, None])
        entries[whole * self.blocksize :].mul_(scales[-1])  # the last block may be shorter
        return entries[start - block * self.blocksize :][: stop - start].view(-1, self.columns)


@dataclass(frozen=True)
class NestedScales:
    """Scales that are stored in 8 bits themselves."""

    entries: Tensor
    table: Tensor
    """(256,)"""
    absmax: Tensor
    blocksize: int
    offset: float

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, blocks: slice) -> Tensor:
        outer = self.absmax[torch.arange(blocks.start, blocks.stop) // self.blocksize]
        return self.table[self.entries[blocks].int()] * outer + self.offset


@dataclass(frozen=True)
class EightBit(Quantized):
    """int8, a scale a row."""

    entries: Tensor
    """(out, in), int8."""
    largest: Tensor
    """(out,), fp32."""

    @property
    def kind(self) -> str:
        return "int8"

    def _exact(self, first: int, last: int) -> Tensor:
        return (self.entries[first:last] * self.largest[first:last, None]).mul_(1 / 127)


def _runs(rows: range | Tensor) -> list[tuple[int, int]]:
    """Row numbers as stretches without a gap, from the first up to the last."""
    if isinstance(rows, range):
        return [(rows.start, rows.stop)]
    stretches = rows.tensor_split((rows.diff() != 1).nonzero().flatten() + 1)
    return [(int(stretch[0]), int(stretch[-1]) + 1) for stretch in stretches]


def _pairs(table: str) -> Tensor:
    """(256,): the two numbers of every byte, side by side, seen as one whole number."""
    values = torch.tensor(TABLES[table])
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).view(torch.int64).flatten()


# ---- finding them


def find_quantized(tensors: Mapping[str, Tensor], where: Mapping[str, Path]) -> dict[str, Tensor | Quantized]:
    """The tensors, quantized ones with all that belongs to them as one Quantized; `where` they come
    from is told in errors.

    Raises CheckpointError, with the file's path in front, for parts that are missing or do not fit
    each other.
    """
    found: dict[str, Tensor | Quantized] = dict(tensors)
    plain = [
        tensor
        for name, tensor in tensors.items()
        if tensor.dtype in DTYPES.values() and not name.endswith(("SCB", *_SCALES))
    ]
    usual = max(plain, key=Tensor.numel).dtype if plain else torch.bfloat16  # the embedding's
    for name in tensors:
        try:
            if state := _STATE.fullmatch(name):
                weight, table = state[1], state[2]
                parts = {
                    part: _taken(found, f"{weight}.{part}") for part in _SCALES if f"{weight}.{part}" in found
                }
                found[weight] = _four_bit(
                    weight, where[name], table, _taken(found, weight), _state(_taken(found, name)), parts
                )
            elif name.endswith(".SCB"):
                weight = f"{name.removesuffix('.SCB')}.weight"
                format = found.pop(f"{weight}_format", None)
                found[weight] = _eight_bit(
                    weight, where[name], _taken(found, weight), _taken(found, name), format, usual
                )
        except ValueError as error:
            raise CheckpointError(f"{where[name]}: {name}: {error}") from None
    return found


def _taken(found: dict[str, Tensor | Quantized], name: str) -> Tensor:
    if not isinstance(tensor := found.pop(name, None), Tensor):
        raise ValueError(f"goes with {name}, which is missing")
    return tensor


def _state(tensor: Tensor) -> dict[str, Any]:
    """What the JSON says. Raises ValueError."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > LARGEST_STATE:
        raise ValueError(f"must be JSON of at most {LARGEST_STATE} bytes")
    try:
        state = parse_json(bytes(tensor.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError("must hold a JSON object")
    return state


def _four_bit(
    name: str, file: Path, table: str, weight: Tensor, state: dict[str, Any], parts: dict[str, Tensor]
) -> FourBit:
    if table not in TABLES or state.get("quant_type") != table:
        raise ValueError(
            f"quant_type {state.get('quant_type')!r} is not known; nf4 and fp4 are, in a tensor that is called so"
        )
    shape, blocksize, dtype = state.get("shape"), state.get("blocksize"), state.get("dtype")
    if not (
        type(shape) is list
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        raise ValueError(f"shape {shape!r} is none of a matrix")
    if type(blocksize) is not int or blocksize not in BLOCK_SIZES:
        raise ValueError(f"blocksize {blocksize!r} is none of {', '.join(map(str, BLOCK_SIZES))}")
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    count = shape[0] * shape[1]
    packed = (
        weight.contiguous().reshape(-1).view(torch.uint8)
    )  # some files store the bytes as if they were other numbers
    if len(packed) != -(-count // 2):
        raise ValueError(
            f"says that the weight is {shape[0]} x {shape[1]}, but it has {len(packed):,} bytes of 4-bit numbers"
        )
    if (quant_map := parts.get("quant_map")) is not None:
        standard = torch.tensor(TABLES[table])
        if quant_map.shape != standard.shape or not torch.allclose(quant_map.float(), standard, atol=5e-3):
            raise ValueError(f"quant_map is not that of {table}")
    absmax = _flat(parts, "absmax", -(-count // blocksize), quantized="nested_absmax" in parts)
    scales = _nested(absmax, state, parts) if "nested_absmax" in parts else absmax
    return FourBit(name, file, DTYPES[dtype], shape[1], range(shape[0]), packed, table, scales, blocksize)


def _nested(entries: Tensor, state: dict[str, Any], parts: dict[str, Tensor]) -> NestedScales:
    blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(blocksize) is not int or not 0 < blocksize < 2**31:
        raise ValueError(f"nested_blocksize {blocksize!r} is no size")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset {offset!r} is no finite number")
    outer = _flat(parts, "nested_absmax", -(-len(entries) // blocksize))
    return NestedScales(
        entries, _flat(parts, "nested_quant_map", 256).float(), outer.float(), blocksize, float(offset)
    )


def _flat(parts: dict[str, Tensor], part: str, count: int, *, quantized: bool = False) -> Tensor:
    """A tensor beside the weight, one of bytes if it is `quantized` itself. Raises ValueError
    unless it holds `count` numbers."""
    if (tensor := parts.get(part)) is None:
        raise ValueError(f"goes with {part}, which is missing")
    if tensor.numel() != count or (
        tensor.dtype != torch.uint8 if quantized else not tensor.is_floating_point()
    ):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{part} has {tensor.numel():,} numbers in {kind}; {count:,} in {'uint8' if quantized else 'floating point'} fit"
        )
    return tensor.contiguous().reshape(-1)


def _eight_bit(
    name: str, file: Path, weight: Tensor, largest: Tensor, format: Any, dtype: torch.dtype
) -> EightBit:
    if isinstance(format, Tensor) and (format.numel() != 1 or format.item() != 0):
        raise ValueError(
            "weight_format is one of a GPU's own layouts; save the model again with a newer bitsandbytes"
        )
    if weight.dtype != torch.int8 or weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"its weight {tuple(weight.shape)} in {str(weight.dtype).removeprefix('torch.')} is no matrix in int8"
        )
    if largest.shape != weight.shape[:1] or not largest.is_floating_point():
        raise ValueError(f"holds {largest.numel():,} scales; the weight has {weight.size(0):,} rows")
    return EightBit(name, file, dtype, weight.size(1), range(weight.size(0)), weight, largest.float())


def notice(directory: Path, tensors: Mapping[str, Tensor | LazyTensor]) -> str | None:
    """What is to be said about a base with quantized weights; None for any other."""
    quantized = [tensor for tensor in tensors.values() if isinstance(tensor, Quantized)]
    if not quantized:
        return None
    kinds, dtypes = (
        {*found}
        for found in (
            (one.kind for one in quantized),
            (str(one.dtype).removeprefix("torch.") for one in quantized),
        )
    )
    bits = "8" if kinds == {"int8"} else "4" if "int8" not in kinds else "4 and 8"
    return (
        f"{directory}: weights are stored in {bits} bits ({', '.join(sorted(kinds))}, bitsandbytes) and dequantised to "
        f"{', '.join(sorted(dtypes))}: the numbers that an adapter trained on this base (QLoRA) has seen; results hold them, not the bits"
    )
