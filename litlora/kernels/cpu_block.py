"""Blocks of a model for one token of each of a few sequences, by one call of compiled code (cpu_block.h).
The results are those of the operations one by one, to the bit."""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from litlora.kernels import cpu
from litlora.kernels.cpu_build import library

MOST_HEAD = 512
"""Numbers of a head."""


class Norm(NamedTuple):
    """RMSNorm over the last dimension, by weight + more."""

    weight: Tensor
    eps: float
    more: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a block computes, beside its layers and norms."""

    heads: int
    groups: int
    head_size: int
    scale: float
    """Of the scores,"""
    softcap: float | None
    """and their cap."""
    multiplier: float | None
    """Of what attention and the MLP give."""
    interleaved: bool
    """Whether the pairs that turn are neighbours."""
    together: bool
    """Whether all heads are normalised as one."""
    activation: str

    @property
    def is_known(self) -> bool:
        """Whether there is code for it."""
        fits = self.head_size <= MOST_HEAD and cpu.heads_fit(self.heads, self.groups, self.head_size)
        return fits and self.activation in cpu.ACTIVATIONS


class Held(NamedTuple):
    """What a sequence holds for a block."""

    keys: Tensor
    """(1, G, room, D), contiguous, with room for one more token,"""
    values: Tensor
    """the same,"""
    length: int
    """how many tokens are there,"""
    first: int
    """and the first that the new one sees."""


class _Block(ctypes.Structure):
    _fields_ = [
        ("parts", cpu.PartStruct * 7),
        ("norms", cpu.NormStruct * 6),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "groups", "head_size")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "multiplier")),
        *((name, ctypes.c_int) for name in ("interleaved", "together", "activation", "dtype")),
    ]


class _Sequence(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("rotated", "room", "length", "first")),
    ]


class Block:
    """A block whose layers are q, k, v, o, gate, up and down, and whose norms those of the input, of queries
    and keys, of what attention gives, of the MLP's input and of what it gives."""

    def __init__(
        self, shape: Shape, parts: Sequence[cpu.Part], norms: Sequence[Norm | None], dtype: torch.dtype
    ) -> None:
        """For x of this dtype; None: there is no such norm. It serves as long as `is_of` says so, and does
        not keep what it was made of: a layer may have factors of an adapter that is taken off."""
        self._made_of = [weakref.ref(part) for part in parts], self._places(norms), dtype
        numbers = ("heads", "groups", "head_size", "scale", "interleaved", "together")
        self._struct = _Block(
            parts=tuple(part.struct for part in parts),
            norms=tuple(cpu.NormStruct() if norm is None else cpu.norm_struct(*norm) for norm in norms),
            hidden=parts[0].columns,
            softcap=shape.softcap or 0.0,
            multiplier=1.0 if shape.multiplier is None else shape.multiplier,
            activation=cpu.ACTIVATIONS[shape.activation],
            dtype=cpu.DTYPES[dtype],
            **{name: getattr(shape, name) for name in numbers},
        )
        self.address = ctypes.addressof(self._struct)
        self.memory = library().block_memory(self.address, 1)
        """Numbers that it needs memory for, of one sequence."""

    @staticmethod
    def _places(norms: Sequence[Norm | None]) -> list[int | None]:
        return [None if norm is None else norm.weight.data_ptr() for norm in norms]

    def is_of(self, parts: Sequence[cpu.Part], norms: Sequence[Norm | None], dtype: torch.dtype) -> bool:
        """Whether it was made of these very layers and norms."""
        own_parts, places, own = self._made_of
        same = own == dtype and all(a() is b for a, b in zip(own_parts, parts, strict=True))
        return same and places == self._places(norms)


def through(
    x: Tensor, blocks: Sequence[Block], held: Sequence[Held], ropes: Sequence[tuple[Tensor, Tensor] | None]
) -> Tensor:
    """x (B, 1, C) of B sequences -> (B, 1, C). `held`: what they hold of the first block, then of the others;
    the new token's keys and values are put there. `ropes`: each block's rotations (B, ..., R), in the dtype
    of x."""
    B = x.size(0)
    assert all(own.keys.dtype == own.values.dtype == x.dtype for own in held[:B])
    sequences = (_Sequence * len(held))(
        *(
            _Sequence(
                own.keys.data_ptr(),
                own.values.data_ptr(),
                *_rotation(ropes[number // B], number % B),
                own.keys.size(2),
                own.length,
                own.first,
            )
            for number, own in enumerate(held)
        )
    )
    addresses = (ctypes.c_void_p * len(blocks))(*(block.address for block in blocks))
    y, memory = torch.empty_like(x), torch.empty(B * max(block.memory for block in blocks))
    places = x.data_ptr(), y.data_ptr(), memory.data_ptr()
    library().blocks(addresses, len(blocks), sequences, B, *places, torch.get_num_threads())
    return y


def _rotation(rope: tuple[Tensor, Tensor] | None, row: int) -> tuple[int | None, int | None, int]:
    """Where the cosines and sines of a row are, and how many."""
    if rope is None:
        return None, None, 0
    cos, sin = rope
    size = cos.size(-1)
    step = row * size * cos.element_size()
    return cos.data_ptr() + step, sin.data_ptr() + step, size


def suits(x: Tensor) -> bool:
    """Whether x (B, T, C) is one token of each of few sequences, and nothing learns from it."""
    one = x.ndim == 3 and x.size(1) == 1 and x.dtype in cpu.DTYPES
    return one and cpu.is_few(x) and cpu.is_plain(x) and x.is_contiguous()
