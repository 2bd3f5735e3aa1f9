"""Summed cross-entropy over the supervised tokens, with logits at no other position."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litlora.kernels.buckets import bucketed
from litlora.kernels.cross_entropy import chunk_rows, exact_dtype, head_loss
from litlora.model import GPT


class SupervisedLoss(nn.Module):
    """The training objective: a model, and the sum (not the mean) of its loss over a batch."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, lengths: list[int] | None = None
    ) -> Tensor:
        """Summed loss in nats, fp32 or better, of a `Batch`: input_ids (B, T), or (1, N) with the
        lengths of what is packed in it.

        positions (M,) of the flattened input_ids are those whose next token is learned, targets
        (M,) these tokens.
        """
        ids, lengths, places = bucketed(input_ids, lengths, positions, self.model.model.embed_tokens.weight)
        hidden = self.model.model(ids, lengths=lengths, positions=places)[0, : len(positions)]  # (M, C)
        head, cap = self.model.lm_head, self.model.config.final_logit_softcapping
        plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
        if plain and not torch.is_autocast_enabled(hidden.device.type):
            return head_loss(hidden, targets, head.weight, cap)
        return summed_cross_entropy(
            hidden, targets, self.model.logits, chunk_rows(self.model.config.vocab_size, hidden.device)
        )


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Σ -log p(target) for hidden (M, C), targets (M,) and any head, trainable ones too; `rows` of
    logits exist at a time.

    With several chunks, the backward computes each chunk's logits once more instead of keeping
    them.
    """
    if len(targets) <= rows:
        return _chunk_loss(hidden, targets, head)
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.stack(
        [checkpoint(_chunk_loss, piece, labels, head, use_reentrant=False) for piece, labels in pieces]
    ).sum()


def _chunk_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(exact_dtype(logits)), targets, reduction="sum")
