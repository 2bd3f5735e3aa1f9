"""Frozen linear layers with low-rank updates: layers of one input in one autograd function, and a
gated MLP in another.

y = W x + b + s · B A x. The backward computes what trains and what lies below, nothing else: no
gradient of W or b, none of x where nothing below learns. It keeps the input and A x; a gated MLP
keeps its gate and up, and makes their product again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    """A frozen linear layer, (out, in), and its update if it has one."""

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    """(r, in)"""
    lora_B: Tensor | None = None
    """(out, r)"""
    scale: float = 1.0


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

_DERIVATIVES = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda upstream, x: torch.ops.aten.gelu_backward(upstream, x, approximate="tanh"),
    "relu": lambda upstream, x: torch.ops.aten.threshold_backward(upstream, x, 0),
}


def plain_project(x: Tensor, layers: Sequence[Layer], keep: Tensor | None = None) -> list[Tensor]:
    """Each layer applied to x (..., in): a list of (..., out).

    `keep` (..., in), ones and zeros, is dropout's mask of what the updates see, x itself stays; 1 /
    (1 - p) is the scale's matter. The update is computed in the dtype of x, as everything around
    it; A and B stay in their own.
    """
    outputs = []
    for layer in layers:
        y = F.linear(x, layer.weight, layer.bias)
        if layer.lora_A is not None:
            dropped = x if keep is None else x * keep
            y = y + F.linear(
                F.linear(dropped, layer.lora_A.to(x.dtype)) * layer.scale, layer.lora_B.to(x.dtype)
            )
        outputs.append(y)
    return outputs


def project(x: Tensor, layers: Sequence[Layer], keep: Tensor | None = None) -> tuple[Tensor, ...]:
    """As plain_project. W and b get no gradient: they must be frozen."""
    return _Project.apply(x, keep, [layer.scale for layer in layers], *_flat(layers))


def project_one(x: Tensor, layer: Layer) -> Tensor:
    """As plain_project of one layer without dropout, in place: where no gradient is wanted."""
    y = F.linear(x, layer.weight, layer.bias)
    if layer.lora_A is not None:
        z = F.linear(x, layer.lora_A.to(x.dtype))
        if z.numel() == z.size(-1):  # one token
            y.view(-1).addmv_(layer.lora_B.to(x.dtype), z.view(-1), alpha=layer.scale)
        else:
            y.view(-1, y.size(-1)).addmm_(z.view(-1, z.size(-1)), _flat_B(layer, x.dtype), alpha=layer.scale)
    return y


def plain_gated_mlp(
    x: Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    activation: str,
    keep: Tensor | None = None,
    keep_inner: Tensor | None = None,
) -> Tensor:
    """down(activation(gate(x)) · up(x)); keep (..., in) for gate's and up's updates, keep_inner for
    down's, see plain_project."""
    g, u = plain_project(x, [gate, up], keep)
    return plain_project(ACTIVATIONS[activation](g) * u, [down], keep_inner)[0]


def gated_mlp(
    x: Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    activation: str,
    keep: Tensor | None = None,
    keep_inner: Tensor | None = None,
) -> Tensor:
    """As plain_gated_mlp. Every W and b must be frozen."""
    layers = [gate, up, down]
    return _GatedMLP.apply(x, keep, keep_inner, activation, [layer.scale for layer in layers], *_flat(layers))


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """A mask like x that is 0 with probability p, a multiple of 2^-16 (see `dropout_share`), else
    1.

    In x's dtype: on the CPU, to multiply by a bool takes six times as long.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (torch.rand(x.shape, device=x.device) >= dropout_share(p)).to(x.dtype)
    # The CPU's generator makes one number at a time: four decisions of 16 bits from each take a
    # quarter of the time.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[: x.numel()] >= round(p * 2**16) - 2**15).to(x.dtype).view(x.shape)


def dropout_share(p: float) -> float:
    """p as dropout_mask can tell it: the nearest multiple of 2^-16."""
    return round(p * 2**16) / 2**16


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, keep: Tensor | None, scales: list[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        layers = _layers(tensors, scales)
        rows = x.reshape(-1, x.size(-1))  # (N, in)
        outputs, z = _forward(rows, layers, keep)
        ctx.save_for_backward(x if _adapted(layers) else None, keep, z, *tensors)
        ctx.scales, ctx.shape = scales, x.shape
        return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in outputs)

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, z, *tensors = ctx.saved_tensors
        rows = None if x is None else x.reshape(-1, x.size(-1))
        upstream = [dy.reshape(-1, dy.size(-1)) for dy in upstream]
        dx, gradients = _backward(
            upstream, rows, z, _layers(tensors, ctx.scales), keep, needs_dx=ctx.needs_input_grad[0]
        )
        return None if dx is None else dx.view(ctx.shape), None, None, *gradients


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        keep: Tensor | None,
        keep_inner: Tensor | None,
        activation: str,
        scales: list[float],
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up, down = layers = _layers(tensors, scales)
        rows = x.reshape(-1, x.size(-1))
        (g, u), z = _forward(rows, [gate, up], keep)  # (N, inner)
        inner = ACTIVATIONS[activation](g).mul_(u)
        (y,), z_inner = _forward(inner, [down], keep_inner)
        ctx.save_for_backward(
            x if _adapted(layers[:2]) else None, keep, keep_inner, g, u, z, z_inner, *tensors
        )
        ctx.activation, ctx.scales, ctx.shape = activation, scales, x.shape
        return y.view(*x.shape[:-1], y.size(-1))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, keep_inner, g, u, z, z_inner, *tensors = ctx.saved_tensors
        gate, up, down = _layers(tensors, ctx.scales)
        activated = ACTIVATIONS[ctx.activation](g)
        inner = activated * u if _adapted([down]) else None
        d_inner, d_down = _backward(
            [upstream.reshape(-1, upstream.size(-1))], inner, z_inner, [down], keep_inner, needs_dx=True
        )
        du = activated.mul_(d_inner)
        dg = _DERIVATIVES[ctx.activation](d_inner.mul_(u), g)
        rows = None if x is None else x.reshape(-1, x.size(-1))
        dx, d_first = _backward([dg, du], rows, z, [gate, up], keep, needs_dx=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *d_first, *d_down


def _forward(x: Tensor, layers: list[Layer], keep: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Outputs (N, out) of each layer for x (N, in), and z = A x of all updates side by side, (N, Σ
    r); None without updates."""
    outputs = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    adapted = _adapted(layers)
    if not adapted:
        return outputs, None
    z = torch.mm(_dropped(x, keep), _joined_A(adapted, x.dtype).t())
    parts = iter(z.split([len(layer.lora_A) for layer in adapted], dim=1))
    for layer, y in zip(layers, outputs, strict=True):
        if layer.lora_A is not None:
            y.addmm_(next(parts), _flat_B(layer, x.dtype), alpha=layer.scale)
    return outputs, z


def _backward(
    upstream: Sequence[Tensor],
    x: Tensor | None,
    z: Tensor | None,
    layers: list[Layer],
    keep: Tensor | None,
    *,
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x (N, in) and, for each layer, of weight, bias, A and B: the first two are
    None."""
    dx = None
    if needs_dx:
        for dy, layer in zip(upstream, layers, strict=True):
            dx = dy @ layer.weight if dx is None else dx.addmm_(dy, layer.weight)
    adapted = _adapted(layers)
    if not adapted:
        return dx, [None] * (4 * len(layers))
    ranks = [len(layer.lora_A) for layer in adapted]
    parts, dz, dB = iter(z.split(ranks, dim=1)), [], []
    for dy, layer in zip(upstream, layers, strict=True):
        if layer.lora_A is not None:
            dz.append((dy @ _flat_B(layer, dy.dtype).t()).mul_(layer.scale))
            # (zᵀ dy)ᵀ: on the CPU dyᵀ z takes twice as long
            dB.append((next(parts).t() @ dy).t().contiguous().to(layer.lora_B.dtype).mul_(layer.scale))
    dz = dz[0] if len(dz) == 1 else torch.cat(dz, dim=1)  # (N, Σ r)
    dA = (dz.t() @ _dropped(x, keep)).split(ranks)
    if needs_dx:
        A = _joined_A(adapted, dz.dtype)
        dx = dx.addmm_(dz, A) if keep is None else dx.add_((dz @ A).mul_(_rows(keep)))
    found = zip(dA, dB, strict=True)
    gradients: list[Tensor | None] = []
    for layer in layers:
        a, b = next(found) if layer.lora_A is not None else (None, None)
        gradients += [None, None, a if a is None else a.to(layer.lora_A.dtype), b]
    return dx, gradients


def _adapted(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.lora_A is not None]


def _joined_A(layers: list[Layer], dtype: torch.dtype) -> Tensor:
    """The A of all updates on top of each other: (Σ r, in). One multiplication reads x once for all
    of them."""
    return (
        torch.cat([layer.lora_A for layer in layers]).to(dtype)
        if len(layers) > 1
        else layers[0].lora_A.to(dtype)
    )


def _flat_B(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Bᵀ, (r, out), with long rows: on the CPU in fp32, to multiply by a narrow B takes twice as
    long."""
    return layer.lora_B.t().contiguous().to(dtype)


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * _rows(keep)


def _rows(keep: Tensor) -> Tensor:
    return keep.reshape(-1, keep.size(-1))


def _flat(layers: Sequence[Layer]) -> list[Tensor | None]:
    return [tensor for layer in layers for tensor in layer[:4]]


def _layers(tensors: Sequence[Tensor | None], scales: list[float]) -> list[Layer]:
    return [Layer(*tensors[4 * i : 4 * i + 4], scale) for i, scale in enumerate(scales)]
