"""LoRA on any `nn.Module`: wrap linear layers, train, merge, unmerge, unwrap.

h = W x + b + s · B A x, with A (r, in), B (out, r) and s = alpha / r (Hu et al. 2021,
arXiv:2106.09685), or alpha / √r where the settings ask for it (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732).

    add_lora(model, config)      wraps the layers that config.targets names and freezes everything else
    merge_lora(model)            folds every update into its W, in place; outputs stay the same up to rounding
    unmerge_lora(model)          puts back the very bits of every W
    unwrap_lora(model)           plain nn.Linear layers again, with plain names: merged if merged, else the base
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litlora.errors import UserError
from litlora.kernels import lora as kernels
from litlora.settings import PRESETS, LoRAConfig

_SUFFIXES = {"qv": ("q_proj", "v_proj"), "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
OUTPUT_HEAD = "lm_head"


class LoRALinear(nn.Module):
    """A linear layer and its low-rank update. The wrapped layer is frozen and keeps its dtype."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        *,
        rslora: bool = False,
    ) -> None:
        """A is Kaiming-uniform with a = √5, B zero: a fresh adapter changes nothing. `dtype` is
        that of A and B."""
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.scale = scale_of(alpha, rank, rslora=rslora)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = dropout
        self._base_weight: nn.Parameter | None = None  # W's own tensor, while the update is folded in

    @property
    def merged(self) -> bool:
        """Whether the update is folded into W."""
        return self._base_weight is not None

    @property
    def weight(self) -> Tensor:
        """The effective weight W + s · B A, (out, in).

        Code that reads a layer's weight and skips its forward, as `nn.TransformerEncoderLayer` does
        in eval mode, thus still meets the update.
        """
        return (
            self.linear.weight
            if self.merged
            else merged_weight(self.linear.weight, self.lora_A, self.lora_B, self.scale)
        )

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.linear(x)
        if not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)):
            return kernels.project_one(x, _frozen(self))
        keep = _dropout_mask(x, (self,))
        return (kernels.project if _fused(x) else kernels.plain_project)(x, [_frozen(self)], keep)[0]

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Fold the update into W, once however often it is called; returns the wrapped layer, for
        `set_submodule`."""
        if not self.merged:
            base = self.linear.weight
            merged = merged_weight(base, self.lora_A, self.lora_B, self.scale)
            self.linear.weight = nn.Parameter(merged, requires_grad=False)
            self._base_weight = base
        return self.linear

    def unmerge(self) -> None:
        """Put back W as it was: the same tensor, so the same bits."""
        if self.merged:
            self.linear.weight = self._base_weight
            self._base_weight = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(
            f"{prefix}_base_weight", None
        )  # a parameter, so that it follows W to other devices and dtypes

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, merged={self.merged}"


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Several linear layers of one input x (..., in): a tuple of (..., out). Frozen ones go through
    one fused function.

    In training, the updates share one dropout mask of x, and hooks of the modules are not called.
    """
    layers = [_frozen(linear) for linear in linears]
    if (
        None in layers
        or not _fused(x)
        or len({linear.dropout for linear in linears if type(linear) is LoRALinear}) > 1
    ):
        return tuple(linear(x) for linear in linears)
    return kernels.project(x, layers, _dropout_mask(x, linears))


def gated_mlp(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module, activation: str) -> Tensor:
    """down(activation(gate(x)) · up(x)) for three linear layers, in one fused function if they are
    frozen."""
    layers = [_frozen(linear) for linear in (gate, up, down)]
    if (
        None in layers
        or not _fused(x)
        or len({linear.dropout for linear in (gate, up) if type(linear) is LoRALinear}) > 1
    ):
        g, u = project(x, gate, up)
        return project(kernels.ACTIVATIONS[activation](g) * u, down)[0]
    keep = _dropout_mask(x, (gate, up))
    keep_inner = _dropout_mask(x.new_empty(*x.shape[:-1], down.in_features), (down,))
    return kernels.gated_mlp(x, *layers, activation, keep, keep_inner)


def _fused(x: Tensor) -> bool:
    """Whether the fused functions are of use: they are for the backward, and autocast would not
    reach into them."""
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def _frozen(linear: nn.Module) -> kernels.Layer | None:
    """What the kernels need of a frozen linear layer and its update; None for a layer whose own
    weight trains or that is no linear one."""
    if type(linear) is LoRALinear:
        if linear.merged:
            return _frozen(linear.linear)
        scale = linear.scale
        if linear.training:
            scale /= 1 - kernels.dropout_share(linear.dropout)
        return kernels.Layer(linear.linear.weight, linear.linear.bias, linear.lora_A, linear.lora_B, scale)
    if type(linear) is not nn.Linear or linear.weight.requires_grad:
        return None
    return kernels.Layer(linear.weight, linear.bias)


def _dropout_mask(x: Tensor, linears: Sequence[nn.Module]) -> Tensor | None:
    """The mask that the updates of these layers share in training."""
    shares = [
        linear.dropout
        for linear in linears
        if type(linear) is LoRALinear and not linear.merged and linear.training
    ]
    return kernels.dropout_mask(x, max(shares)) if any(shares) else None


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor in front of B A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def fitting(factor: float, what: str) -> float:
    """The factor of an update, if fp32 can hold it. Raises UserError that begins with `what`."""
    if not abs(factor) <= torch.finfo(torch.float32).max:
        raise UserError(f"{what}: times {factor:g}, which is beyond fp32; name a smaller strength or weight")
    return factor


def layer_rank(config: LoRAConfig, name: str) -> int:
    """The rank of the update of one layer."""
    return _by_pattern(config.rank_pattern, name, config.rank)


def layer_alpha(config: LoRAConfig, name: str) -> float:
    """The alpha of the update of one layer."""
    return _by_pattern(config.alpha_pattern, name, config.alpha)


def layer_scale(config: LoRAConfig, name: str) -> float:
    """The factor in front of B A of one layer."""
    return scale_of(layer_alpha(config, name), layer_rank(config, name), rslora=config.rslora)


def stored_config(lora: dict[str, Any]) -> LoRAConfig:
    """The settings of an adapter, from the "lora" entry of its file. Raises UserError for a value
    that is out of range."""
    known = {field.name for field in dataclasses.fields(LoRAConfig)}
    return LoRAConfig(**{name: value for name, value in lora.items() if name in known})


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    if name in pattern:  # an imported adapter may name every layer: no search then
        return pattern[name]
    return next((value for target, value in pattern.items() if _matches(name, target)), default)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """W + scale · B A in fp32 or better, rounded once to W's dtype: (out, in)."""
    exact = torch.promote_types(weight.dtype, torch.float32)  # fp32: a sum in bf16 would round twice
    return torch.addmm(weight.to(exact), lora_B.to(exact), lora_A.to(exact), alpha=scale).to(weight.dtype)


def add_lora(model: nn.Module, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> list[str]:
    """Wrap the linear layers that `config.targets` names and freeze everything else; returns their
    names.

    Raises UserError if a target matches nothing, names a layer whose forward is not its own, or is
    too small for the rank.
    """
    names = select_layers(model, config.targets)
    for option, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if missed := [target for target in pattern if not any(_matches(name, target) for name in names)]:
            raise UserError(
                f"--lora.{option} {', '.join(missed)}: matches none of the layers that --lora.targets chooses"
            )
    for name in names:
        linear, rank = model.get_submodule(name), layer_rank(config, name)
        if rank > (most := min(linear.in_features, linear.out_features)):
            option = "rank" if rank == config.rank else "rank_pattern"
            raise UserError(
                f"--lora.{option} {rank}: {name} is {linear.out_features} x {linear.in_features}, so its rank can be {most} at most"
            )
    whole = select_whole(model, config.modules_to_save, names)
    attach_lora(model, names, config, dtype)
    for name in whole:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = (
                parameter.data.clone()
            )  # the base's own tensor may be asked for its fingerprint later
            parameter.requires_grad_(True)
    return names


def attach_lora(
    model: nn.Module, names: list[str], config: LoRAConfig, dtype: torch.dtype = torch.float32
) -> None:
    """Wrap the linear layers of these exact names and freeze everything else."""
    model.requires_grad_(False)
    wrapped: dict[nn.Module, LoRALinear] = {}
    for name, module in list(
        model.named_modules(remove_duplicate=False)
    ):  # one layer under two names stays one layer
        if name in names or module in wrapped:
            if module not in wrapped:
                rank, alpha = layer_rank(config, name), layer_alpha(config, name)
                wrapped[module] = LoRALinear(module, rank, alpha, config.dropout, dtype, rslora=config.rslora)
            model.set_submodule(name, wrapped[module])


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter of a model into its W, in place."""
    for layer in _lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Take every adapter of a model out of its W again, to the bit."""
    for layer in _lora_layers(model).values():
        layer.unmerge()


def unwrap_lora(model: nn.Module) -> None:
    """Replace every LoRALinear by the plain layer in it: merged if it was merged, else without its
    adapter."""
    for name, layer in _lora_layers(model).items():
        model.set_submodule(name, layer.linear)


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The A and B of every adapter of a model and whatever trains beside them, by their names in
    it."""
    adapters = {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in _lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    }
    return adapters | {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name not in adapters
    }


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
    if _lora_layers(model):
        raise UserError("the model already has an adapter; merge it or unwrap it first")
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    asked = [targets] if isinstance(targets, str) else targets
    matches = {target: [name for name in linears if _matches(name, target)] for target in asked}
    if missed := [target for target, found in matches.items() if not found]:
        there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears)) or "none"
        raise UserError(
            f"--lora.targets {', '.join(missed)}: no linear layer of that name; presets: {', '.join(PRESETS)}; layers: {there}"
        )
    selected = [name for name in linears if any(name in found for found in matches.values())]
    refused = {name: reason for name in selected if (reason := _why_not(modules, name))}
    if refused:
        able = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in selected if name not in refused))
        name, reason = next(iter(refused.items()))
        raise UserError(
            f"--lora.targets: {name} cannot be adapted: {reason}; "
            + (f"name others, here {able}" if able else "name others")
        )
    return selected


def _matches(name: str, target: str) -> bool:
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


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear)
    }
