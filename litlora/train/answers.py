"""AnswerObjective: objectives that look at the log-probabilities of whole answers.

The reference model is the model itself before its first step: a fresh adapter changes nothing. So
its log-probabilities are computed once, ahead, and no second model is in memory; a resumed run
computes the same ones before its state is restored.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litlora.data.batches import Batch, collate, sharing
from litlora.data.examples import Example, content_line
from litlora.errors import UserError, setting
from litlora.kernels.attention import Shared
from litlora.lora.mode import evaluating
from litlora.model import GPT
from litlora.settings import PreferenceConfig, TrainConfig
from litlora.train.objective import Context, Objective
from litlora.train.parallel import Parallel
from litlora.train.plan import evaluation_plan


class AnswerBatch(NamedTuple):
    """A micro-batch of n examples of k answers each."""

    batch: Batch
    """Of the n · k answers, example by example."""
    owners: Tensor
    """(M,): the answer that each learned position belongs to."""
    num_tokens: Tensor
    """(n, k): learned tokens of the answers."""
    reference: Tensor
    """(n, k): the log-probabilities of the answers before training; 0 if they are not known."""
    apart: Batch
    """The answers, each with a prompt of its own."""


class AnswerObjective(Objective):
    """An objective over examples of one answer or several, averaged over the examples. An example is
    a dataclass with `reference`, the log-probabilities of its answers before training, or None."""

    num_answers: int
    """Of an example."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig | None = None,
        contexts: Sequence[Context] = (),
        *,
        preference: PreferenceConfig | None = None,
    ) -> None:
        """Raises UserError for settings of the loop under which an answer is not an answer."""
        super().__init__(model, config, contexts)
        self.preference = preference or PreferenceConfig()
        if self.preference.needs_reference:
            self.ahead = "reference: computing the log-probabilities of the answers before training, once"
        if not self.config.mask_prompt:
            raise UserError(
                f"{setting('mask_prompt')} false: a preference is about answers alone, "
                "so there is nothing to prefer in a prompt; leave it on"
            )

    @abstractmethod
    def answers(self, example: Any) -> tuple[Example, ...]:
        """The `num_answers` answers of an example, each with its prompt."""

    def prepared(self, examples: Sequence[Any], parallel: Parallel) -> list[Any]:
        """The examples with the log-probabilities of this model, which must not have been trained
        yet, if the loss needs them. All ranks call this together and get the same."""
        if not self.preference.needs_reference:
            return list(examples)
        rows = self.all_log_probs(examples, parallel).tolist()
        return [replace(example, reference=tuple(row)) for example, row in zip(examples, rows, strict=True)]

    @torch.no_grad()
    def all_log_probs(self, examples: Sequence[Any], parallel: Parallel) -> Tensor:
        """(n, k): the log-probabilities of the answers in fp32, without dropout. All ranks call this
        together and get the same."""
        found = torch.zeros(len(examples), self.num_answers, device=parallel.device)
        micro_batches = evaluation_plan([self.length(example) for example in examples], self.config)
        with evaluating(self):
            for micro, counts in parallel.shared(micro_batches):
                batch = self.answer_batch([examples[index] for index in micro], parallel.device)
                log_probs = self(batch, self.log_probs)
                if counts:
                    found[micro] = log_probs.to(found.dtype)
        return parallel.sum(found)

    def answer_batch(self, examples: Sequence[Any], device: torch.device) -> AnswerBatch:
        """The answers of these examples on the device."""
        answers = [answer for example in examples for answer in self.answers(example)]
        batch = collate(answers, mask_prompt=True, packed=self.packed)
        num_tokens = torch.tensor([num_learned(answer) for answer in answers])
        owners = torch.arange(len(answers)).repeat_interleave(num_tokens)
        unknown = (0.0,) * self.num_answers
        reference = torch.tensor([example.reference or unknown for example in examples], device=device)
        apart = _on(device, batch)
        batch = _on(device, sharing(batch, self.num_answers)) if self.shares_prompts else apart
        counts = num_tokens.view(-1, self.num_answers).to(device)
        return AnswerBatch(batch, owners.to(device), counts, reference, apart)

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers of an example are computed on one copy of their prompt."""
        noise = self.config.neftune_alpha  # differs with the length of a sequence
        can = self.model.packs and self.config.packing and self.model.shares_tokens
        return can and self.num_answers > 1 and not noise

    def text(self, batch: AnswerBatch) -> Batch:
        return batch.apart

    def log_probs(self, batch: AnswerBatch) -> Tensor:
        """(n, k): the log-probabilities of the answers."""
        losses = self.token_losses(batch.batch)
        summed = losses.new_zeros(batch.num_tokens.numel()).index_add(0, batch.owners, losses)
        return -summed.view_as(batch.num_tokens)

    def weight(self, example: Any) -> int:
        return 1

    def num_learned(self, example: Any) -> int:
        return sum(map(num_learned, self.answers(example)))

    def length(self, example: Any) -> int:
        return sum(len(answer.ids) for answer in self.answers(example))

    def content(self, example: Any) -> bytes:
        return b"".join(
            content_line(answer).encode() + answer.ids.tobytes() for answer in self.answers(example)
        )


def num_learned(answer: Example) -> int:
    """The number of an answer's tokens."""
    return sum(stop - start for start, stop in answer.learned_spans())


def _on(device: torch.device, batch: Batch) -> Batch:
    tensors = (tensor.to(device) for tensor in (batch.input_ids, batch.positions, batch.targets))
    shared = None if batch.shared is None else Shared(*(tensor.to(device) for tensor in batch.shared))
    return Batch(*tensors, batch.lengths, shared)
