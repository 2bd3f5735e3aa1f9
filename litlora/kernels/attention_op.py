"""plain_packed_attention as one operation of torch, litlora::packed_attention, for a compiler."""

from functools import cache

import torch
from torch import Tensor

from litlora.kernels.attention import Pack, plain_packed_attention


@cache
def register() -> None:
    """Make the operation known to torch. Its backward computes the forward again: no way of attention
    that a GPU's kernels have comes here."""
    define = torch.library.custom_op
    arguments = "(Tensor q, Tensor k, Tensor v, Tensor ends, int? window, float scale)"
    forward = define("litlora::packed_attention", _attend, mutates_args=(), schema=f"{arguments} -> Tensor")
    backward = define(
        "litlora::packed_attention_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor upstream, {arguments[1:]} -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(lambda q, k, v, ends, window, scale: q.new_empty(*q.shape[:-1], v.size(-1)))
    backward.register_fake(
        lambda upstream, q, k, v, ends, window, scale: tuple(x.new_empty(x.shape) for x in (q, k, v))
    )

    def keep(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.window, ctx.scale = inputs[4:]

    def back(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, ctx.window, ctx.scale)
        return *torch.ops.litlora.packed_attention_backward(upstream, *inputs), None, None, None

    forward.register_autograd(back, setup_context=keep)


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int | None, scale: float) -> Tensor:
    """`ends` is that of a `Pack`, on the host."""
    y = plain_packed_attention(q, k, v, Pack(ends.diff().tolist()), window=window, scale=scale)
    return y.contiguous()


def _backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        y = plain_packed_attention(*inputs, Pack(ends.diff().tolist()), window=window, scale=scale)
    return tuple(x.contiguous() for x in torch.autograd.grad(y, inputs, upstream))
