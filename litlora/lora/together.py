"""Linear layers that have one input, computed together."""

from collections.abc import Sequence

from torch import Tensor, nn

from litlora.kernels import cpu
from litlora.kernels import lora as kernels
from litlora.lora.layer import LoRALinear, dropout_mask, fused, kernel_layer, trained_bias, with_bias


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Several linear layers of one input x (..., in): a tuple of (..., out). Frozen ones go through
    one fused function.

    In training, their updates share one dropout mask of x, and hooks of the modules do not run.
    """
    layers = _fusable(x, linears, sharing=linears)
    if layers is None:
        found = cpu.project(x, parts) if (parts := _parts(x, linears)) else None
        return found or tuple(linear(x) for linear in linears)
    outputs = kernels.project(x, layers, dropout_mask(x, linears))
    return tuple(with_bias(y, linear) for y, linear in zip(outputs, linears, strict=True))


def gated_mlp(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module, activation: str) -> Tensor:
    """down(activation(gate(x)) · up(x)) for three linear layers, in one fused function if they are
    frozen."""
    layers = _fusable(x, (gate, up, down), sharing=(gate, up))
    if layers is None and (parts := _parts(x, (gate, up, down))):
        if (y := cpu.gated_mlp(x, parts, activation)) is not None:
            return y
    if layers is None or any(trained_bias(linear) is not None for linear in (gate, up, down)):
        g, u = project(x, gate, up)
        return project(kernels.ACTIVATIONS[activation](g) * u, down)[0]
    keep = dropout_mask(x, (gate, up))
    keep_inner = dropout_mask(x.new_empty(*x.shape[:-1], down.in_features), (down,))
    return kernels.gated_mlp(x, *layers, activation, keep, keep_inner)


def _parts(x: Tensor, linears: Sequence[nn.Module]) -> tuple[cpu.Part, ...] | None:
    """The layers for compiled code, if x (..., in) is few rows and there is code for all of them."""
    if not (cpu.is_few(x) and cpu.is_plain(x)):
        return None
    parts = tuple(getattr(linear, "part", None) for linear in linears)
    return None if None in parts else parts


def _fusable(
    x: Tensor, linears: Sequence[nn.Module], *, sharing: Sequence[nn.Module]
) -> list[kernels.Layer] | None:
    """The layers, if one fused function can compute them all; those in `sharing` share a dropout
    mask."""
    if not fused(x) or len({linear.dropout for linear in sharing if type(linear) is LoRALinear}) > 1:
        return None
    layers = [kernel_layer(linear) for linear in linears]
    return None if None in layers else layers
