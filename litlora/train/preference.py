"""Preference: objectives over pairs of a better answer, chosen, and a worse one, rejected.

The reference model of DPO and IPO is the model itself before its first step: a fresh adapter
changes nothing. So its log-probabilities are computed once, ahead, and no second model is in
memory; a resumed run computes the same ones before its state is restored.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.data.batches import Batch, collate
from litlora.data.examples import Example, content_line
from litlora.data.pairs import PairExample
from litlora.errors import UserError, setting
from litlora.model import GPT
from litlora.settings import PreferenceConfig, TrainConfig
from litlora.train.fit import evaluating
from litlora.train.objective import Context, Objective
from litlora.train.parallel import Parallel
from litlora.train.plan import evaluation_plan


class PairBatch(NamedTuple):
    """A micro-batch of n pairs."""

    batch: Batch
    """Of the 2n answers: each pair's chosen one, then its rejected one."""
    owners: Tensor
    """(M,): the answer that each learned position belongs to."""
    num_tokens: Tensor
    """(n, 2): learned tokens of the answers."""
    reference: Tensor | None
    """(n, 2): the log-probabilities of the answers before training."""


class Answers(NamedTuple):
    """n pairs of answers as the losses see them, (n, 2) each: chosen, rejected."""

    log_probs: Tensor
    """Of whole answers, in nats."""
    num_tokens: Tensor
    reference: Tensor | None

    @property
    def means(self) -> Tensor:
        """The mean log-probability of a token."""
        return self.log_probs / self.num_tokens

    @property
    def ratios(self) -> Tensor:
        """log p / p_reference."""
        return self.log_probs - self.reference


class Losses(NamedTuple):
    """Of n pairs."""

    losses: Tensor
    """(n,)"""
    rewards: Tensor
    """(n, 2): what the loss wants to be larger for chosen."""


def dpo(answers: Answers, config: PreferenceConfig) -> Losses:
    """-log σ(β (r_chosen - r_rejected)), r = log p / p_reference (Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7), with label smoothing by Mitchell 2023."""
    rewards = config.resolved_beta * answers.ratios
    return Losses(_logistic(_margin(rewards), config.label_smoothing), rewards)


def ipo(answers: Answers, config: PreferenceConfig) -> Losses:
    """(r_chosen - r_rejected - 1 / 2β)², r the mean of log p / p_reference over the answer's tokens
    (Azar et al. 2023, arXiv:2310.12036, eq. 17; the mean as its authors advise for answers of
    several lengths)."""
    beta = config.resolved_beta
    margins = _margin(answers.ratios / answers.num_tokens)
    return Losses((margins - 1 / (2 * beta)).square(), beta * answers.ratios)


def simpo(answers: Answers, config: PreferenceConfig) -> Losses:
    """-log σ(β (m_chosen - m_rejected) - γ), m the mean log-probability of a token (Meng et al.
    2024, arXiv:2405.14734, eq. 6)."""
    rewards = config.resolved_beta * answers.means
    return Losses(_logistic(_margin(rewards) - config.gamma, config.label_smoothing), rewards)


def orpo(answers: Answers, config: PreferenceConfig) -> Losses:
    """-m_chosen - β log σ(log odds_chosen - log odds_rejected), odds = p / (1 - p), p = exp m, m the
    mean log-probability of a token of the answer (Hong et al. 2024, arXiv:2403.07691, eq. 6)."""
    means = answers.means
    # 1 - exp m, exactly where m is near 0; a p of 1 has infinite odds.
    log_odds = means - torch.log(-torch.expm1(means.clamp(max=-torch.finfo(means.dtype).tiny)))
    beta = config.resolved_beta
    return Losses(-means[:, 0] - beta * F.logsigmoid(_margin(log_odds)), beta * means)


LOSSES: dict[str, Callable[[Answers, PreferenceConfig], Losses]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}


def _margin(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


def _logistic(margins: Tensor, smoothing: float) -> Tensor:
    """-log σ(margin), of which a share is the wrong way round."""
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


class Preference(Objective):
    """One of LOSSES, averaged over pairs."""

    figures = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def __init__(
        self,
        model: GPT,
        config: TrainConfig | None = None,
        contexts: Sequence[Context] = (),
        *,
        preference: PreferenceConfig | None = None,
    ) -> None:
        """Raises UserError for settings of the loop under which a pair is not a pair."""
        super().__init__(model, config, contexts)
        self.preference = preference or PreferenceConfig()
        if self.preference.needs_reference:
            self.ahead = "reference: computing the log-probabilities of the answers before training, once"
        if not self.config.mask_prompt:
            raise UserError(
                f"{setting('mask_prompt')} false: both answers of a pair have the same prompt, "
                "so there is nothing to prefer in it; leave it on"
            )

    @torch.no_grad()
    def prepared(self, pairs: Sequence[PairExample], parallel: Parallel) -> list[PairExample]:
        """The pairs with the log-probabilities of this model, which must not have been trained yet,
        if the loss needs them. All ranks call this together and get the same."""
        if not self.preference.needs_reference:
            return list(pairs)
        found = torch.zeros(len(pairs), 2, device=parallel.device)
        micro_batches = evaluation_plan([self.length(pair) for pair in pairs], self.config)
        with evaluating(self):
            for micro in islice(micro_batches, parallel.rank, None, parallel.world_size):
                batch = self.batch([pairs[index] for index in micro], parallel.device)
                found[micro] = self.in_contexts(lambda batch=batch: self.log_probs(batch)).to(found.dtype)
        rows = parallel.sum(found).tolist()
        return [replace(pair, reference=tuple(row)) for pair, row in zip(pairs, rows, strict=True)]

    def batch(self, examples: Sequence[PairExample], device: torch.device) -> PairBatch:
        answers = [answer for pair in examples for answer in (pair.chosen, pair.rejected)]
        batch = collate(answers, mask_prompt=True, packed=self.config.packing)
        num_tokens = torch.tensor([_num_learned(answer) for answer in answers])
        owners = torch.arange(len(answers)).repeat_interleave(num_tokens)
        known = [pair.reference for pair in examples]
        reference = None if None in known else torch.tensor(known, device=device)
        tensors = (tensor.to(device) for tensor in (batch.input_ids, batch.positions, batch.targets))
        counts = num_tokens.view(-1, 2).to(device)
        return PairBatch(Batch(*tensors, batch.lengths), owners.to(device), counts, reference)

    def loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over pairs, in fp32 or better. Of the figures, accuracy is the number of pairs
        whose chosen answer has the larger reward."""
        log_probs = self.log_probs(batch)
        answers = Answers(log_probs, batch.num_tokens, batch.reference)
        losses, rewards = LOSSES[self.preference.loss](answers, self.preference)
        rewards = rewards.detach()
        margins = _margin(rewards)
        figures = ((margins > 0).sum(), margins.sum(), *rewards.sum(dim=0))
        return losses.sum(), dict(zip(self.figures, figures, strict=True))

    def log_probs(self, batch: PairBatch) -> Tensor:
        """(n, 2): the log-probabilities of the answers."""
        losses = self.token_losses(batch.batch)
        summed = losses.new_zeros(batch.num_tokens.numel()).index_add(0, batch.owners, losses)
        return -summed.view_as(batch.num_tokens)

    def weight(self, example: PairExample) -> int:
        return 1

    def num_learned(self, example: PairExample) -> int:
        return _num_learned(example.chosen) + _num_learned(example.rejected)

    def length(self, example: PairExample) -> int:
        return len(example.chosen.ids) + len(example.rejected.ids)

    def content(self, example: PairExample) -> bytes:
        answers = (example.chosen, example.rejected)
        return b"".join(content_line(answer).encode() + answer.ids.tobytes() for answer in answers)


def _num_learned(answer: Example) -> int:
    return sum(stop - start for start, stop in answer.learned_spans())
