"""Summed cross-entropy over the supervised tokens, with logits at no other position."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litlora.model import GPT

IGNORE = -100
"""Label of a token that is not learned."""
CHUNK = 1024
"""Positions whose logits exist at a time."""


class SupervisedLoss(nn.Module):
    """The training objective: a model, and the sum (not the mean) of its loss over a batch."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """input_ids, labels (B, T) -> summed loss in nats, fp32. labels[t] is input_ids[t] where it is to be learned, else IGNORE.

        Token t is predicted from the tokens before it, so labels[:, 0] is never learned.
        """
        hidden = self.model.model(input_ids)[:, :-1]  # (B, T-1, C)
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        return summed_cross_entropy(hidden[supervised], targets[supervised], self.model.logits)  # (N, C), (N,)


def summed_cross_entropy(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ -log p(target) for hidden (N, C) and targets (N,), in chunks: at most CHUNK rows of logits exist at a time.

    With several chunks, the backward computes each chunk's logits once more instead of keeping them.
    """
    if len(targets) <= CHUNK:
        return _chunk_loss(hidden, targets, head)
    pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(_chunk_loss, rows, labels, head, use_reentrant=False) for rows, labels in pieces]).sum()


def _chunk_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden)
    # fp32: exponentials and their sum lose too much in bf16
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
