"""Mixtures of experts: MLPs of which a router picks some for each token."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.frozen.linear import frozen_weight
from litlora.frozen.stack import Beside
from litlora.lora.grouped import GroupedLinear, frozen_parameter, grouped, unwrapped
from litlora.model.mlp import MLP
from litlora.model.norms import make_norm
from litlora.model.router import ExpertRouter, Router, ScaledRouter


class MixtureOfExperts(nn.Module):
    """Each token goes through the experts that its router picks, and through the shared expert if
    there is one (Jiang et al. 2024, arXiv:2401.04088). The names are those of the families: a shared
    expert without a gate is called shared_experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scales_inputs = bool(config.scale_expert_inputs)
        self.gate = ExpertRouter(config)
        self.experts = make_experts(config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Router(config.hidden_size, 1)
        self.shared_experts = None
        if config.shared_experts_intermediate_size is not None:
            self.shared_experts = MLP(config, config.shared_experts_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))  # (B, T, C) -> (N, C)
        shares, picked = self.gate.pick(tokens)
        if self.scales_inputs:
            # A row for each of a token's experts, which picks that one.
            scaled = (tokens[:, None] * shares[..., None]).to(tokens.dtype)  # (N, num_picked, C)
            rows, ones = scaled.flatten(0, 1), torch.ones_like(shares).view(-1, 1)
            y = mixed(self.experts, rows, ones, picked.view(-1, 1)).view_as(scaled).sum(dim=1)
        else:
            y = mixed(self.experts, tokens, shares, picked)
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        return y.view_as(x)


class WithExperts(nn.Module):
    """A block's part in experts beside its MLP, each of the two with norms of its own (Gemma 4). A class
    to inherit from, since the family's names lie in the block."""

    def add_experts(self, config: ModelConfig) -> None:
        """Add the modules, if the architecture has them."""
        self.router = None
        if config.enable_moe_block:
            self.router, self.experts = ScaledRouter(config), make_experts(config)
            self.post_feedforward_layernorm_1 = make_norm(config)
            self.pre_feedforward_layernorm_2 = make_norm(config)
            self.post_feedforward_layernorm_2 = make_norm(config)

    def with_experts(self, fed: Tensor, x: Tensor) -> Tensor:
        """What the MLP gives (B, T, C), and what the experts make of x (B, T, C), which has no norm yet."""
        if self.router is None:
            return fed
        tokens = x.reshape(-1, x.size(-1))  # (N, C)
        y = mixed(self.experts, self.pre_feedforward_layernorm_2(tokens), *self.router.pick(tokens))
        return self.post_feedforward_layernorm_1(fed) + self.post_feedforward_layernorm_2(y).view_as(fed)


LAYERS = ("gate_proj", "up_proj", "down_proj")
"""Of an expert, in the order in which they compute; a plain one has no gate."""


class Experts(nn.ModuleList):
    """The experts of a layer: MLPs of one size. On a GPU their weights lie beside each other, so that
    all are computed at once."""

    def __init__(self, experts: Iterable[MLP] = ()) -> None:
        super().__init__(experts)
        self.at_once = False
        """Whether all are computed in grouped products, where these can be: otherwise one by one."""
        self._together: dict[str, Beside] = {}
        """Of each of their layers, by its name: the weights of all."""

    def lay_together(self) -> None:
        """Put the frozen weights of each layer of all experts beside each other, those in few bits
        excepted, and compute them at once from now on."""
        self.at_once = True
        for name in LAYERS:
            weights = [frozen_parameter(getattr(expert, name)) for expert in self]
            if any(weight is None for weight in weights):
                self._together.pop(name, None)
            elif name not in self._together or not self._together[name].holds(weights):
                self._together[name] = Beside(weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Experts":
        super()._apply(fn, recurse)
        if frozen_weight(unwrapped(self[0].up_proj)).device.type == "cuda":
            self.lay_together()
        else:
            self.at_once, self._together = False, {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_together": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.at_once:  # the weights of a copy lie apart
            self.lay_together()

    def outputs(self, rows: Tensor, counts: Tensor, experts: Tensor) -> Tensor:
        """What each expert gives of its rows: rows (N, C), sorted by expert, counts (E,) of them and
        experts (N,), the number of each -> (N, C). On a device, nothing waits unless a loop over the
        experts must know the counts."""
        layers = self._grouped(rows)
        if layers is None:
            return self._one_by_one(rows, counts)
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = self[0].inner(*(layer(rows, ends, experts) for layer in layers[:-1]))
        return layers[-1](inner, ends, experts)

    def _grouped(self, rows: Tensor) -> list[GroupedLinear] | None:
        """The layers of all experts as one each; None if they are to be computed one by one: few rows
        pick few experts, and need only those."""
        first = self[0]
        is_mixed = torch.is_autocast_enabled(rows.device.type)
        if not self.at_once or is_mixed or first.act_fn is not None or len(rows) < len(self):
            return None
        layers = []
        for name in (name for name in LAYERS if getattr(first, name) is not None):
            linears = [getattr(expert, name) for expert in self]
            layer = grouped(linears, self._together.get(name), rows.dtype)
            if layer is None:
                return None
            layers.append(layer)
        return layers

    def _one_by_one(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = rows.split(counts.tolist())
        outputs = [
            expert(part)
            for expert, part in zip(self, parts, strict=True)
            # In training, an expert that no token picked runs on no rows: its gradient is then zero
            # instead of absent. Without any token all run: torch.cat needs one of them.
            if len(part) or torch.is_grad_enabled() or not len(rows)
        ]
        return torch.cat(outputs)


def make_experts(config: ModelConfig) -> Experts:
    """The experts of a layer."""
    size, bias = config.moe_intermediate_size, config.expert_bias
    return Experts(MLP(config, size, bias=bias) for _ in range(config.num_experts))


def mixed(experts: Experts, tokens: Tensor, shares: Tensor, picked: Tensor) -> Tensor:
    """The sum of what the picked experts give, each times its share: tokens (N, C), shares and picked
    (N, num_picked) -> (N, C)."""
    # Each token's experts in ascending order: the sum does not depend on their scores' order.
    picked, places = picked.sort(dim=-1)
    shares = shares.gather(-1, places)
    order = picked.flatten().argsort(stable=True)
    # Not bincount, which on a GPU makes the host wait for the largest value.
    numbers = torch.arange(len(experts), device=picked.device)
    counts = (picked.flatten()[:, None] == numbers).sum(dim=0)
    # A copy for each place, and then permutations only: neither direction adds into a row
    # twice, which on a GPU would happen in any order.
    copies = tokens[:, None].expand(-1, picked.size(1), -1).flatten(0, 1)
    outputs = experts.outputs(copies.index_select(0, order), counts, picked.flatten()[order])
    weighted = (outputs * shares.flatten()[order, None]).to(tokens.dtype)
    parts = weighted.index_select(0, order.argsort()).unflatten(0, shares.shape)
    y = parts[:, 0]
    for place in range(1, picked.size(1)):
        y = y + parts[:, place]
    return y
