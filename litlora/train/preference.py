"""Preference: objectives over pairs of a better answer, chosen, and a worse one, rejected."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.data.examples import Example
from litlora.data.pairs import PairExample
from litlora.settings import PreferenceConfig
from litlora.train.answers import AnswerBatch, AnswerObjective


class Answers(NamedTuple):
    """n pairs of answers as the losses see them, (n, 2) each: chosen, rejected."""

    log_probs: Tensor
    """Of whole answers, in nats."""
    num_tokens: Tensor
    reference: Tensor

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


class Preference(AnswerObjective):
    """One of LOSSES, averaged over pairs."""

    figures = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    num_answers = 2

    def batch(self, examples: Sequence[PairExample], device: torch.device) -> AnswerBatch:
        return self.answer_batch(examples, device)

    def loss(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over pairs, in fp32 or better. Of the figures, accuracy is the number of pairs
        whose chosen answer has the larger reward."""
        answers = Answers(self.log_probs(batch), batch.num_tokens, batch.reference)
        losses, rewards = LOSSES[self.preference.loss](answers, self.preference)
        rewards = rewards.detach()
        margins = _margin(rewards)
        figures = ((margins > 0).sum(), margins.sum(), *rewards.sum(dim=0))
        return losses.sum(), dict(zip(self.figures, figures, strict=True))

    def answers(self, example: PairExample) -> tuple[Example, Example]:
        return (example.chosen, example.rejected)
