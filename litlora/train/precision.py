"""The dtypes in which a run holds and multiplies its weights: decided once, from the base's dtype
and a measurement.

32-true      everything in fp32
bf16-true    the base, its activations and their gradients in bf16; A and B stay in fp32
bf16-mixed   weights in fp32, matrix products in bf16 (autocast)
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from litlora.errors import UserError, setting
from litlora.frozen.linear import stored_weights
from litlora.frozen.streamed import StreamedEmbedding
from litlora.model import TransformersModel
from litlora.storage.dtypes import dtype_name

FAST = 1.2
"""bf16 counts as fast where its matrix product runs at this multiple of fp32's speed. Processors
that have bf16 are above 1.8, those that emulate it below 0.6."""


CPU = torch.device("cpu")
_ROUNDING = {
    torch.bfloat16: "the base is stored in it",
    torch.float16: "it rounds the base, which is stored in fp16; precision 32-true does not",
    torch.float32: "the base stays in fp32, in which it is stored; precision 32-true also multiplies in it",
    torch.float64: "the base is held in fp32",
}


@dataclass(frozen=True)
class Precision:
    """The precision of a run, and why it was chosen."""

    name: str
    """32-true, bf16-true or bf16-mixed."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights but A and B."""
        return torch.bfloat16 if self.name == "bf16-true" else torch.float32

    def computing(self, device: torch.device) -> AbstractContextManager:
        """The context in which the model's forward runs."""
        return torch.autocast(device.type, torch.bfloat16) if self.name == "bf16-mixed" else nullcontext()


def decide(
    asked: str,
    stored: torch.dtype,
    speedup: Callable[[], float],
    *,
    trains_base: bool,
    device: torch.device = CPU,
) -> Precision:
    """The precision that was asked for, or what auto means for a base of this dtype: the fastest
    one that does not round the base; on a GPU that has bf16, bf16 for every base, as its fp32 takes
    ten times as long.

    `speedup` measures bf16 against fp32; it is called only if its result matters. Weights that
    train stay in fp32: bf16 loses an update below 1/256 of a weight.
    """
    if asked != "auto":
        return Precision(asked, "as set")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        whole = trains_base or stored not in (torch.bfloat16, torch.float16)
        return Precision("bf16-mixed" if whole else "bf16-true", f"this GPU has bf16; {_ROUNDING[stored]}")
    if stored != torch.bfloat16:
        fp16 = stored == torch.float16
        kept = "which fp32 holds exactly and bf16 does not" if fp16 else "which bf16 would round"
        return Precision("32-true", f"the base is stored in {short(stored)}, {kept}")
    ratio = speedup()
    fast = "bf16-mixed" if trains_base else "bf16-true"
    return Precision(fast if ratio >= FAST else "32-true", f"bf16 matmul is {ratio:.1f} x fp32 here")


def bf16_speedup(device: torch.device) -> float:
    """The speed of a matrix product in bf16 as a multiple of that in fp32, on this device: the best
    of a few runs, which take milliseconds."""
    size = 4096 if device.type == "cuda" else 512
    squares = {
        dtype: torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(squares, float("inf"))
    for _ in range(5):  # in turns, so that a disturbance affects both; the first turn warms up
        for dtype, square in squares.items():
            started = time.perf_counter()
            F.linear(square, square)[0, 0].item()  # reading the value waits for the device
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's values."""
    sizes = Counter()
    for weight in (*model.parameters(), *stored_weights(model).values()):
        sizes[weight.dtype] += weight.shape.numel()
    return sizes.most_common(1)[0][0]


def count_rounded(model: nn.Module, dtype: torch.dtype) -> int:
    """How many of a model's tensors this dtype rounds. A weight that is stored otherwise is converted
    at each use."""
    weights = (*model.parameters(), *stored_weights(model).values())
    return sum(torch.promote_types(weight.dtype, dtype) != dtype for weight in weights)


def cast(model: nn.Module, dtype: torch.dtype, *, copy: bool = False) -> int:
    """Convert every weight to this dtype, what trains into memory of its own if `copy`; returns how
    many tensors that rounded. Raises UserError if `copy`, as the base trains, and one of its frozen
    weights would be rounded."""
    rounded = count_rounded(model, dtype)
    check_frozen(model, dtype, trains_base=copy)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype, copy=copy and parameter.requires_grad)
    for module in model.modules():
        if isinstance(module, StreamedEmbedding):
            module.dtype = dtype
        elif isinstance(module, TransformersModel):
            module.renew_buffers(dtype)
    return rounded


def check_frozen(model: nn.Module, dtype: torch.dtype, *, trains_base: bool) -> None:
    """Raise UserError if a weight that stays as it is in a base that trains would be rounded."""
    for name, parameter in model.named_parameters() if trains_base else ():
        if not parameter.requires_grad and torch.promote_types(parameter.dtype, dtype) != dtype:
            raise UserError(
                f"{setting('precision')} rounds {name} from {short(parameter.dtype)} to {short(dtype)}, and "
                f"{setting('freeze')} keeps it as it is; use 32-true or bf16-mixed"
            )


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bf16."""
    return dtype_name(dtype).replace("bfloat", "bf").replace("float", "fp")
