"""Which layers of a model an adapter is for, and the rank, alpha and scale of each."""

import re
from typing import Any

from torch import nn

from litlora.errors import UserError
from litlora.lora.update import scale_of
from litlora.settings import PRESETS, LoRAConfig

_SUFFIXES = {"qv": ("q_proj", "v_proj"), "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
OUTPUT_HEAD = "lm_head"


def select_whole(model: nn.Module, modules_to_save: list[str], adapted: list[str]) -> list[str]:
    """The modules that modules_to_save means: names or ends of names. Raises UserError for one that
    cannot train whole."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for target in modules_to_save:
        names = [name for name in modules if name == target or name.endswith("." + target)]
        if not names:
            raise UserError(f"--lora.modules_to_save {target}: no module of that name")
        for name in names:
            inside = [layer for layer in adapted if layer == name or layer.startswith(name + ".")]
            if inside:
                raise UserError(
                    f"--lora.modules_to_save {target}: {inside[0]} has an adapter; leave it out of one of the two"
                )
            weights = {id(parameter) for parameter in modules[name].parameters()}
            shared = [
                other for other, p in model.named_parameters(remove_duplicate=False) if id(p) in weights
            ]
            if not weights or any(not other.startswith(name + ".") for other in shared):
                why = "has no weights" if not weights else "shares its weight with another module"
                raise UserError(
                    f"--lora.modules_to_save {target}: {name} {why}, so it cannot be trained by itself"
                )
        found += names
    return found


def select_layers(model: nn.Module, targets: str | list[str]) -> list[str]:
    """The names of the linear layers that targets mean, in the model's order.

    A target is a preset, a layer's name or the end of one (`q_proj`, `self_attn.q_proj`), or a
    regular expression that matches a whole name. Raises UserError for a target that matches no
    linear layer and for a layer that cannot be adapted.
    """
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    asked = [targets] if isinstance(targets, str) else targets
    found_by = {target: [name for name in linears if matches(name, target)] for target in asked}
    if missed := [target for target, found in found_by.items() if not found]:
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears)) or "none"
        raise UserError(
            f"--lora.targets {', '.join(missed)}: no linear layer of that name; presets: {', '.join(PRESETS)}; layers: {there}"
        )
    selected = [name for name in linears if any(name in found for found in found_by.values())]
    refused = {name: reason for name in selected if (reason := _why_not(modules, name))}
    if refused:
        able = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in selected if name not in refused))
        name, reason = next(iter(refused.items()))
        raise UserError(
            f"--lora.targets: {name} cannot be adapted: {reason}; "
            + (f"name others, here {able}" if able else "name others")
        )
    return selected


def matches(name: str, target: str) -> bool:
    leaf = name.rpartition(".")[2]
    if target == "all-linear":
        return leaf != OUTPUT_HEAD
    if target in _SUFFIXES:
        return leaf in _SUFFIXES[target]
    if name == target or name.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(
            f"--lora.targets {target}: neither a layer's name nor a regular expression ({error})"
        ) from None


def _why_not(modules: dict[str, nn.Module], name: str) -> str | None:
    """Why an adapter on this layer would do nothing or the wrong thing; None if it can be
    adapted."""
    layer, parent = modules[name], modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight and never calls it"
    if type(layer).forward is not nn.Linear.forward:
        return f"its class {type(layer).__name__} computes something else than W x + b"
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized, so it cannot be replaced by a merged one"
    return None


def layer_rank(config: LoRAConfig, name: str) -> int:
    """The rank of the update of one layer."""
    return _by_pattern(config.rank_pattern, name, config.rank)


def layer_alpha(config: LoRAConfig, name: str) -> float:
    """The alpha of the update of one layer."""
    return _by_pattern(config.alpha_pattern, name, config.alpha)


def layer_scale(config: LoRAConfig, name: str) -> float:
    """The factor in front of B A of one layer."""
    return scale_of(layer_alpha(config, name), layer_rank(config, name), rslora=config.rslora)


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    if name in pattern:  # an imported adapter may name every layer: no search then
        return pattern[name]
    return next((value for target, value in pattern.items() if matches(name, target)), default)
