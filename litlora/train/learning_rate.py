"""The learning rate that `auto` stands for, and a word on settings that lie far from what was
measured.

The rule is that of tinker-cookbook's get_lr (Thinking Machines 2025, before a table of models took
its place):

    5e-5 · (2000 / hidden size)^0.781    for full fine-tuning, ten times that for LoRA

The factor of ten, and that it holds whatever the rank, are the findings of "LoRA Without Regret"
(Schulman et al. 2025). The exponent is the one for Llama, and is used for every family. A hidden size
below 800 counts as 800: beyond what the rule was found for, its rates learn the data faster and lose
more of what the base knew. What was measured with litlora stands in docs/learning_rate.md.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

from litlora.settings import AUTO, Finetune, LoRAConfig

OF_FULL_FINE_TUNING = 5e-5
REFERENCE_SIZE = 2000
EXPONENT = 0.781
SMALLEST_SIZE = 800
WITHOUT_RULE = 1e-4
"""Of full fine-tuning with an optimizer other than AdamW."""
MOST_TIMES = 10
"""A rate so many times above or below the rule's was measured to be far worse."""
SCALES, ALPHAS = (0.25, 8.0), (2.0, 64.0)
"""The scales alpha / rank that were measured, and the alphas: what the same rate can be good for.
Which of the two counts depends on the rank, so that only what is outside of both is doubtful."""


def auto_rate(hidden_size: int, times: float) -> float:
    """The rule's rate, to two digits: so many `times` full fine-tuning's."""
    rate = times * OF_FULL_FINE_TUNING * (REFERENCE_SIZE / max(hidden_size, SMALLEST_SIZE)) ** EXPONENT
    return float(f"{rate:.1e}")


def settle_learning_rate(settings: Finetune, hidden_size: int, say: Callable[[str], None]) -> Finetune:
    """The settings with a number in the place of `auto`. That is said with its reason; so is what
    lies far from what was measured."""
    train, times = settings.train, settings.AUTO_RATE_TIMES
    has_rule = "adamw" in train.optimizer
    auto = auto_rate(hidden_size, times) if has_rule else times * WITHOUT_RULE
    if train.learning_rate == AUTO:
        reason = f"no rule for {train.optimizer} was measured; better name one"
        if has_rule:
            size = f"{hidden_size:,}" if hidden_size >= SMALLEST_SIZE else f"{hidden_size:,}, at least 800"
            reason = f"{times:g} · 5e-5 · (2000 / hidden size {size})^0.781"
        say(f"learning rate: {auto:g} (auto: {reason})")
        settings = dataclasses.replace(settings, train=dataclasses.replace(train, learning_rate=auto))
    elif has_rule and not 1 / MOST_TIMES <= train.learning_rate / auto <= MOST_TIMES:
        say(f"note: learning_rate {train.learning_rate:g} is far from {auto:g}, which auto would take here")
    if (lora := getattr(settings, "lora", None)) is not None:
        for doubt in doubts(lora):
            say(f"note: {doubt}")
    return settings


def doubts(lora: LoRAConfig) -> Iterator[str]:
    """What lies far from what was measured."""
    scale = lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)
    size, alpha = abs(scale), abs(scale) * lora.rank
    for far, word in (
        (size < SCALES[0] and alpha < ALPHAS[0], "little"),
        (size > SCALES[1] and alpha > ALPHAS[1], "much"),
    ):
        if far:
            yield (
                f"alpha {lora.alpha:g} with rank {lora.rank} scales the update by {scale:.3g}, so that a "
                f"usual learning rate changes {word}; {SCALES[0]:g} to {SCALES[1]:g} were measured"
            )
