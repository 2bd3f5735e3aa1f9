"""Which layers of a model an adapter is for, and the rank, alpha and scale of each."""

import dataclasses
import math
import re
from collections import Counter

from torch import nn

from litlora.errors import UserError, setting
from litlora.frozen.linear import LINEAR, FrozenLinear, stored_weights
from litlora.lora.update import Update, scale_of
from litlora.settings import PRESETS, LoRAConfig
from litlora.settings.targets import ByTarget, in_preset, layer_number
from litlora.storage.patterns import MOST_SECONDS, Patterns, searched


def select_whole(model: nn.Module, modules_to_save: list[str], adapted: list[str]) -> list[str]:
    """The modules that modules_to_save means: names or ends of names. Raises UserError for a module
    that cannot be trained whole."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for target in modules_to_save:
        names = [name for name in modules if name == target or name.endswith("." + target)]
        if not names:
            raise UserError(f"{setting('modules_to_save')} {target}: no module has that name")
        for name in names:
            if reason := _why_not_whole(model, name, adapted):
                raise UserError(f"{setting('modules_to_save')} {target}: {reason}")
        found += names
    return found


def _why_not_whole(model: nn.Module, name: str, adapted: list[str]) -> str | None:
    """Why this module cannot be trained whole; None if it can."""
    if inside := [layer for layer in adapted if layer == name or layer.startswith(name + ".")]:
        return f"{inside[0]} has an adapter; leave it out of one of the two"
    if stored_weights(model.get_submodule(name)):
        return f"{name} holds quantized weights, which cannot be trained"
    weights = {id(parameter) for parameter in model.get_submodule(name).parameters()}
    if not weights:
        return f"{name} has no weights, so it cannot be trained by itself"
    named = model.named_parameters(remove_duplicate=False)
    if any(id(weight) in weights and not other.startswith(name + ".") for other, weight in named):
        return f"{name} shares its weight with another module, so it cannot be trained by itself"
    return None


def select_layers(model: nn.Module, targets: str | list[str]) -> list[str]:
    """The names of the linear layers and embeddings that targets mean, in the model's order.

    A target is a preset, a layer's name or the end of one (`q_proj`, `self_attn.q_proj`), or a
    regular expression that matches a whole name. An embedding is meant by its name alone. Raises
    UserError for a target that matches nothing and for a layer that cannot be adapted.
    """
    modules = dict(model.named_modules())
    asked = [targets] if isinstance(targets, str) else targets
    linears = [
        name
        for name, module in modules.items()
        if isinstance(module, LINEAR)
        or (isinstance(module, nn.Embedding) and any(_is_end(target, name) for target in asked))
    ]
    found_by = {target: _meant(target, linears, model) for target in asked}
    if missed := [target for target, found in found_by.items() if not found]:
        there = ", ".join(dict.fromkeys(map(_end, linears))) or "none"
        raise UserError(
            f"{setting('targets')} {', '.join(missed)}: no linear layer has that name; "
            f"presets: {', '.join(PRESETS)}; layers: {there}"
        )
    selected = [name for name in linears if any(name in found for found in found_by.values())]
    why_not = getattr(model, "why_not", lambda name: None)
    refused = {name: reason for name in selected if (reason := _why_not(modules, name) or why_not(name))}
    if refused:
        able = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in selected if name not in refused))
        name, reason = next(iter(refused.items()))
        others = f"choose other layers, here {able}" if able else "choose other layers"
        raise UserError(f"{setting('targets')}: {name} cannot be adapted: {reason}; {others}")
    return selected


def _meant(target: str, names: list[str], model: nn.Module) -> set[str]:
    """The layers among `names` that a target means. A model may know by itself what a preset means."""
    if target in PRESETS:
        own = getattr(model, "in_preset", in_preset)
        return {name for name in names if own(name, target)}
    return {name for name in names if _is_end(target, name)} | names_matching(target, names)


def _is_end(target: str, name: str) -> bool:
    """Whether a target is a layer's name or the end of it."""
    return name == target or name.endswith("." + target)


def _end(name: str) -> str:
    """The last part of a name that means something by itself: altup_projections.0, and not 0."""
    before, _, last = name.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdecimal() else last


def in_layers(names: list[str], config: LoRAConfig) -> list[str]:
    """Those of the chosen layers that are in one of layers_to_transform. Raises UserError for a number
    that none of them has."""
    if (wanted := config.layers_to_transform) is None:
        return names
    numbers = {name: layer_number(name) for name in names}
    if outside := [name for name in names if numbers[name] is None]:
        raise UserError(
            f"{setting('layers_to_transform')} and {setting('targets')}: {', '.join(outside)} is in no "
            f"layer; leave it out of {setting('targets')}"
        )
    if missed := [str(number) for number in wanted if number not in numbers.values()]:
        there = sorted(set(numbers.values()))
        more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        raise UserError(
            f"{setting('layers_to_transform')} {missed[0]}{more}: none of the layers that "
            f"{setting('targets')} chooses has that number; they have {there[0]} to {there[-1]}"
        )
    return [name for name in names if numbers[name] in wanted]


def names_matching(text: str, names: list[str], option: str = "targets") -> set[str]:
    """The names that a regular expression matches as a whole: in linear time, or, if it has what that
    engine lacks (look-around, references, a repeated part that may be empty), by `re`, for some
    seconds at most. Raises UserError, which names the setting `option`, for text that is not one."""
    try:
        patterns = Patterns([text], ends=False)
    except ValueError:
        pass
    else:
        return {name for name in names if patterns.first(name) is not None}
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{setting(option)} {text}: neither a layer's name nor a regular expression ({error})"
        ) from None
    if (found := searched(text, names)) is None:
        raise UserError(
            f"{setting(option)} {text}: takes longer than {MOST_SECONDS} s to match with the names of the "
            "layers; write it without repetitions of repetitions, or name the layers"
        )
    return found


def _why_not(modules: dict[str, nn.Module], name: str) -> str | None:
    """Why an adapter on this layer would do nothing or the wrong thing; None if it can be
    adapted."""
    layer, parent = modules[name], modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight and never calls it"
    if isinstance(layer, nn.Embedding):
        odd = layer.max_norm is not None or layer.padding_idx is not None or layer.sparse
        if odd or type(layer).forward is not nn.Embedding.forward:
            return "it is an embedding that does more than look up rows"
    elif type(layer).forward not in (nn.Linear.forward, FrozenLinear.forward):
        return f"its class {type(layer).__name__} computes something else than W x + b"
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized, so it cannot be replaced by a merged one"
    return None


def check_patterns(config: LoRAConfig, names: list[str]) -> None:
    """Raise UserError for a pattern of ranks or alphas that matches none of the chosen layers."""
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option)
        means = {target: ByTarget({target: True}) for target in patterns if target not in names}
        if missed := [t for t, it in means.items() if not any(it.value(name, False) for name in names)]:
            raise UserError(
                f"{setting(option)} {', '.join(missed)}: matches none of the layers "
                f"that {setting('targets')} chooses"
            )


def layer_rank(config: LoRAConfig, name: str) -> int:
    """The rank of the update of one layer."""
    return config.ranks.value(name, config.rank)


def layer_alpha(config: LoRAConfig, name: str) -> float:
    """The alpha of the update of one layer."""
    return config.alphas.value(name, config.alpha)


def layer_scale(config: LoRAConfig, name: str) -> float:
    """The factor in front of B A of one layer."""
    return scale_of(layer_alpha(config, name), layer_rank(config, name), rslora=config.rslora)


def settings_for(updates: dict[str, Update], like: LoRAConfig) -> LoRAConfig:
    """Settings that give every update its rank and its scale; `like` itself if it already does."""

    def matches(name: str, update: Update) -> bool:
        return layer_rank(like, name) == update.rank and math.isclose(
            layer_scale(like, name), update.scale, rel_tol=1e-12
        )

    if all(matches(name, update) for name, update in updates.items()):
        return like
    ranks = {name: update.rank for name, update in updates.items()}
    # 14 digits: dividing and multiplying makes 16.000000000000004 of 16
    alphas = {
        name: float(f"{u.scale * (math.sqrt(u.rank) if like.rslora else u.rank):.14g}")
        for name, u in updates.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return dataclasses.replace(
        like,
        rank=rank,
        alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )
