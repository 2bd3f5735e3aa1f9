"""Frozen linear layers with low-rank updates: layers of one input in one autograd function, and a
gated MLP in another.

y = W x + b + s · B A x. The backward computes what trains and what lies below, and nothing else: no
gradient of W or b, and none of x where nothing below learns. It keeps the input and A x. A gated
MLP also keeps the outputs of gate and up, and computes their product again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from litlora.frozen.weight import FrozenWeight
    from litlora.lora.update import Update


class Cast(NamedTuple):
    """The factors of an update in the dtype of a computation."""

    A: Tensor
    """(r, in)."""
    Bt: Tensor
    """Bᵀ, (r, out)."""


class Layer(NamedTuple):
    """A frozen linear layer and its plain low-rank update, if it has one."""

    weight: "FrozenWeight"
    bias: Tensor | None = None
    update: "Update | None" = None
    cast: Cast | None = None
    """The update's factors as they are now, cast ahead of their uses: see `litlora.lora.casts`."""

    def in_dtype(self, dtype: torch.dtype) -> Cast | None:
        """What was cast, if it was cast to this dtype."""
        return self.cast if self.cast is not None and self.cast.A.dtype == dtype else None


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

_DERIVATIVES = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda upstream, x: torch.ops.aten.gelu_backward(upstream, x, approximate="tanh"),
    "relu": lambda upstream, x: torch.ops.aten.threshold_backward(upstream, x, 0),
    "relu2": lambda upstream, x: upstream * (2 * F.relu(x)),
}


def times(x: Tensor, weight: "FrozenWeight", bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (..., in), differentiable by x."""
    if weight.differentiable or not (torch.is_grad_enabled() and x.requires_grad):
        return weight.times(x, bias)
    return _Times.apply(x, weight, bias)


def plain_project(x: Tensor, layers: Sequence[Layer], keep: Tensor | None = None) -> list[Tensor]:
    """Each layer applied to x (..., in): a list of (..., out).

    `keep` (..., in), of ones and zeros, is the dropout mask of the updates' input; the factor
    1 / (1 - p) belongs to the scale. An update is computed in the dtype of x, as everything around
    it is; A and B keep their own.
    """
    outputs = []
    for layer in layers:
        y = times(x, layer.weight, layer.bias)
        if layer.update is not None:
            dropped = x if keep is None else x * keep
            A, B = _factors(layer, x.dtype)
            y = y + F.linear(F.linear(dropped, A) * layer.update.scale, B)
        outputs.append(y)
    return outputs


def project(x: Tensor, layers: Sequence[Layer], keep: Tensor | None = None) -> tuple[Tensor, ...]:
    """As plain_project. W and b get no gradient: they must be frozen."""
    if torch.compiler.is_compiling():  # torch 2.11's compiler: see `rms_norm`
        return tuple(plain_project(x, layers, keep))
    return _Project.apply(x, keep, layers, *_trained(layers))


def project_one(x: Tensor, layer: Layer) -> Tensor:
    """As plain_project of one layer without dropout, in place: where no gradient is needed."""
    update, y = layer.update, layer.weight.times(x, layer.bias)
    if update is not None:
        z = F.linear(x, update.A.to(x.dtype))
        if z.numel() == z.size(-1):  # one token
            y.view(-1).addmv_(update.B.to(x.dtype), z.view(-1), alpha=update.scale)
        else:
            y.view(-1, y.size(-1)).addmm_(z.view(-1, z.size(-1)), _flat_B(layer, x.dtype), alpha=update.scale)
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
    """down(activation(gate(x)) · up(x)). `keep` (..., in) is the dropout mask of the updates of
    gate and up, `keep_inner` that of down's: see plain_project."""
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
    if torch.compiler.is_compiling():
        return plain_gated_mlp(x, gate, up, down, activation, keep, keep_inner)
    layers = [gate, up, down]
    return _GatedMLP.apply(x, keep, keep_inner, activation, layers, *_trained(layers))


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """A mask like x that is 0 with probability p, a multiple of 2^-16 (see `dropout_share`), else
    1.

    It has the dtype of x: on the CPU, multiplying by a bool takes six times as long.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (torch.rand(x.shape, device=x.device) >= dropout_share(p)).to(x.dtype)
    # The CPU's generator draws one number at a time. Taking four decisions of 16 bits from each is
    # four times as fast.
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[: x.numel()] >= round(p * 2**16) - 2**15).to(x.dtype).view(x.shape)


def dropout_share(p: float) -> float:
    """The probability that dropout_mask uses for p: the nearest multiple of 2^-16."""
    return round(p * 2**16) / 2**16


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: "FrozenWeight", bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return weight.times(x, bias)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.back(_rows(upstream)).view(ctx.shape), None, None


class _Project(torch.autograd.Function):
    """`trained` are A and B of all updates: they stand in `layers` too, but autograd must see
    them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, keep: Tensor | None, layers: Sequence[Layer], *trained: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, z = _forward(_rows(x), layers, keep)
        ctx.save_for_backward(x if trained else None, keep, z)
        ctx.layers, ctx.shape = layers, x.shape
        return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in outputs)

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, z = ctx.saved_tensors
        rows = None if x is None else _rows(x)
        dx, gradients = _backward(
            [_rows(dy) for dy in upstream], rows, z, ctx.layers, keep, needs_dx=ctx.needs_input_grad[0]
        )
        return None if dx is None else dx.view(ctx.shape), None, None, *gradients


class _GatedMLP(torch.autograd.Function):
    """`trained` as in _Project."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        keep: Tensor | None,
        keep_inner: Tensor | None,
        activation: str,
        layers: list[Layer],
        *trained: Tensor,
    ) -> Tensor:
        gate, up, down = layers
        (g, u), z = _forward(_rows(x), [gate, up], keep)  # (N, inner)
        inner = ACTIVATIONS[activation](g).mul_(u)
        (y,), z_inner = _forward(inner, [down], keep_inner)
        ctx.save_for_backward(x if _adapted([gate, up]) else None, keep, keep_inner, g, u, z, z_inner)
        ctx.activation, ctx.layers, ctx.shape = activation, layers, x.shape
        return y.view(*x.shape[:-1], y.size(-1))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, keep_inner, g, u, z, z_inner = ctx.saved_tensors
        gate, up, down = ctx.layers
        activated = ACTIVATIONS[ctx.activation](g)
        inner = activated * u if down.update is not None else None
        d_inner, d_down = _backward([_rows(upstream)], inner, z_inner, [down], keep_inner, needs_dx=True)
        du = activated.mul_(d_inner)
        dg = _DERIVATIVES[ctx.activation](d_inner.mul_(u), g)
        rows = None if x is None else _rows(x)
        dx, d_first = _backward([dg, du], rows, z, [gate, up], keep, needs_dx=ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *d_first, *d_down


def _forward(x: Tensor, layers: Sequence[Layer], keep: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """Outputs (N, out) of each layer for x (N, in), and z = A x of all updates side by side,
    (N, Σ r); None without updates."""
    made: dict[str, Any] = {}
    outputs = [layer.weight.times_shared(x, layer.bias, made) for layer in layers]
    adapted = _adapted(layers)
    if not adapted:
        return outputs, None
    z = torch.mm(_dropped(x, keep), _joined_A(adapted, x.dtype).t())
    parts = iter(z.split([layer.update.rank for layer in adapted], dim=1))
    for layer, y in zip(layers, outputs, strict=True):
        if layer.update is not None:
            y.addmm_(next(parts), _flat_B(layer, x.dtype), alpha=layer.update.scale)
    return outputs, z


def _backward(
    upstream: Sequence[Tensor],
    x: Tensor | None,
    z: Tensor | None,
    layers: Sequence[Layer],
    keep: Tensor | None,
    *,
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of x (N, in), and of A and B of each update."""
    dx = None
    if needs_dx:
        for dy, layer in zip(upstream, layers, strict=True):
            dx = layer.weight.back(dy, dx)
    adapted = _adapted(layers)
    if not adapted:
        return dx, []
    ranks = [layer.update.rank for layer in adapted]
    above = [dy for dy, layer in zip(upstream, layers, strict=True) if layer.update is not None]
    dz, dB = [], []
    for dy, layer, part in zip(above, adapted, z.split(ranks, dim=1), strict=True):
        B, scale = layer.update.B, layer.update.scale
        dz.append((dy @ _flat_B(layer, dy.dtype).t()).mul_(scale))
        # (zᵀ dy)ᵀ: on the CPU dyᵀ z takes twice as long
        dB.append((part.t() @ dy).t().contiguous().to(B.dtype).mul_(scale))
    dz = dz[0] if len(dz) == 1 else torch.cat(dz, dim=1)  # (N, Σ r)
    dA = (dz.t() @ _dropped(x, keep)).split(ranks)
    if needs_dx:
        A = _joined_A(adapted, dz.dtype)
        dx = dx.addmm_(dz, A) if keep is None else dx.add_((dz @ A).mul_(_rows(keep)))
    return dx, [
        gradient
        for layer, a, b in zip(adapted, dA, dB, strict=True)
        for gradient in (a.to(layer.update.A.dtype), b)
    ]


def _adapted(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.update is not None]


def _trained(layers: Sequence[Layer]) -> list[Tensor]:
    return [factor for layer in _adapted(layers) for factor in (layer.update.A, layer.update.B)]


def _factors(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in this dtype, differentiable."""
    cast, update = layer.in_dtype(dtype), layer.update
    if cast is None:
        return update.A.to(dtype), update.B.to(dtype)
    return _CastAhead.apply(update.A, cast.A), _CastAhead.apply(update.B, cast.Bt.t())


def stacked_factors(layers: Sequence[Layer], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) of layers whose updates have one rank, in this dtype,
    differentiable."""
    casts, updates = [layer.in_dtype(dtype) for layer in layers], [layer.update for layer in layers]
    all_A, all_B = [update.A for update in updates], [update.B for update in updates]
    if None in casts:
        return torch.stack(all_A).to(dtype), torch.stack(all_B).to(dtype)
    A, B = torch.stack([cast.A for cast in casts]), torch.stack([cast.Bt.t() for cast in casts])
    return _StackedAhead.apply(A, *all_A), _StackedAhead.apply(B, *all_B)


class _CastAhead(torch.autograd.Function):
    """`tensor.to(dtype)` where its result is there already."""

    @staticmethod
    def forward(ctx, tensor: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = tensor.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.to(ctx.dtype), None


class _StackedAhead(torch.autograd.Function):
    """`torch.stack(tensors).to(dtype)` where its result is there already."""

    @staticmethod
    def forward(ctx, cast: Tensor, *tensors: Tensor) -> Tensor:
        ctx.dtype = tensors[0].dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *upstream.to(ctx.dtype).unbind()


def _joined_A(layers: Sequence[Layer], dtype: torch.dtype) -> Tensor:
    """The A of all updates, stacked: (Σ r, in). One multiplication then reads x once for all."""
    casts = (layer.in_dtype(dtype) for layer in layers)
    parts = [layer.update.A if cast is None else cast.A for layer, cast in zip(layers, casts, strict=True)]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)


def _flat_B(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Bᵀ (r, out), with long rows: on the CPU in fp32, multiplying by a narrow B takes twice as
    long."""
    cast = layer.in_dtype(dtype)
    return layer.update.B.t().contiguous().to(dtype) if cast is None else cast.Bt


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * _rows(keep)


def _rows(x: Tensor) -> Tensor:
    """(..., C) -> (N, C)."""
    return x.reshape(-1, x.size(-1))
