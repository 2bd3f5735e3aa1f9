"""KTO: an objective over single answers that are labelled good or bad."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litlora.data.batches import Batch
from litlora.data.examples import Example
from litlora.data.labelled import LabelledExample
from litlora.train.answers import AnswerBatch, AnswerObjective
from litlora.train.parallel import Parallel


class LabelledBatch(NamedTuple):
    """A micro-batch of n labelled answers."""

    answers: AnswerBatch
    desirable: Tensor
    """(n,): whether each is."""


class KTO(AnswerObjective):
    """λ (1 - σ(β (r - z))) of a desirable answer, λ (1 - σ(β (z - r))) of an undesirable one, with
    r = log p / p_reference and λ the weight of its label (Ethayarajh et al. 2024, arXiv:2402.01306,
    eq. 8), averaged over answers.

    z, which has no gradient, estimates how far the model has gone from the reference: the mean of
    log p / p_reference over every prompt of the step with the answer of the example before it in the
    data, and at least 0. It is one value for all examples of a step, in whichever micro-batch and on
    whichever device they are; for TRL these are the examples of one device's micro-batch. As there,
    a prompt has the same other answer in every epoch, so that its log-probability before training is
    computed ahead, with that of its own answer. In the unpaired APO-zero (D'Oosterlinck et al. 2024,
    arXiv:2408.06266), z is 0.
    """

    figures = ("accuracy", "margin", "kl")
    num_answers = 1

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.kl = torch.zeros(())
        """z of the step, in nats."""

    @property
    def estimates(self) -> bool:
        """Whether z is estimated."""
        return self.preference.loss == "kto"

    def prepared(self, examples: Sequence[LabelledExample], parallel: Parallel) -> list[LabelledExample]:
        found = super().prepared(examples, parallel)
        if not self.estimates or len(found) < 2:  # who is alone has no other's answer, and 0 as z
            return found
        crossed = [self.exchanged(one, other) for one, other in zip(found, [found[-1], *found], strict=False)]
        before = self.all_log_probs(crossed, parallel)[:, 0].tolist()
        return [
            replace(one, other=other.answer, other_reference=reference)
            for one, other, reference in zip(found, crossed, before, strict=True)
        ]

    def begin_step(self, examples: Sequence[LabelledExample], parallel: Parallel) -> None:
        """Settle z."""
        self.kl = torch.zeros((), device=parallel.device)
        held = [example for example in examples if example.other is not None]
        if not self.estimates or not held:
            return
        now = self.all_log_probs([replace(one, answer=one.other) for one in held], parallel)[:, 0]
        before = torch.tensor([one.other_reference for one in held], device=now.device)
        self.kl = (now - before).mean().clamp(min=0)

    def exchanged(self, one: LabelledExample, other: LabelledExample) -> LabelledExample:
        """The prompt of one example with the answer of another, cut where training would cut it."""
        (start, _), (begin, _) = one.answer.learned[0], other.answer.learned[0]
        limit = min(self.config.max_seq_length, self.model.config.max_position_embeddings)
        ids = array("i", [*one.answer.ids[:start], *other.answer.ids[begin:]][:limit])
        moved = ((first + start - begin, stop + start - begin) for first, stop in other.answer.learned)
        learned = tuple((first, min(stop, limit)) for first, stop in moved if first < limit)
        return LabelledExample(Example(ids, learned), one.is_desirable)

    def batch(self, examples: Sequence[LabelledExample], device: torch.device) -> LabelledBatch:
        labels = torch.tensor([example.is_desirable for example in examples], device=device)
        return LabelledBatch(self.answer_batch(examples, device), labels)

    def text(self, batch: LabelledBatch) -> Batch:
        return super().text(batch.answers)

    def loss(self, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over answers, in fp32 or better. Of the figures, margin is by how much β r lies on
        the right side of β z, and accuracy is the number of answers for which it does."""
        losses, margins = self.losses(batch)
        margins = margins.detach()
        figures = ((margins > 0).sum(), margins.sum(), self.kl * len(margins))
        return losses.sum(), dict(zip(self.figures, figures, strict=True))

    def losses(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """(n,) the loss of each answer, and (n,) by how much β r lies on the right side of β z."""
        settings, answers = self.preference, batch.answers
        ratios = (self.log_probs(answers) - answers.reference)[:, 0]
        margins = settings.resolved_beta * torch.where(batch.desirable, ratios - self.kl, self.kl - ratios)
        weights = margins.new_full(margins.shape, settings.undesirable_weight)
        weights[batch.desirable] = settings.desirable_weight
        return weights * torch.sigmoid(-margins), margins

    def answers(self, example: LabelledExample) -> tuple[Example]:
        return (example.answer,)

    def content(self, example: LabelledExample) -> bytes:
        return super().content(example) + bytes([example.is_desirable])
