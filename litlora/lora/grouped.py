"""A linear layer of many experts, which differ in their weights alone, as one: each has rows of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litlora.frozen.stack import Beside, Dequantised, stacked
from litlora.kernels.grouped import fits, grouped_update
from litlora.kernels.lora import dropout_mask, stacked_factors
from litlora.lora.layer import kernel_layer, trained_bias


class GroupedLinear(NamedTuple):
    """x_i W_eᵀ + b_e + s · B_e A_e x_i, where row i belongs to expert e."""

    weights: Beside | Dequantised
    bias: Tensor | None
    """(E, out)."""
    A: Tensor | None
    """(E, r, in), in the dtype of x; None: no updates."""
    B: Tensor | None
    """(E, out, r)."""
    scale: float
    dropout: float

    def __call__(self, x: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """x (N, in), sorted by expert -> (N, out). ends (E,) int32: where each expert's rows end;
        experts (N,): the number of each row's."""
        y = self.weights.times(x, ends)
        if self.bias is not None:
            y = y + self.bias.index_select(0, experts)
        if self.A is None:
            return y
        dropped = x * dropout_mask(x, self.dropout) if self.dropout else x
        return y + grouped_update(dropped, self.A, self.B, ends, self.scale)


def grouped(
    linears: Sequence[nn.Module], together: Beside | None, dtype: torch.dtype
) -> GroupedLinear | None:
    """The layers as one, for inputs of this dtype; `together` as of `stacked`. None if they cannot be
    computed so: they train, or their updates are not plain LoRA, differ in size, or are not in all."""
    layers = [kernel_layer(linear) for linear in linears]
    if None in layers or any(trained_bias(linear) is not None for linear in linears):
        return None
    weights = stacked([layer.weight for layer in layers], together)
    if weights is None or (isinstance(weights, Beside) and layers[0].weight.dtype != dtype):
        return None
    if not all(fits(size, dtype) for size in layers[0].weight.shape):
        return None
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.stack(biases)
    updates = [layer.update for layer in layers]
    if not any(updates):
        return GroupedLinear(weights, bias, None, None, 1.0, 0.0)
    dropout = linears[0].dropout if linears[0].training else 0.0
    if None in updates or len({(update.rank, update.scale) for update in updates}) > 1:
        return None
    return GroupedLinear(weights, bias, *stacked_factors(layers, dtype), updates[0].scale, dropout)


def unwrapped(linear: nn.Module) -> nn.Module:
    """A linear layer without what adapters put around it."""
    return getattr(linear, "linear", linear)


def frozen_parameter(linear: nn.Module | None) -> nn.Parameter | None:
    """The weight of a linear layer that has or may have an adapter; None if it trains, is in few bits, or
    is divided among devices (a DTensor, which has a mesh)."""
    linear = unwrapped(linear)
    if type(linear) is not nn.Linear or hasattr(linear.weight.data, "device_mesh"):
        return None
    return None if linear.weight.requires_grad else linear.weight
