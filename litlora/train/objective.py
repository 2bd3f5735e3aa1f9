"""Objective: what a run minimises. SFT is the one that learns answers token by token.

The loop knows nothing but the methods of `Objective`; a new loss is one subclass:

    class Flooded(SFT):
        "Supervised fine-tuning whose loss does not fall below 1 nat."
        def loss(self, batch):
            loss, figures = super().loss(batch)
            return (loss - len(batch.targets)).abs(), figures
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litlora.data.batches import Batch, collate, num_supervised
from litlora.data.examples import Example, content_line
from litlora.data.store import lengths_of
from litlora.errors import UserError, setting
from litlora.frozen.linear import FrozenLinear
from litlora.frozen.streamed import StreamedHead
from litlora.kernels.buckets import bucketed
from litlora.kernels.cross_entropy import Tile, chunk_rows, exact_dtype, head_loss, head_losses
from litlora.lora.casts import cast_ahead
from litlora.model import LanguageModel
from litlora.settings import TrainConfig
from litlora.train.neftune import noisy
from litlora.train.parallel import Parallel

COMPILED_MULTIPLE = 128
"""Of the tokens, and of the learned positions, that compiled blocks get: few sizes, at full speed."""
Context = Callable[[], AbstractContextManager]
"""Makes a context that is entered for each forward."""


class Objective(nn.Module, ABC):
    """A model, and a loss that is a sum over its examples.

    The loop divides the losses of a step once, by the weight of all its examples. So every unit of
    weight, such as a supervised token, counts the same in whichever micro-batch it is.
    """

    figures: tuple[str, ...] = ()
    """What `loss` measures besides the loss: names of figures, each a sum like the loss."""
    ahead: str | None = None
    """What `prepared` computes, if that takes long: it is said before."""

    def __init__(
        self, model: LanguageModel, config: TrainConfig | None = None, contexts: Sequence[Context] = ()
    ) -> None:
        """`contexts` are entered for each forward: autocast, for example."""
        super().__init__()
        self.model = model
        self.config = config or TrainConfig()
        self.contexts = contexts
        self.head_tile: Tile | None = None
        """Computes the loss at a frozen output head, a tile at a time, compiled; None: not compiled."""
        self.facts: dict[str, str] = {}
        """What the loss depends on besides settings, examples and the base, by the words of a refusal:
        a resumed run must find the same."""

    def forward(self, batch: Any, compute: Callable[[Any], Any] | None = None) -> Any:
        """`loss`, or what else is to be computed of a batch, within the contexts."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            return (compute or self.loss)(batch)

    @abstractmethod
    def batch(self, examples: Sequence[Any], device: torch.device) -> Any:
        """A micro-batch of these examples on the device."""

    def text(self, batch: Any) -> Batch:
        """The tokens of a batch, and those that are learned."""
        return batch

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of a batch, and the sums of its figures (without a gradient)."""

    @abstractmethod
    def weight(self, example: Any) -> int:
        """By how much an example counts: the number of its supervised tokens."""

    def num_learned(self, example: Any) -> int:
        """At how many of its positions there are logits."""
        return self.weight(example)

    @abstractmethod
    def length(self, example: Any) -> int:
        """Tokens that the model computes for an example."""

    def lengths(self, examples: Sequence[Any]) -> Sequence[int]:
        """`length` of each of them, in 4 bytes each."""
        return array("i", map(self.length, examples))

    @abstractmethod
    def content(self, example: Any) -> bytes:
        """All that the loss depends on: a resumed run must find the same for each example."""

    def prepared(self, examples: Sequence[Any], parallel: Parallel) -> Sequence[Any]:
        """The examples with what the loss needs of the model before its first step, for example
        their log-probabilities. All ranks call this together and get the same."""
        return examples

    def ready(self) -> None:
        """All examples are prepared: let go of what that alone needed."""

    def in_step(self) -> AbstractContextManager:
        """A context for all that is computed in a step, before its update: no weight changes in it."""
        return cast_ahead(self.model, self.model.like.dtype)

    def begin_step(self, examples: Sequence[Any], parallel: Parallel) -> None:
        """Settle, without a gradient, what the loss needs to know of all examples of a step, such as
        a mean over them, whatever micro-batches they are computed in. The examples stand in the
        order of the data; a validation is one step. All ranks call this together."""

    def idle(self, batch: Any) -> Any:
        """A batch for a rank that has no work left in a step. Its loss is multiplied by zero, so an
        objective may leave out what is not needed for gradients of zero."""
        return batch

    def piece(self, batch: Any, length: int) -> Any | None:
        """The first `length` tokens of a batch, learned in the same proportion, from which the
        memory of the whole is estimated; None if there is no such piece."""
        return None

    @property
    def packed(self) -> bool:
        """Whether a batch is a row of sequences of known lengths: packs, and whatever a model that
        cannot pack computes one by one."""
        return self.config.packing or not self.model.packs

    def hidden(self, batch: Batch) -> Tensor:
        """The model's hidden states (M, C) at the learned positions."""
        ids, lengths, places, more = batch.input_ids, batch.lengths, batch.positions, {}
        if self.model.packs:
            multiple = COMPILED_MULTIPLE if self.config.compiles else None
            ids, lengths, places = bucketed(ids, lengths, places, self.model.like, multiple)
        if batch.shared is not None:
            more["shared"] = batch.shared.padded(ids.size(1))
        alpha, embedding = self.config.neftune_alpha, self.model.embedding
        with noisy(embedding, alpha, lengths) if alpha and self.training and lengths else nullcontext():
            return self.model.hidden(ids, lengths=lengths, positions=places, **more)[
                0, : len(batch.positions)
            ]

    def token_losses(self, batch: Batch) -> Tensor:
        """-log p of each learned token in nats, in fp32 or better: (M,)."""
        hidden = self.hidden(batch)
        if (head := self._plain_head(hidden)) is not None:
            cap = self.model.config.final_logit_softcapping
            return head_losses(hidden, batch.targets, head, cap, self.head_tile)
        rows = chunk_rows(self.model.config.vocab_size, hidden.device)
        return torch.cat(_chunk_losses(hidden, batch.targets, self.model.logits, rows, "none"))

    def _plain_head(self, hidden: Tensor) -> Tensor | StreamedHead | None:
        """The output head, if it is a frozen matrix, which the fused functions take."""
        head = self.model.plain_head
        if torch.is_autocast_enabled(hidden.device.type) or getattr(head, "bias", None) is not None:
            return None
        if isinstance(head, FrozenLinear) and isinstance(head.storage, StreamedHead):
            return head.storage
        return head.weight if type(head) is nn.Linear and not head.weight.requires_grad else None

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, by the model's own names; parameters of the objective by theirs."""
        return {
            name.removeprefix("model."): parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }


class SFT(Objective):
    """Supervised fine-tuning: cross-entropy of the answers' tokens, with logits at no other
    position."""

    def __init__(
        self, model: LanguageModel, config: TrainConfig | None = None, contexts: Sequence[Context] = ()
    ) -> None:
        """Raises UserError if padding would change what an example is."""
        super().__init__(model, config, contexts)
        scaling = model.config.rope_scaling
        if not self.config.packing and scaling is not None and scaling.rope_type == "longrope":
            raise UserError(
                f"{setting('packing')} false: this model rotates the positions of long and of short examples "
                "differently (longrope), and a short one padded beside a long one would count as long; "
                "leave packing on"
            )

    def batch(self, examples: Sequence[Example], device: torch.device) -> Batch:
        batch = collate(examples, mask_prompt=self.config.mask_prompt, packed=self.packed)
        tensors = (batch.input_ids, batch.positions, batch.targets)
        if device.type == "cuda":  # from pinned memory the copy does not wait for the device
            tensors = (tensor.pin_memory() for tensor in tensors)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), batch.lengths)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum in nats, in fp32 or better."""
        hidden = self.hidden(batch)
        if (head := self._plain_head(hidden)) is not None:
            cap = self.model.config.final_logit_softcapping
            return head_loss(hidden, batch.targets, head, cap, self.head_tile), {}
        rows = chunk_rows(self.model.config.vocab_size, hidden.device)
        return summed_cross_entropy(hidden, batch.targets, self.model.logits, rows), {}

    def weight(self, example: Example) -> int:
        return num_supervised(example, self.config.mask_prompt)

    def length(self, example: Example) -> int:
        return len(example.ids)

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        return lengths_of(examples)

    def content(self, example: Example) -> bytes:
        """Every token, and where the answer begins."""
        return content_line(example).encode() + example.ids.tobytes()

    def idle(self, batch: Batch) -> Batch:
        return batch._replace(positions=batch.positions[:0], targets=batch.targets[:0])

    def piece(self, batch: Batch, length: int) -> Batch:
        lengths = batch.lengths or [batch.input_ids.size(1)] * len(batch.input_ids)
        learned = round(len(batch.targets) / sum(lengths) * length)
        ids = batch.input_ids[:1]
        positions = torch.arange(learned, device=ids.device)
        return Batch(ids[:, :length], positions, ids[0, positions], None)


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], rows: int
) -> Tensor:
    """Σ -log p(target) for hidden (M, C), targets (M,) and any head, trainable ones too; `rows` of
    logits exist at a time.

    With several chunks, the backward computes each chunk's logits once more instead of keeping
    them.
    """
    losses = _chunk_losses(hidden, targets, head, rows, "sum")
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _chunk_losses(
    hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], rows: int, reduction: str
) -> list[Tensor]:
    if len(targets) <= rows:
        return [_chunk_loss(hidden, targets, head, reduction)]
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return [
        checkpoint(_chunk_loss, piece, labels, head, reduction, use_reentrant=False)
        for piece, labels in pieces
    ]


def _chunk_loss(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], reduction: str) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(exact_dtype(logits)), targets, reduction=reduction)
