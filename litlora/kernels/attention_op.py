"""plain_packed_attention as one operation of torch, litlora::packed_attention, for a compiler."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from litlora.kernels.attention import QUERIES, Pack, plain_packed_attention
from litlora.kernels.cross_entropy import exact_dtype


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
    backward.register_fake(lambda upstream, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))

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
    """In blocks of queries: with p = softmax(s), the gradient of the scores s is
    p · (dp - Σ p · dp)."""
    (_, H, _, D), G, exact = q.shape, k.size(1), exact_dtype(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
    bounds = ends.tolist()
    for start, end in pairwise(bounds):
        for i in range(start, end, QUERIES):
            j = min(end, i + QUERIES)
            first = start if window is None else max(start, i - window + 1)
            own, seen = slice(i, j), slice(first, j)
            # Queries that share a key become rows of one matrix.
            x, up = (part[0, :, own].reshape(G, H // G * (j - i), -1).to(exact) for part in (q, upstream))
            key, value = (part[0, :, seen].to(exact) for part in (k, v))
            sees = torch.ones(j - i, j - first, dtype=torch.bool, device=q.device).tril(i - first)
            if window is not None:
                sees = sees.triu(i - first - window + 1)
            scores = (x @ key.mT * scale).view(G, H // G, j - i, j - first)
            p = scores.masked_fill(~sees, -torch.inf).softmax(-1).view(G, -1, j - first)
            dp = up @ value.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            dq[0, :, own] = (ds @ key).view(H, j - i, D)
            dk[0, :, seen] += ds.mT @ x
            dv[0, :, seen] += p.mT @ up
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
