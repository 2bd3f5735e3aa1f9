"""Cross-entropy of a frozen output head; its forward computes the gradient of the input too.

Of the tokens x vocabulary logits only one tile exists at a time, and each logit is computed once.
That works since the gradient of a token's loss is softmax - onehot, times the one factor that comes
from whatever follows the loss: nothing need be kept or computed again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from litlora.frozen.streamed import StreamedHead

    Head = Tensor | StreamedHead


class Tiles(NamedTuple):
    """How much of the tokens x vocabulary logits exists at a time."""

    rows: int
    """Tokens at most: enough for matrix multiplications at full speed."""
    elements: int
    """Logits at most: few enough for the processor's cache."""


TILES = {"cpu": Tiles(512, 2**20), "cuda": Tiles(4096, 2**26)}
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Logits at a time of a head that trains: they are computed in chunks of whole rows."""


def plain_head_loss(
    hidden: Tensor, targets: Tensor, weight: Tensor, cap: float | None = None, *, reduction: str = "sum"
) -> Tensor:
    """Σ -log softmax(hidden · weightᵀ)[target] in nats, fp32 or better; (N, C), (N,), (V, C) -> (),
    or -> (N,) with the reduction "none".

    With `cap`, the logits are cap · tanh(logits / cap) (Gemma 2).
    """
    logits = F.linear(hidden, weight)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    # fp32: exponentials and their sum lose too much in bf16
    return F.cross_entropy(logits.to(exact_dtype(logits)), targets, reduction=reduction)


class Seen(NamedTuple):
    """What the tiles of the vocabulary so far give for n tokens, in fp32 or better. The target's logit is
    kept apart from the others."""

    top: Tensor
    """(n, 1): the largest of the other logits."""
    others: Tensor
    """(n, 1): Σ exp(other logit - top)."""
    picked: Tensor
    """(n, 1): the target's logit."""
    mean: Tensor
    """(n, C): Σ exp(other logit - top) · its row of the weight."""


Tile = Callable[[Tensor, Tensor, Tensor, Seen, float | None, bool], Seen]
"""As plain_tile."""


def plain_tile(x: Tensor, part: Tensor, place: Tensor, seen: Seen, cap: float | None, needs_dx: bool) -> Seen:
    """What is known after one more tile `part` (v, C) of the weight: x (n, C); place (n, 1), where each
    target stands in it, if it does. Without `needs_dx` the mean stays."""
    z = F.linear(x, part)
    e = z.to(seen.top.dtype)
    slope = None
    if cap is not None:
        e = torch.tanh(e / cap)
        slope, e = 1 - e.square(), cap * e
    is_target = torch.arange(len(part), device=x.device) == place  # (n, v)
    picked = seen.picked + torch.where(is_target, e, 0.0).sum(dim=1, keepdim=True)
    e = e.masked_fill(is_target, torch.finfo(e.dtype).min)
    local_top = e.amax(dim=1, keepdim=True)
    top = torch.maximum(seen.top, local_top)
    shrink, local = torch.exp(seen.top - top), torch.exp(local_top - top)
    shares = torch.exp(e - local_top)
    others = seen.others * shrink + shares.sum(dim=1, keepdim=True) * local
    if not needs_dx:
        return Seen(top, others, picked, seen.mean)
    weights = (shares if slope is None else shares * slope).to(x.dtype)
    return Seen(top, others, picked, seen.mean * shrink + (weights @ part) * local)


def head_loss(
    hidden: Tensor, targets: Tensor, weight: "Head", cap: float | None = None, tile: Tile | None = None
) -> Tensor:
    """As plain_head_loss, in chunks. The weight gets no gradient: it must be frozen. `tile` is plain_tile,
    compiled; None: what is fast without a compiler."""
    return _HeadLoss.apply(hidden, targets, weight, cap, tile, True)


def head_losses(
    hidden: Tensor, targets: Tensor, weight: "Head", cap: float | None = None, tile: Tile | None = None
) -> Tensor:
    """As head_loss, of each token: (N,)."""
    return _HeadLoss.apply(hidden, targets, weight, cap, tile, False)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        targets: Tensor,
        weight: "Head",
        cap: float | None,
        tile: Tile | None,
        summed: bool,
    ) -> Tensor:
        N, V, exact = len(hidden), weight.shape[0], exact_dtype(hidden)
        limits = TILES.get(hidden.device.type, TILES["cuda"])
        # Blocks of equal size, a multiple of 32: few sizes, see litlora.kernels.buckets.
        blocks = max(1, -(-N // limits.rows))
        rows = max(1, -(-N // (32 * blocks))) * 32
        columns = -(-V // -(-V * rows // limits.elements))
        tile = _Buffers(hidden, rows * columns).tile if tile is None else tile
        result = torch.zeros(() if summed else N, dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # All are padded at once: the compiler takes a block that is a part of a tensor, and one that is
        # not, for two kinds.
        inputs, all_labels = hidden.detach(), targets[:, None]
        if spare := rows * blocks - N:
            inputs, all_labels = (F.pad(part, (0, 0, 0, spare)) for part in (inputs, all_labels))
        for start in range(0, N, rows):
            n = min(rows, N - start)
            x, labels = inputs[start : start + rows], all_labels[start : start + rows]
            losses, dx = _block_loss(x, labels, weight, cap, tile, columns, gradient is not None)
            if summed:
                result += losses[:n].sum()
            else:
                result[start : start + n] = losses[:n, 0]
            if gradient is not None:
                gradient[start : start + n] = dx[:n]
        ctx.save_for_backward(gradient)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        upstream = upstream.to(gradient.dtype)
        return gradient * (upstream[:, None] if upstream.dim() else upstream), None, None, None, None, None


class _Buffers:
    """Memory that serves all tiles: mapping fresh memory for a tile costs a fifth of its
    multiplication."""

    def __init__(self, like: Tensor, elements: int) -> None:
        exact = exact_dtype(like)
        self._logits = like.new_empty(elements)
        # The same logits in fp32 or better; the same memory if they are already.
        self._exacts = self._logits if like.dtype == exact else like.new_empty(elements, dtype=exact)

    def tile(
        self, x: Tensor, part: Tensor, place: Tensor, seen: Seen, cap: float | None, needs_dx: bool
    ) -> Seen:
        """As plain_tile, in place."""
        n, v = len(x), len(part)
        z, e = (buffer[: n * v].view(n, v) for buffer in (self._logits, self._exacts))
        top, others, picked, mean = seen
        torch.mm(x, part.t(), out=z)
        if e.dtype != z.dtype:
            e.copy_(z)
        slope = None
        if cap is not None:
            e.div_(cap).tanh_()
            slope = 1 - e.square()
            e.mul_(cap)
        inside, place = (place >= 0) & (place < v), place.clamp(0, v - 1)
        here = e.gather(1, place)
        picked = torch.where(inside, here, picked)
        e.scatter_(1, place, here.masked_fill(inside, torch.finfo(e.dtype).min))
        local_top = e.amax(dim=1, keepdim=True)
        torch.softmax(e, dim=1, out=e)
        new_top = torch.maximum(top, local_top)
        shrink = (top - new_top).exp_()
        # The most likely has the share 1 / Σ exp(e - local_top).
        local_sum = (local_top - new_top).exp_() / e.amax(dim=1, keepdim=True)
        others.mul_(shrink).add_(local_sum)
        if needs_dx:
            if slope is not None:
                e.mul_(slope)
            shares = e if e.dtype == z.dtype else z.copy_(e)
            mean.mul_(shrink).addcmul_(torch.mm(shares, part), local_sum)
        return Seen(new_top, others, picked, mean)


def _block_loss(
    x: Tensor,
    labels: Tensor,
    weight: "Head",
    cap: float | None,
    tile: Tile,
    columns: int,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of x (n, C) and their gradients (n, C), both in fp32 or better; labels (n, 1). A tile
    has so many columns of logits.

    The vocabulary passes in tiles, as keys do in flash attention, and the target's logit is kept
    apart from the others. With d = log Σ exp(other logits) - target's logit, the loss is
    log(1 + exp d), and its gradient sigmoid(d) · (others' mean row of the weight - target's row).
    This stays exact where the target is all but certain.
    """
    n, (V, C), exact = len(x), weight.shape, exact_dtype(x)
    top = x.new_full((n, 1), torch.finfo(exact).min, dtype=exact)
    mean = x.new_zeros((n, C), dtype=exact)
    seen = Seen(top, torch.zeros_like(top), torch.zeros_like(top), mean)
    for first in range(0, V, columns):
        rows = slice(first, first + columns)
        part = weight[rows] if isinstance(weight, Tensor) else weight.tile(rows, x.dtype)
        seen = tile(x, part, labels - first, seen, cap, needs_dx)
    top, others, picked, mean = seen
    d = others.log() + top - picked
    losses = torch.logaddexp(d, torch.zeros_like(d))
    own = weight[labels[:, 0]] if isinstance(weight, Tensor) else weight.picked(labels[:, 0])
    own = own.to(x.dtype).to(exact)  # the values that the logits were computed with
    if cap is not None:
        own = own * (1 - (picked / cap).square())
    return losses, mean.div_(others).sub_(own).mul_(d.sigmoid())


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that may exist at a time on this device, for a head that trains."""
    rows = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    return max(1, rows // 32 * 32 or rows)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
