"""Learning rates of some weights: how many times the schedule's each is. LoRA+ (Hayou et al. 2024,
arXiv:2402.12354) is such a ratio for every B."""

from collections import Counter
from collections.abc import Iterable

from litlora.errors import UserError, setting
from litlora.lora.select import names_matching
from litlora.lora.update import LORA_B
from litlora.settings import TrainConfig
from litlora.train.freeze import spread

OPTION = "learning_rate_ratios"


def rate_ratios(names: Iterable[str], config: TrainConfig) -> dict[str, float]:
    """The ratio of each of these weights that has one; the first target that means a weight counts.

    Raises UserError for a target that means none, or only weights that an earlier one means.
    """
    if config.loraplus_lr_ratio != 1:
        ratio = config.loraplus_lr_ratio
        return {name: ratio for name in names if name.endswith(LORA_B)}
    left, found = list(names), {}
    for target, ratio in config.learning_rate_ratios.items():
        meant = set().union(*(_meant(part, [*found, *left]) for part in spread(target, OPTION)))
        if not (chosen := meant.intersection(left)):
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in (*found, *left)))
            why = f"no weight that trains has that name; what trains ends with: {kinds}"
            if meant:
                why = "means only weights that an earlier target means, and the first counts"
            raise UserError(f"{setting(OPTION)} {target}: {why}")
        found |= dict.fromkeys(chosen, ratio)
        left = [name for name in left if name not in found]
    return found


def _meant(target: str, weights: list[str]) -> set[str]:
    """The weights that a target means: by their name, by that of a module around them, by the end of
    either, or as a regular expression that matches one of them whole."""
    around = {name: [name[:place] for place, sign in enumerate(name) if sign == "."] for name in weights}
    places = [name for inside in around.values() for name in inside]
    matching = names_matching(target, list(dict.fromkeys([*weights, *places])), OPTION)
    return {
        name
        for name, inside in around.items()
        if f".{target}." in f".{name}." or not matching.isdisjoint([name, *inside])
    }


def described_rates(names: Iterable[str], config: TrainConfig) -> str | None:
    """The ratios and how many weights have each, in a line; None if all have the schedule's rate."""
    names = list(names)
    ratios = rate_ratios(names, config)
    if not ratios:
        return None
    parts = [f"{ratio:g} times for {count} weights" for ratio, count in Counter(ratios.values()).items()]
    rest = len(names) - len(ratios)
    return f"learning rate: {', '.join(parts)}" + (f"; the other {rest} follow the schedule" if rest else "")
