"""bitsandbytes' compiled dequantisation of nf4 on the CPU, where that package is installed: the bits
of the plain form, in a third of the time.

The library is called without importing the package: the import takes seconds, prints warnings, and
fetches code from the hub if another package is there.
"""

import ctypes
from collections.abc import Callable
from functools import cache
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


def _is_right(dequantise: Dequantise) -> bool:
    from litlora.frozen.bitsandbytes import NF4

    packed, scales = torch.arange(256, dtype=torch.uint8), torch.linspace(1e-3, 3, 8)
    values, table = torch.empty(512), torch.tensor(NF4)
    dequantise(packed, scales, values, 64)
    entries = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    return torch.equal(values, table[entries] * scales.repeat_interleave(64))
