"""The facts of a rotary position embedding that is scaled. Torch-free."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from litlora.errors import CheckpointError
from litlora.facts import Facts, is_positive


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Facts):
    """How rotary frequencies are scaled to reach beyond the context of pre-training."""

    rope_type: Literal["linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
    factor: float | None = None
    """Growth of the context."""
    original_max_position_embeddings: int | None = None
    """Context of pre-training; llama3, yarn and longrope."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original / low_freq_factor are stretched by the full factor."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original / high_freq_factor are not stretched."""
    beta_fast: float | None = None
    """yarn: a frequency with at least this many rotations in the original context is not
    stretched."""
    beta_slow: float | None = None
    """yarn: a frequency with at most this many rotations is stretched by the full factor."""
    truncate: bool | None = None
    """yarn: the bounds of the ramp are rounded to whole numbers."""
    attention_factor: float | None = None
    """yarn, longrope: factor of the cosines and sines."""
    short_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency within the original context."""
    long_factor: tuple[float, ...] | None = None
    """longrope: divisor of each frequency beyond the original context."""

    proportion: float | None = None
    """proportional: share of the pairs that are rotated, by the frequencies that they have among
    all (Gemma 4)."""

    NEEDS = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
        ),
        "proportional": ("factor", "proportion"),
        "longrope": ("original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    }
    """The fields that each type has; it has no others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.NEEDS[self.rope_type]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if (value is None) == (field.name in needed):
                what = "missing" if value is None else "has no effect"
                raise CheckpointError(f"rope_scaling of type {self.rope_type}: {field.name} {what}")
            if type(value) in (int, float) and not is_positive(value):
                raise CheckpointError(f"rope_scaling: {field.name} is {value!r}; it must be positive")
        if self.proportion is not None and self.proportion > 1:
            raise CheckpointError(f"rope_scaling: proportion is {self.proportion}; it must be at most 1")

    def check_factors(self, count: int) -> None:
        """Raise CheckpointError unless longrope's lists hold `count` positive factors."""
        if self.rope_type != "longrope":
            return
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if len(factors) != count:
                raise CheckpointError(
                    f"rope_scaling: {name} has {len(factors)} values; there are {count} frequencies"
                )
            if bad := [factor for factor in factors if not is_positive(factor)]:
                raise CheckpointError(f"rope_scaling: {name} holds {bad[0]!r}; it must be positive")
