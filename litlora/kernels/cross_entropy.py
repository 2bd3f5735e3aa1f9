"""Cross-entropy of a frozen output head; its forward computes the gradient of the input too.

Of the tokens x vocabulary logits only one tile exists at a time, and each logit is computed once.
That works since the gradient of a token's loss is softmax - onehot, times the one factor that comes
from whatever follows the loss: nothing need be kept or computed again.
"""

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


def head_loss(hidden: Tensor, targets: Tensor, weight: "Head", cap: float | None = None) -> Tensor:
    """As plain_head_loss, in chunks. The weight gets no gradient: it must be frozen."""
    return _HeadLoss.apply(hidden, targets, weight, cap, True)


def head_losses(hidden: Tensor, targets: Tensor, weight: "Head", cap: float | None = None) -> Tensor:
    """As head_loss, of each token: (N,)."""
    return _HeadLoss.apply(hidden, targets, weight, cap, False)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, targets: Tensor, weight: "Head", cap: float | None, summed: bool
    ) -> Tensor:
        N, V, exact = len(hidden), weight.shape[0], exact_dtype(hidden)
        limits = TILES.get(hidden.device.type, TILES["cuda"])
        # Blocks of equal size, a multiple of 32: few sizes, see litlora.kernels.buckets.
        blocks = max(1, -(-N // limits.rows))
        rows = max(1, -(-N // (32 * blocks))) * 32
        columns = -(-V // -(-V * rows // limits.elements))
        # Buffers serve all tiles: mapping fresh memory for a tile costs a fifth of its
        # multiplication.
        logits = hidden.new_empty(rows * columns)
        exacts = logits if logits.dtype == exact else hidden.new_empty(rows * columns, dtype=exact)
        buffers = _Buffers(columns, logits, exacts)
        result = torch.zeros(() if summed else N, dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, N, rows):
            n = min(rows, N - start)
            x, labels = hidden[start : start + n], targets[start : start + n, None]
            if n < rows:
                x, labels = F.pad(x, (0, 0, 0, rows - n)), F.pad(labels, (0, 0, 0, rows - n))
            losses, dx = _block_loss(x, labels, weight, cap, buffers, needs_dx=gradient is not None)
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
        return gradient * (upstream[:, None] if upstream.dim() else upstream), None, None, None, None


class _Buffers(NamedTuple):
    """Memory that all tiles of up to `columns` of the vocabulary share."""

    columns: int
    logits: Tensor
    exacts: Tensor
    """The same logits in fp32 or better; the same memory if they are already."""

    def tile(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """(rows, columns) of both."""
        logits, exacts = (buffer[: rows * columns].view(rows, columns) for buffer in self[1:])
        return logits, exacts


def _block_loss(
    x: Tensor, labels: Tensor, weight: "Head", cap: float | None, buffers: _Buffers, *, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of x (n, C) and their gradients (n, C), both in fp32 or better; labels (n, 1).

    The vocabulary passes in tiles, as keys do in flash attention, and the target's logit is kept
    apart from the others. With d = log Σ exp(other logits) - target's logit, the loss is
    log(1 + exp d), and its gradient sigmoid(d) · (others' mean row of the weight - target's row).
    This stays exact where the target is all but certain.
    """
    n, (V, C), exact = len(x), weight.shape, buffers.exacts.dtype
    lowest = torch.finfo(exact).min
    top = x.new_full((n, 1), lowest, dtype=exact)
    others, picked = torch.zeros_like(top), torch.zeros_like(top)
    mean = x.new_zeros((n, C), dtype=exact)
    for first in range(0, V, buffers.columns):
        rows = slice(first, first + buffers.columns)
        part = weight[rows] if isinstance(weight, Tensor) else weight.tile(rows, x.dtype)
        z, e = buffers.tile(n, len(part))
        torch.mm(x, part.t(), out=z)
        if e.dtype != z.dtype:
            e.copy_(z)
        slope = None
        if cap is not None:
            e.div_(cap).tanh_()
            slope = 1 - e.square()
            e.mul_(cap)
        place = labels - first
        inside, place = (place >= 0) & (place < len(part)), place.clamp(0, len(part) - 1)
        here = e.gather(1, place)
        picked = torch.where(inside, here, picked)
        e.scatter_(1, place, here.masked_fill(inside, lowest))
        local_top = e.amax(dim=1, keepdim=True)
        torch.softmax(e, dim=1, out=e)
        new_top = torch.maximum(top, local_top)
        shrink, top = (top - new_top).exp_(), new_top
        # The most likely has the share 1 / Σ exp(e - local_top).
        local_sum = (local_top - new_top).exp_() / e.amax(dim=1, keepdim=True)
        others.mul_(shrink).add_(local_sum)
        if needs_dx:
            if slope is not None:
                e.mul_(slope)
            shares = e if e.dtype == z.dtype else z.copy_(e)
            mean.mul_(shrink).addcmul_(torch.mm(shares, part), local_sum)
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
