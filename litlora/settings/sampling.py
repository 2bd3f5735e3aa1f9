"""How the tokens of an answer are chosen, for the commands that generate."""

from dataclasses import dataclass
from typing import Any

from litlora.settings.checks import check_positive, check_seed, check_value

LEAST, MOST = 1e-9, 1e9
"""The smallest temperature, top-p and repetition penalty, and the largest. Beyond them, logits and
probabilities leave the range of fp32."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the tokens of an answer are chosen, and how many there may be."""

    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more random."""
    top_k: int | None = 50
    """Sample among the k likeliest tokens only."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Sample among tokens that have this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the prompt or the answer has already become less likely."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has already, from -2 to 2."""
    frequency_penalty: float = 0.0
    """The same, for each time that the answer has it."""
    seed: int | None = None
    """Seed of the sampling; default: a different answer each time."""


def check_sampling(settings: Any) -> None:
    """Raise UserError for a sampling setting that is out of range."""
    check_seed(settings.seed or 0)
    check_positive(settings, "max_new_tokens", "top_k")
    temperature, penalty = settings.temperature, settings.repetition_penalty
    usable = temperature == 0 or LEAST <= temperature <= MOST
    check_value(settings, "temperature", usable, f"must be 0, or from {LEAST:g} to {MOST:g}")
    check_value(settings, "top_p", LEAST <= settings.top_p <= 1, f"must be from {LEAST:g} to 1")
    check_value(settings, "min_p", 0 <= settings.min_p <= 1, "must be from 0 to 1")
    usable = LEAST <= penalty <= MOST
    check_value(settings, "repetition_penalty", usable, f"must be from {LEAST:g} to {MOST:g}")
    for name in ("presence_penalty", "frequency_penalty"):
        check_value(settings, name, -2 <= getattr(settings, name) <= 2, "must be from -2 to 2")
