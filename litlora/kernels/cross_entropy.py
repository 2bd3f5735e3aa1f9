"""Cross-entropy of a frozen output head, with the gradient of its input computed on the way.

Of tokens x vocabulary numbers only a few rows exist at a time, and each chunk's logits are computed once: a summed loss has
the gradient softmax - onehot whatever comes after it, up to one factor, so nothing need be kept or computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits that exist at a time: few enough for caches and memory, enough rows to keep the matrix multiplication at its best."""


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
        exacts = logits if logits.dtype == exact else torch.empty_like(logits, dtype=exact)
        for start in range(0, N, rows):
            chunk = slice(start, min(start + rows, N))
            labels = targets[chunk, None]  # (n, 1)
            x = hidden[chunk] if len(labels) == rows else F.pad(hidden[chunk], (0, 0, 0, rows - len(labels)))
            torch.mm(x, weight.t(), out=logits)  # (rows, V), of which the first n count
            z, p = logits[: len(labels)], exacts[: len(labels)]
            if exacts is not logits:
                p.copy_(z)
            slope = None
            if cap is not None:
                p.div_(cap).tanh_()
                slope = 1 - p.square()
                p.mul_(cap)
            top = p.amax(dim=1, keepdim=True)
            picked = p.gather(1, labels)
            torch.softmax(p, dim=1, out=p)
            # The likeliest has probability 1 / Σ exp(z - top), which never underflows as the target's might.
            total += (top - p.amax(dim=1, keepdim=True).log() - picked).sum()
            if gradient is not None:
                p.scatter_add_(1, labels, p.new_full((1, 1), -1.0).expand_as(labels))  # softmax - onehot
                if slope is not None:
                    p.mul_(slope)
                if exacts is not logits:
                    z.copy_(p)
                gradient[chunk] = torch.mm(logits, weight)[: len(labels)]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that may exist at a time on this device."""
    rows = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocab_size
    return max(1, rows // 32 * 32 or rows)


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
