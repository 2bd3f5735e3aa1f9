"""Cross-entropy of a frozen output head, with the gradient of its input computed on the way.

Of tokens x vocabulary numbers only a few rows exist at a time, and each chunk's logits are computed once: a summed loss has
the gradient softmax - onehot whatever comes after it, up to one factor, so nothing need be kept or computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Logits that exist at a time: few enough for memory, enough rows to keep the matrix multiplication at its best."""
EXACT_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Of these, how many are looked at in fp32 at a time: few enough for the processor's cache."""


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
        (N, V), exact = (len(hidden), len(weight)), exact_dtype(hidden)
        # Chunks of equal size, a multiple of 32: sizes should be few, see litlora.kernels.sizes.
        chunks = max(1, -(-N // chunk_rows(V, hidden.device)))
        rows = max(1, -(-N // (32 * chunks))) * 32
        total = torch.zeros((), dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Two buffers for all chunks: mapping fresh memory for each would cost a fifth of its multiplication.
        logits = hidden.new_empty(rows, V)
        block = min(rows, max(1, EXACT_ELEMENTS.get(hidden.device.type, EXACT_ELEMENTS["cuda"]) // V))
        exacts = None if logits.dtype == exact else hidden.new_empty(block, V, dtype=exact)
        for start in range(0, N, rows):
            n = min(rows, N - start)
            x = hidden[start : start + n]
            torch.mm(x if n == rows else F.pad(x, (0, 0, 0, rows - n)), weight.t(), out=logits)  # of which the first n rows count
            for z, labels in zip(logits[:n].split(block), targets[start : start + n, None].split(block), strict=True):
                p = z if exacts is None else exacts[: len(z)].copy_(z)
                total += _turn_into_gradient(p, labels, cap)
                if exacts is not None and gradient is not None:
                    z.copy_(p)
            if gradient is not None:
                gradient[start : start + n] = torch.mm(logits, weight)[:n]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def _turn_into_gradient(z: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    """The summed loss of logits (n, V), which become its gradient in place; labels (n, 1)."""
    slope = None
    if cap is not None:
        z.div_(cap).tanh_()
        slope = 1 - z.square()
        z.mul_(cap)
    top, picked = z.amax(dim=1, keepdim=True), z.gather(1, labels)
    torch.softmax(z, dim=1, out=z)
    # The likeliest has probability 1 / Σ exp(z - top), which never underflows as the target's might.
    loss = (top - z.amax(dim=1, keepdim=True).log() - picked).sum()
    z.scatter_add_(1, labels, z.new_full((1, 1), -1.0).expand_as(labels))  # softmax - onehot
    if slope is not None:
        z.mul_(slope)
    return loss


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that may exist at a time on this device."""
    rows = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    return max(1, rows // 32 * 32 or rows)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
