"""Plain weights laid out for products of few rows: in the layout of the CPU's matrix units, or read by
compiled code.

A single row x reads all of W once, so the product takes as long as reading W. In bf16, oneDNN
converts a plain W to its own layout in every product, and reads it at half the speed of the memory
or less. Converted once, it reads at full speed, for one row or many. Compiled code reads W as it is, and
computes all that lies between the products of a token, too.
"""

import statistics
import time
from functools import cache

import torch
from torch import Tensor, nn

from litlora.frozen.few_rows import FewRows, few_rows, gains
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.streamed import Mapped
from litlora.frozen.weight import FrozenWeight
from litlora.kernels import cpu, cpu_build

LEAST = 1.25
"""oneDNN's layout is taken where its products are so many times as fast as compiled code's, which saves as
much between them."""
MEASURED = (4096, 2048)
"""The weights (out, in) that are multiplied to find out,"""
WEIGHTS = 4
"""so many different ones, which no cache of a core holds,"""
TURNS = 7
"""and how often each."""


class Packed(FrozenWeight):
    """W in the layout in which oneDNN multiplies few rows at a time; it is not kept in another."""

    def __init__(self, weight: Tensor) -> None:
        self._shape, self._dtype = weight.shape, weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._packed.device

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")

    def back(self, dy: Tensor, into: Tensor | None = None) -> Tensor:
        return dy @ self.rows() if into is None else into.addmm_(dy, self.rows())

    def rows(self, rows: slice = slice(None)) -> Tensor:
        return self._packed.to_dense()[rows]


def pack_linears(model: nn.Module, *, leave: str) -> None:
    """Pack the plain linear layers of a model that gain by it, but those whose names end with `leave`,
    since their weights are read. It can no longer be trained or stored. A head that shares the embedding's
    weight gets one of its own where it is packed."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FrozenLinear) and isinstance(module.storage, Mapped):
            module.storage.packed = not packs(module.storage.rows(slice(0, 1)))
        if type(module) is not nn.Linear or name.endswith(leave):
            continue
        weight = module.weight
        storage = None if packs(weight) else few_rows(weight)
        if storage is None and gains(weight):
            storage = Packed(weight)
        if storage is not None:
            model.set_submodule(name, FrozenLinear(storage, module.bias))


def packs(weight: Tensor) -> bool:
    """Whether products of few rows with such a weight are best in oneDNN's layout, on this machine."""
    if not gains(weight) or not cpu.has_threads():
        return gains(weight)
    return advantage(weight.dtype, torch.get_num_threads()) >= LEAST


@cache
def advantage(dtype: torch.dtype, threads: int) -> float:
    """How many times as fast as compiled code oneDNN multiplies one row, in its layout, by these threads."""
    name = f"onednn-{str(dtype).removeprefix('torch.')}-{threads}"
    return cpu_build.kept(name, lambda: _measured(dtype))


@torch.inference_mode()
def _measured(dtype: torch.dtype) -> float:
    plain = [few_rows(torch.full(MEASURED, 0.5, dtype=dtype)) for _ in range(WEIGHTS)]
    packed = [Packed(one.weight) for one in plain]
    x = torch.ones(1, MEASURED[1], dtype=dtype)

    def seconds(weights: list[FewRows] | list[Packed]) -> float:
        started = time.perf_counter()
        for weight in weights:
            weight.times(x)
        return time.perf_counter() - started

    seconds(plain), seconds(packed)  # the first time, threads start and kernels are made
    return statistics.median(seconds(plain) / seconds(packed) for _ in range(TURNS))
