"""Frozen weights of one shape as one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from litlora.frozen.dense import Dense
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.scratch import scratch
from litlora.frozen.weight import FrozenWeight
from litlora.kernels.grouped import grouped_back, grouped_linear


class Beside:
    """Weights that were put beside each other in memory: (E, out, in)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Lets the weights, all of one shape, be parts of one tensor."""
        self._weights, self._values = list(weights), torch.stack([weight.data for weight in weights])
        for weight, part in zip(weights, self._values, strict=True):
            weight.data = part

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are still the weights, with the values that lie here: a copy of the model, or a
        merge, has others."""
        if any(weight is not own for weight, own in zip(weights, self._weights, strict=True)):
            return False
        if torch.compiler.is_compiling():  # which guards that they stay, and knows no address
            return True
        step, start = self._values.stride(0) * self._values.element_size(), self._values.data_ptr()
        return all(weight.data_ptr() == start + place * step for place, weight in enumerate(weights))

    def times(self, x: Tensor, ends: Tensor) -> Tensor:
        """x_i W_eᵀ: as `grouped_linear`."""
        return grouped_linear(x, self._values, ends)


class Dequantised:
    """Weights in few bits, whose values are computed beside each other for each use."""

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        self._weights = weights

    def values(self, dtype: torch.dtype) -> Tensor:
        """(E, out, in), valid until this thread asks for another weight."""
        first = self._weights[0]
        W = scratch((len(self._weights), *first.shape), dtype, first.device)
        for part, weight in zip(W, self._weights, strict=True):
            weight.matrix.write_to(part)
        return W

    def times(self, x: Tensor, ends: Tensor) -> Tensor:
        """x_i W_eᵀ: as `grouped_linear`, differentiable by x."""
        return _Times.apply(x, ends, self)


def stacked(weights: Sequence[FrozenWeight], together: Beside | None) -> Beside | Dequantised | None:
    """The weights as one; None if they cannot be. `together` is where they were once put beside each
    other."""
    if all(isinstance(weight, QuantizedWeight) for weight in weights):
        return Dequantised(weights) if len({weight.shape for weight in weights}) == 1 else None
    if together is None or not all(isinstance(weight, Dense) for weight in weights):
        return None
    return together if together.holds([weight.weight for weight in weights]) else None


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ends: Tensor, weights: Dequantised) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.weights = weights
        return grouped_linear(x, weights.values(x.dtype), ends)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (ends,) = ctx.saved_tensors
        return grouped_back(upstream, ctx.weights.values(upstream.dtype), ends), None, None
