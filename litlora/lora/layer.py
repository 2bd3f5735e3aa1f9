"""LoRA on any `nn.Module`: wrap linear layers, train, merge, unmerge, unwrap.

h = W x + b + s · B A x, with A (r, in), B (out, r) and s = alpha / r (Hu et al. 2021,
arXiv:2106.09685), or alpha / √r where the settings ask for it (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732).

    add_lora(model, config)      wraps the layers that config.targets names and freezes everything else
    merge_lora(model)            folds every update into its W, in place; outputs stay the same up to rounding
    unmerge_lora(model)          puts back the very bits of every W
    unwrap_lora(model)           plain nn.Linear layers again, with plain names: merged if merged, else the base
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litlora.errors import UserError
from litlora.kernels import lora as kernels
from litlora.lora.adapter import Adapter
from litlora.lora.select import layer_alpha, layer_rank, matches, select_layers, select_whole
from litlora.lora.update import Update, scale_of
from litlora.lora.variants import variant_named
from litlora.settings import LoRAConfig


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
        variant: str = "lora",
    ) -> None:
        """A fresh adapter as its variant starts it: plain LoRA changes nothing at first. `dtype` is
        that of A and B."""
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = scale_of(alpha, rank, rslora=rslora)
        self.variant = variant_named(variant)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, dtype=dtype, device=device))
        self.variant.start(self)
        self._base_weight: nn.Parameter | None = None  # W's own tensor, while the update is folded in

    @property
    def merged(self) -> bool:
        """Whether the update is folded into W."""
        return self._base_weight is not None

    @property
    def update(self) -> Update:
        """The update as it stands: its tensors are the layer's own parameters."""
        extra = {name: getattr(self, name) for name in self.variant.extra}
        return Update(self.lora_A, self.lora_B, self.scale, variant=self.variant.name, extra=extra)

    @torch.no_grad()
    def load_update(self, update: Update) -> None:
        """Copy the tensors of an update into this layer's. Raises UserError if they do not fit."""
        for name, tensor in update.tensors().items():
            own = getattr(self, name)
            if own.shape != tensor.shape:  # copying would stretch a single row
                raise UserError(f"{name} is {tuple(tensor.shape)}, not {tuple(own.shape)}")
            own.copy_(tensor)

    @property
    def weight(self) -> Tensor:
        """The effective weight W', (out, in).

        Code that reads a layer's weight and skips its forward, as `nn.TransformerEncoderLayer` does
        in eval mode, thus still meets the update.
        """
        return self.linear.weight if self.merged else self.update.added_to(self.linear.weight)

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
        if not self.variant.is_plain:
            return self.variant.forward(self, x)
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
            self.linear.weight = nn.Parameter(self.update.added_to(base), requires_grad=False)
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
        if not linear.variant.is_plain:
            return None
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


def add_lora(model: nn.Module, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> list[str]:
    """Wrap the linear layers that `config.targets` names and freeze everything else; returns their
    names.

    Raises UserError if a target matches nothing, names a layer whose forward is not its own, or is
    too small for the rank.
    """
    if _lora_layers(model):
        raise UserError("the model already has an adapter; merge it or unwrap it first")
    names = select_layers(model, config.targets)
    for option, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if missed := [target for target in pattern if not any(matches(name, target) for name in names)]:
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
                wrapped[module] = LoRALinear(
                    module, rank, alpha, config.dropout, dtype, rslora=config.rslora, variant=config.variant
                )
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


def lora_updates(model: nn.Module) -> dict[str, Update]:
    """The update of every adapted layer of a model, by the layer's name."""
    return {name: layer.update for name, layer in _lora_layers(model).items()}


def adapter_of(model: nn.Module, config: LoRAConfig) -> Adapter:
    """What trains in a model that `add_lora` prepared: every update, and what trains whole."""
    updates = {name: update.detached() for name, update in lora_updates(model).items()}
    inside = {f"{layer}.{name}" for layer, update in updates.items() for name in update.tensors()}
    whole = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in inside
    }
    return Adapter(config, updates, whole)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear)
    }
