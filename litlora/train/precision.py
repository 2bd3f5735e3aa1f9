"""--precision: what the weights of a run are held in and multiplied in, decided once, from the
base's dtype and a measurement.

32-true      all in fp32
bf16-true    the base, its activations and their gradients in bf16; A and B stay in fp32
bf16-mixed   weights in fp32, matrix products in bf16 (autocast)
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FAST = 1.2
"""bf16 counts as fast where its matrix product runs at this multiple of fp32's speed: there is a
wide gap between processors that have it (above 1.8) and those that emulate it (below 0.6)."""


@dataclass(frozen=True)
class Precision:
    """What a run computes in, and why."""

    name: str
    """32-true, bf16-true or bf16-mixed."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, A and B excepted."""
        return torch.bfloat16 if self.name == "bf16-true" else torch.float32

    def computing(self, device: torch.device) -> AbstractContextManager:
        """The context in which the model's forward runs."""
        return torch.autocast(device.type, torch.bfloat16) if self.name == "bf16-mixed" else nullcontext()


def decide(asked: str, stored: torch.dtype, speedup: Callable[[], float], *, trains_base: bool) -> Precision:
    """The precision that was asked for, or what auto means for a base of this dtype: fast, but
    never rounding a base unasked.

    `speedup` measures bf16 against fp32; it is called only if that decides. Weights that train stay
    in fp32: in bf16 an update below 1/256 of a weight is lost.
    """
    if asked != "auto":
        return Precision(asked, "as asked")
    if stored != torch.bfloat16:
        kept = (
            "which fp32 holds exactly and bf16 does not"
            if stored == torch.float16
            else "which bf16 would round"
        )
        return Precision("32-true", f"the base is stored in {short(stored)}, {kept}")
    ratio = speedup()
    fast = "bf16-mixed" if trains_base else "bf16-true"
    return Precision(fast if ratio >= FAST else "32-true", f"bf16 matmul is {ratio:.1f} x fp32 here")


def bf16_speedup(device: torch.device) -> float:
    """How many times as fast as in fp32 a layer multiplies in bf16 on this device: the best of a
    few runs, some milliseconds in all."""
    size = 4096 if device.type == "cuda" else 512
    squares = {
        dtype: torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(squares, float("inf"))
    for _ in range(5):  # in turns, so that a disturbance meets both; the first time warms up
        for dtype, square in squares.items():
            started = time.perf_counter()
            F.linear(square, square)[0, 0].item()  # reading a number waits for it, on every kind of device
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of a model's numbers have."""
    sizes = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def cast(model: nn.Module, dtype: torch.dtype, *, copy: bool = False) -> int:
    """Give every weight this dtype, memory of its own too if `copy`; returns how many tensors were
    rounded on the way."""
    rounded = 0
    for parameter in model.parameters():
        rounded += torch.promote_types(parameter.dtype, dtype) != dtype
        parameter.data = parameter.data.to(dtype, copy=copy)
    return rounded


class Within(nn.Module):
    """A module whose forward runs in contexts, entered afresh each time."""

    def __init__(self, module: nn.Module, *contexts: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.module = module
        self.contexts = contexts

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            return self.module(*inputs, **options)


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bf16."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
