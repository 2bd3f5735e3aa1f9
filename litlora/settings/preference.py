"""The settings of preference tuning."""

import math
from dataclasses import dataclass, field
from typing import Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_value

DEFAULT_BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1, "apo_zero_unpaired": 0.1}
"""Of each loss, as in its paper or its authors' code."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is learned from pairs of a better and a worse answer, or from good and bad answers."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto", "apo_zero_unpaired"] = "dpo"
    """How answers are compared. dpo (Rafailov et al. 2023) and ipo (Azar et al. 2023) do so with the
    model as it was before training; simpo (Meng et al. 2024) compares mean log-probabilities, without
    a reference; orpo (Hong et al. 2024) learns the better answer at the same time, without a
    reference; kto (Ethayarajh et al. 2024) and apo_zero_unpaired (D'Oosterlinck et al. 2024) learn
    from single answers that are good or bad, and compare with the model before training."""
    beta: float | None = None
    """How closely the model is held to the reference. With simpo: the scale of its reward; with orpo:
    the weight of the odds ratio beside the loss of the better answer (λ in the paper). Default: 0.1;
    simpo 2.0."""
    gamma: float = 1.0
    """simpo: by how much the reward of the better answer is to exceed the other's."""
    label_smoothing: float = 0.0
    """dpo and simpo: the share of pairs that are assumed to be the wrong way round (conservative
    DPO)."""

    desirable_weight: float = field(default=1.0, metadata={"stored": "unless default"})
    """kto and apo_zero_unpaired: the weight of good answers. Of many more good than bad ones, less
    than 1."""
    undesirable_weight: float = field(default=1.0, metadata={"stored": "unless default"})
    """kto and apo_zero_unpaired: the weight of bad answers."""

    def __post_init__(self) -> None:
        beta = self.resolved_beta
        check_value(self, "beta", math.isfinite(beta) and beta > 0, "must be a positive, finite number")
        check_value(
            self, "gamma", math.isfinite(self.gamma) and self.gamma >= 0, "must be 0 or more, and finite"
        )
        check_value(
            self, "label_smoothing", 0 <= self.label_smoothing < 0.5, "must be at least 0 and below 0.5"
        )
        check(
            not self.label_smoothing or self.loss in ("dpo", "simpo"),
            f"{setting('label_smoothing')} has no effect on {setting('loss')} {self.loss}; use dpo or simpo",
        )

        check(
            self.gamma == 1 or self.loss == "simpo",
            f"{setting('gamma')} has no effect on {setting('loss')} {self.loss}; use simpo",
        )
        for name in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, name)
            check_value(self, name, math.isfinite(weight) and weight > 0, "must be a positive, finite number")
            check(
                weight == 1 or self.learns_labels,
                f"{setting(name)} has no effect on {setting('loss')} {self.loss}, which learns from pairs; "
                "use kto or apo_zero_unpaired",
            )

    @property
    def resolved_beta(self) -> float:
        return DEFAULT_BETA[self.loss] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model as it was before training."""
        return self.loss not in ("simpo", "orpo")

    @property
    def learns_labels(self) -> bool:
        """Whether it is learned from single answers that are good or bad."""
        return self.loss in ("kto", "apo_zero_unpaired")
