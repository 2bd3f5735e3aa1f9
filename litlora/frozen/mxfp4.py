"""Weights in MXFP4, the microscaling format of 4 bits: 32 values share a power of two (Rouhani et
al. 2023, arXiv:2310.10537).

    X_blocks  uint8 (..., out, in / 32, 16): two entries in a byte, the first in the low half
    X_scales  uint8 (..., out, in / 32): W = table[entry] · 2^(scale - 127)

Leading axes, such as that of the experts of gpt-oss, are rows one after the other: expert e of a
tensor (E, out, in) is `matrix.take(range(e * out, (e + 1) * out))`. W is (out, in), where
transformers' `convert_moe_packed_tensors` returns its transpose.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from litlora.frozen.few_bits import Quantized
from litlora.frozen.methods import Storage
from litlora.frozen.stored_tensors import StoredTensors
from litlora.kernels.cpu import Layout

FP4 = tuple(sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""A sign bit, two exponent bits and one mantissa bit."""
BLOCK = 32
BIAS = 127
NOT_A_NUMBER = 255
"""The scale that stands for NaN."""


@dataclass(frozen=True)
class MXFP4(Quantized):
    """4 bits, with a power of two for each block of 32."""

    tool = "mxfp4"
    packed: Tensor
    """(out, in / 2), bytes."""
    exponents: Tensor
    """(out, in / 32), bytes."""

    @property
    def kind(self) -> str:
        return "mxfp4"

    def take(self, stored_rows: Tensor) -> "Quantized":
        """As of any matrix. One expert's rows, all or every second, are a matrix of their own, so that no
        other rows are counted, checked or read for it."""
        steps = stored_rows.diff().unique()
        if len(steps) > 1 or not isinstance(self.stored_rows, range):
            return super().take(stored_rows)
        step = int(steps[0]) if len(steps) else 1
        rows = slice(int(stored_rows[0]), int(stored_rows[-1]) + 1, step)
        parts = {"packed": self.packed[rows], "exponents": self.exponents[rows]}
        return replace(self, stored_rows=range(len(stored_rows)), **parts)

    @property
    def bits(self) -> int:
        return 4

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def stored(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "exponents": self.exponents}

    def layout(self) -> Layout:
        parts = {"entries": self.packed, "scale_bytes": self.exponents, "table": torch.tensor(FP4)}
        return Layout(format="mxfp4", columns=self.columns, **parts)

    def _largest(self) -> Tensor:
        return _powers(self.exponents.flatten()) * max(FP4)

    def _dequantised(self, first: int, last: int) -> Tensor:
        packed = self.packed[first:last]
        entries = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        table = torch.tensor(FP4, device=packed.device)
        values = table.index_select(0, entries.flatten().int()).view(last - first, -1, BLOCK)
        return values.mul_(_powers(self.exponents[first:last])[..., None]).flatten(1)


def _powers(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) in fp32; NaN where the exponent stands for it."""
    powers = torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents.int() - BIAS)
    return powers.masked_fill_(exponents == NOT_A_NUMBER, torch.nan)


def find_mxfp4(parts: StoredTensors, storage: Storage) -> None:
    """Put an MXFP4 under the name X in the place of each pair of tensors. Raises CheckpointError."""
    for name in parts.ending("_blocks"):
        parts.put(f"{name}_blocks", partial(_mxfp4, parts, name))


def _mxfp4(parts: StoredTensors, name: str) -> MXFP4:
    blocks, scales = parts.pop(f"{name}_blocks"), parts.pop(f"{name}_scales")
    is_packed = blocks.ndim >= 3 and blocks.size(-1) * 2 == BLOCK and blocks.numel() > 0
    if blocks.dtype != torch.uint8 or not is_packed:
        raise ValueError(f"{tuple(blocks.shape)} is not blocks of {BLOCK // 2} bytes")
    if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:-1]:
        raise ValueError(f"has {name}_scales {tuple(scales.shape)} that do not fit it")
    columns = blocks.size(-2) * BLOCK
    packed, exponents = blocks.reshape(-1, columns // 2), scales.reshape(-1, columns // BLOCK)
    facts = (name, parts.file(f"{name}_blocks"), parts.dtype, columns, range(len(packed)))
    return MXFP4(*facts, packed, exponents)
