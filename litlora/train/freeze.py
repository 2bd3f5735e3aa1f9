"""Which weights of a full fine-tune stay as they are."""

import re

from torch import nn

from litlora.errors import UserError, setting
from litlora.lora.select import names_matching
from litlora.model import shorten

_RANGE = re.compile(r"(.+\.)?(\d+)-(\d+)(\..+)?")
"""`layers.0-11`, or `layers.0-11.mlp`."""


def train_all_but(model: nn.Module, targets: list[str], *, adds_tokens: bool = False) -> None:
    """Mark every weight as trained but those that the targets mean: names of modules or weights, ends
    of these, ranges of layers, and regular expressions that match a whole name.

    A weight with two names, such as a tied embedding, is frozen by either. Raises UserError for a
    target that matches nothing, if nothing would train, and, if the run `adds_tokens`, where their
    rows would not.
    """
    model.requires_grad_()
    for target in targets:
        for part in spread(target, "freeze"):
            if not (weights := _meant(model, part)):
                leaves = dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules())
                there = ", ".join(leaf for leaf in leaves if leaf and not leaf.isdecimal())
                what = part if part == target else f"{target}: {part}"
                raise UserError(
                    f"{setting('freeze')} {what}: no module or weight has that name; modules: {there}"
                )
            for weight in weights:
                weight.requires_grad_(False)
    ends = [f"{name}.weight" for name in ("model.embed_tokens", "lm_head")] if adds_tokens else []
    if fixed := [name for name in ends if not model.get_parameter(name).requires_grad]:
        raise UserError(
            f"{setting('add_tokens')} and {setting('freeze')}: the rows of added tokens must train, and "
            f"{fixed[0]} is frozen; leave it out of {setting('freeze')}"
        )
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"{setting('freeze')} {', '.join(targets)}: freezes every weight, so nothing trains")


def frozen_notice(model: nn.Module) -> str:
    """The outermost modules all of whose weights are frozen, and other frozen weights: some names."""
    frozen = {
        name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad
    }
    found: list[str] = []
    for name, module in model.named_modules():
        inside = {f"{name}.{leaf}" for leaf, _ in module.named_parameters(remove_duplicate=False)}
        if inside and inside <= frozen:
            found.append(name)
            frozen -= inside
    return shorten([*found, *sorted(frozen)], 12)


def spread(target: str, option: str) -> list[str]:
    """The targets that a range stands for; else the target itself. Raises UserError, which names the
    setting `option`, for a range that is none."""
    if (found := _RANGE.fullmatch(target)) is None:
        return [target]
    first, last = int(found[2]), int(found[3])
    if not first <= last < first + 10_000:
        raise UserError(f"{setting(option)} {target}: {first}-{last} is not a range of layers")
    return [f"{found[1] or ''}{number}{found[4] or ''}" for number in range(first, last + 1)]


def _meant(model: nn.Module, target: str) -> list[nn.Parameter]:
    """The weights that a target names, and those of the modules that it names."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in (*weights, *modules) if name]
    meant = names_matching(target, names, "freeze")
    meant |= {name for name in names if name == target or name.endswith("." + target)}
    found = [weight for name, weight in weights.items() if name in meant]
    for name, module in modules.items():
        if name in meant:
            found += module.parameters()
    return found
