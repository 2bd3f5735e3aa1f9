"""Cross-entropy of a frozen output head, with the gradient of its input computed on the way.

Of tokens x vocabulary numbers only one tile exists at a time, and each logit is computed once: a
summed loss has the gradient softmax - onehot whatever comes after it, up to one factor, so nothing
need be kept or computed again.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tiles(NamedTuple):
    """Of tokens x vocabulary numbers, those that exist at a time."""

    rows: int
    """Tokens: enough to keep the matrix multiplication at its best."""
    elements: int
    """Few enough for the processor's cache."""


TILES = {"cpu": Tiles(512, 2**20), "cuda": Tiles(4096, 2**26)}
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""The same for heads that are trained, whose logits are computed in chunks of whole rows."""


def plain_head_loss(hidden: Tensor, targets: Tensor, weight: Tensor, cap: float | None = None) -> Tensor:
    """Σ -log softmax(hidden · weightᵀ)[target] in nats, fp32 or better; (N, C), (N,), (V, C) -> ().

    With `cap`, the logits are cap · tanh(logits / cap) (Gemma 2).
    """
    logits = F.linear(hidden, weight)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    # fp32: exponentials and their sum lose too much in bf16
    return F.cross_entropy(logits.to(exact_dtype(logits)), targets, reduction="sum")


def head_loss(hidden: Tensor, targets: Tensor, weight: Tensor, cap: float | None = None) -> Tensor:
    """As plain_head_loss, in chunks. The weight gets no gradient: it must be frozen."""
    return _HeadLoss.apply(hidden, targets, weight, cap)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, weight: Tensor, cap: float | None) -> Tensor:
        (N, V), exact, limits = (
            (len(hidden), len(weight)),
            exact_dtype(hidden),
            TILES.get(hidden.device.type, TILES["cuda"]),
        )
        # Blocks of equal size, a multiple of 32: sizes should be few, see litlora.kernels.sizes.
        blocks = max(1, -(-N // limits.rows))
        rows = max(1, -(-N // (32 * blocks))) * 32
        columns = -(-V // -(-V * rows // limits.elements))
        # Buffers for all tiles: mapping fresh memory for each would cost a fifth of its
        # multiplication.
        logits = hidden.new_empty(rows * columns)
        exacts = logits if logits.dtype == exact else hidden.new_empty(rows * columns, dtype=exact)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, N, rows):
            n = min(rows, N - start)
            x, labels = hidden[start : start + n], targets[start : start + n, None]
            if n < rows:
                x, labels = F.pad(x, (0, 0, 0, rows - n)), F.pad(labels, (0, 0, 0, rows - n))
            losses, dx = _block_loss(
                x, labels, weight, cap, logits, exacts, columns, needs_dx=gradient is not None
            )
            total += losses[:n].sum()
            if gradient is not None:
                gradient[start : start + n] = dx[:n]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def _block_loss(
    x: Tensor,
    labels: Tensor,
    weight: Tensor,
    cap: float | None,
    logits: Tensor,
    exacts: Tensor,
    columns: int,
    *,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) of x (n, C) and their gradients (n, C), both in fp32 or better; labels (n, 1).

    The vocabulary passes in tiles of `columns`, as keys pass in flash attention, and the target's
    logit is kept apart from the others: with d the logarithm of the others' sum less the target's
    logit, the loss is log(1 + exp d), and the gradient sigmoid(d) times what the others' mean row
    of the weight differs from the target's. That stays exact where the target is all but certain.
    """
    n, (V, C), exact = len(x), weight.shape, exacts.dtype
    lowest = torch.finfo(exact).min
    top = x.new_full((n, 1), lowest, dtype=exact)
    others, picked = torch.zeros_like(top), torch.zeros_like(top)
    mean = x.new_zeros((n, C), dtype=exact)
    for first in range(0, V, columns):
        part = weight[first : first + columns]
        z, e = (buffer[: n * len(part)].view(n, -1) for buffer in (logits, exacts))
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
        # The likeliest has the share 1 / Σ exp(e - local_top).
        local_sum = (local_top - new_top).exp_() / e.amax(dim=1, keepdim=True)
        others.mul_(shrink).add_(local_sum)
        if needs_dx:
            if slope is not None:
                e.mul_(slope)
            shares = e if e.dtype == z.dtype else z.copy_(e)
            mean.mul_(shrink).addcmul_(torch.mm(shares, part), local_sum)
    d = others.log() + top - picked
    losses = torch.logaddexp(d, torch.zeros_like(d))
    wanted = weight[labels[:, 0]].to(exact)
    if cap is not None:
        wanted = wanted * (1 - (picked / cap).square())
    return losses, mean.div_(others).sub_(wanted).mul_(d.sigmoid())


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that may exist at a time on this device."""
    rows = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    return max(1, rows // 32 * 32 or rows)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
