"""How the next token is chosen from logits."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litlora.settings.sampling import SamplingSettings, check_sampling


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen, and how many there may be. Raises UserError for a value
    that is out of range."""

    max_new_tokens: int
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher is more random."""
    top_k: int | None = None
    """Sample only among the k likeliest tokens."""
    top_p: float = 1.0
    """Sample only among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Sample only among tokens that have this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that were seen, in the prompt or in the answer, and multiplies
    negative ones (Keskar et al. 2019, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """What is taken from the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """The same, for each time that it has it."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are not part of it."""
    seed: int | None = None
    """Seed of `generator`; None for a different one each time."""
    logprobs: int | None = None
    """Give each token's log probability, and those of so many of the likeliest ones."""

    def __post_init__(self) -> None:
        check_sampling(self)

    @classmethod
    def of(cls, settings: SamplingSettings, **changes: Any) -> "Sampling":
        """Those of a command's settings, with changes."""
        names = (field.name for field in fields(SamplingSettings))
        return cls(**{**{name: getattr(settings, name) for name in names}, **changes})

    def another(self, number: int) -> "Sampling":
        """The same, for a further answer to the same prompt."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether a token depends on the logits alone, and is the likeliest."""
        return self.temperature == 0 and not self.has_penalties and self.logprobs is None

    @property
    def has_penalties(self) -> bool:
        """Whether a token depends on those before it."""
        return any((self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty))

    def generator(self, device: torch.device) -> torch.Generator:
        """A random generator to draw tokens from, in the state that `seed` gives it."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


class LogProb(NamedTuple):
    """The natural logarithm of a token's probability, before any setting changes it."""

    id: int
    value: float


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """A token id from logits (V,): the likeliest at temperature 0, else drawn after top-k, then
    top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024, arXiv:2407.01082)."""
    if sampling.temperature == 0:
        return logits.max(dim=-1).indices  # as argmax, which is slower in 16 bits
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # Keep a token while those before it sum to less than top_p: at least one always stays.
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0)
    # As torch.multinomial draws, number for number, without its checks, for which a device would wait.
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waits).argmax()


def are_finite(logits: Tensor) -> Tensor:
    """Whether all are finite, in one pass: of a NaN, both ends of the range are NaN."""
    return torch.stack(logits.aminmax()).isfinite().all()


def penalised(logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits (V,) with the penalties for the tokens seen so far; the same tensor if there are none."""
    if sampling.repetition_penalty != 1:
        seen = _unique((*prompt, *answer), logits)
        values = logits[seen]
        factor = sampling.repetition_penalty
        changed = torch.where(values > 0, values / factor, values * factor)
        most = torch.finfo(logits.dtype).max  # of fp16 it is small, and nothing can be drawn beside infinity
        logits = logits.index_copy(0, seen, changed.clamp(max=most))
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        taken = sampling.presence_penalty + sampling.frequency_penalty * counts.to(logits.dtype)
        logits = logits.index_add(0, ids, -taken.to(logits.dtype))
    return logits


def _unique(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(sorted(set(ids)), device=like.device)


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[LogProb, list[LogProb]]:
    """That of a token, and those of the `count` likeliest ones, from logits (V,)."""
    values = logits.float().log_softmax(dim=-1)
    best = values.topk(min(count, values.numel())) if count else None
    top = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    own = float(values[token])
    assert math.isfinite(own)
    return LogProb(token, own), [LogProb(*entry) for entry in top]
