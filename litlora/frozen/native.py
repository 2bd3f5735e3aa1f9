"""bitsandbytes' compiled dequantisation of 4 bits, where that package is installed: the bits of the plain
form. On the CPU it takes a third of the time for nf4; on a GPU it is one kernel that writes the dtype asked
for.

On the CPU the library is called without importing the package: the import takes seconds, prints warnings,
and fetches code from the hub if another package is there. On a GPU its operations need it.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TESTED = ("0.50.",)
"""Versions whose function takes the arguments that it gets here."""

Dequantise = Callable[[Tensor, Tensor, Tensor, int], None]
"""(packed bytes, scales in fp32, where the fp32 values go, block size), all contiguous and on the
CPU; whole blocks only."""

DequantiseInto = Callable[[Tensor, Tensor, Tensor, str, int], None]
"""(packed bytes, scales in fp32, W in 16 or 32 bits, nf4 or fp4, block size), all contiguous and on the
device."""


@cache
def nf4_of_bitsandbytes() -> Dequantise | None:
    """None where there is none, or where its values are not those of the table."""
    try:
        if not version("bitsandbytes").startswith(TESTED):
            return None
        (place,) = find_spec("bitsandbytes").submodule_search_locations
        function = ctypes.CDLL(str(Path(place) / "libbitsandbytes_cpu.so")).cdequantize_blockwise_cpu_nf4_fp32
    except (PackageNotFoundError, OSError, AttributeError, ValueError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3, None

    def dequantise(packed: Tensor, scales: Tensor, values: Tensor, blocksize: int) -> None:
        # Each block is a row: the function counts the scales of a row from its start.
        pointers = (tensor.data_ptr() for tensor in (packed, scales, values))
        function(*pointers, blocksize, values.numel() // blocksize, blocksize)

    return dequantise if _is_right(dequantise) else None


@cache
def four_bit_on(device: torch.device) -> DequantiseInto | None:
    """bitsandbytes' kernel for this GPU; None where there is none, or where its values are not those of
    the table."""
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        return None
    try:
        import_module("bitsandbytes")  # which registers its operations
        operation = torch.ops.bitsandbytes.dequantize_4bit.out
    except Exception:  # its import fails in as many ways as there are devices
        return None

    def dequantise(packed: Tensor, scales: Tensor, W: Tensor, table: str, blocksize: int) -> None:
        operation(packed, scales, blocksize, table, W.shape, W.dtype, out=W)

    return dequantise if is_right_on(device, dequantise) else None


def is_right_on(device: torch.device, dequantise: DequantiseInto) -> bool:
    """Whether the values are those of the table, on this device."""
    packed, scales, values = _samples()
    W = torch.empty(len(scales), 64, device=device)
    dequantise(packed.to(device), scales.to(device), W, "nf4", 64)
    return torch.equal(W.flatten().cpu(), values)


def _is_right(dequantise: Dequantise) -> bool:
    packed, scales, values = _samples()
    dequantise(packed, scales, found := torch.empty(len(values)), 64)
    return torch.equal(found, values)


def _samples() -> tuple[Tensor, Tensor, Tensor]:
    """Every byte of nf4, the scales of blocks of 64, and the values of both."""
    from litlora.frozen.bitsandbytes import NF4

    packed, scales = torch.arange(256, dtype=torch.uint8), torch.linspace(1e-3, 3, 8)
    entries = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    return packed, scales, torch.tensor(NF4)[entries] * scales.repeat_interleave(64)
