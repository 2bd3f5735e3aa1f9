"""The settings of distillation."""

import math
from dataclasses import dataclass

from litlora.settings.checks import check_value


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What is learned of a teacher's predictions."""

    top_k: int = 64
    """Of how many tokens, the likeliest ones, the teacher's probabilities are kept for each learned
    token, in 8 bytes each; all others count as one. As many as the vocabulary has: exact."""
    temperature: float = 1.0
    """Both models' logits are divided by this before they are compared: above 1, unlikely tokens
    count for more."""
    weight: float = 1.0
    """The share of the teacher in the loss; the rest is the cross-entropy of the data's own
    tokens."""

    def __post_init__(self) -> None:
        check_value(self, "top_k", self.top_k >= 1, "must be at least 1")
        for name in ("temperature", "weight"):
            value = getattr(self, name)
            check_value(self, name, math.isfinite(value) and value > 0, "must be a positive, finite number")
        check_value(self, "weight", self.weight <= 1, "must be above 0 and at most 1")
