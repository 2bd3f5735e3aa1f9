"""Adapters that are live side by side: of a batch, each sequence goes through its own, or through
none.

A `Switchboard` belongs to one model: it names the adapter of each sequence of the next forward, and
the model's `SwitchedLinear` layers follow it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import CheckpointError
from litlora.frozen.few_rows import is_emulated
from litlora.frozen.linear import LINEAR, FrozenLinear, frozen_weight
from litlora.kernels.cpu import CompiledUpdate, Part, Scaled, compiled_update, is_few, project
from litlora.lora.adapter import Adapter
from litlora.lora.update import Update
from litlora.lora.variants import variant_named


class Way(NamedTuple):
    """What some sequences of a batch go through."""

    adapter: str | None
    """The adapter's name; None: the model alone."""
    strength: float = 1.0
    """A factor of its updates."""


BASE = Way(None)


class Group(NamedTuple):
    """Sequences of a batch that go through the same adapter."""

    adapter: str
    strength: float
    rows: Tensor | None
    """(n,): their numbers in the batch; None: all of them."""


class Switchboard:
    """Which adapter each sequence of the next forward goes through."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.size = 0
        """Sequences of the batch."""
        self._last: tuple[list[Way], torch.device] | None = None
        self._last_groups: list[Group] = []

    @contextmanager
    def set_to(self, ways: Sequence[Way], device: torch.device) -> Iterator[None]:
        """For the forwards inside the block: the way of each sequence of the batch."""
        if self._last != (asked := ([*ways], device)):
            # Not for each token: the host would wait until the device has the numbers of the rows.
            self._last, self._last_groups = asked, _groups(ways, device)
        self.groups, self.size = self._last_groups, len(ways)
        try:
            yield
        finally:
            self.groups = []


def _groups(ways: Sequence[Way], device: torch.device) -> list[Group]:
    distinct = [way for way in dict.fromkeys(ways) if way.adapter is not None and way.strength != 0]
    if len(set(ways)) == 1:
        return [Group(*way, None) for way in distinct]
    return [
        Group(*way, torch.tensor([i for i, other in enumerate(ways) if other == way], device=device))
        for way in distinct
    ]


@dataclass(frozen=True)
class LiveUpdate:
    """What an adapter adds to the outputs of one layer, ready for the layer's dtype."""

    A: Tensor | None
    """(r, in); None: the adapter changes the bias alone."""
    Bt: Tensor | None
    """(r, out)."""
    scale: float
    gain: Tensor | None
    """(out,): the factor that a variant puts on each output of W + s · B A; None: 1."""
    bias: Tensor | None
    """(out,): what the adapter's bias is beyond the layer's."""

    @cached_property
    def compiled(self) -> CompiledUpdate | None:
        """Its factors for compiled code; None where it is more than them, or there is none."""
        plain = self.A is not None and self.gain is None and self.bias is None
        return compiled_update(self.A, self.Bt) if plain else None

    def add_to(self, y: Tensor, x: Tensor, own_bias: Tensor | None, strength: float) -> None:
        """Add it to y (n, out), the layer's outputs of x (n, in), times the strength."""
        if self.A is not None:
            own = torch.float32 if self.gain is None and is_emulated(x) else x.dtype
            z = F.linear(x.to(own), self.A.to(own))  # (n, r)
            if own != y.dtype:
                y.copy_(torch.addmm(y.to(own), z, self.Bt.to(own), alpha=strength * self.scale))
            elif self.gain is None:
                y.addmm_(z, self.Bt, alpha=strength * self.scale)
            else:
                product = y if own_bias is None else y - own_bias
                changed = (self.gain - 1) * product + self.gain * self.scale * (z @ self.Bt)
                y.add_(changed.to(y.dtype), alpha=strength)
        if self.bias is not None:
            y.add_(self.bias, alpha=strength)

    def in_weight(self, W: Tensor, strength: float) -> Tensor:
        """W (out, in) with it, times the strength."""
        if self.A is None:
            return W
        changed = torch.addmm(W, self.Bt.t(), self.A, alpha=self.scale)
        if self.gain is not None:
            changed = self.gain[:, None] * changed
        return torch.lerp(W, changed, strength)


class SwitchedLinear(nn.Module):
    """A linear layer, and the updates that adapters have for it."""

    def __init__(self, linear: nn.Linear | FrozenLinear, board: Switchboard) -> None:
        super().__init__()
        self.linear, self.board = linear, board
        self.updates: dict[str, LiveUpdate] = {}
        self._last: tuple[Part | None, list[Group], Part | None] = (None, [], None)
        """The layer and the board's groups, and the layer with their update: what the last token needed."""

    def learn(self, adapter: str, update: LiveUpdate) -> None:
        """Have an update of this adapter."""
        self.updates[adapter] = update
        self._last = (None, [], None)

    def forget(self, adapter: str) -> None:
        """Have no updates of this adapter."""
        self.updates.pop(adapter, None)
        self._last = (None, [], None)

    @property
    def weight(self) -> Tensor:
        """W', (out, in), for code that reads it instead of calling the layer: all sequences of the
        forward must go one way."""
        W = self.linear.weight
        for adapter, strength, rows in self.board.groups:
            if (update := self.updates.get(adapter)) is not None:
                assert rows is None, "a weight is one for all sequences"
                W = update.in_weight(W, strength)
        return W

    @property
    def part(self) -> Part | None:
        """The layer for compiled code; None where an update is more than its factors, or there is none."""
        part, groups = getattr(self.linear, "part", None), self.board.groups
        last, last_groups, found = self._last
        if part is not last or groups is not last_groups:
            found = self._part(part, groups)
            self._last = part, groups, found
        return found

    def _part(self, part: Part | None, groups: list[Group]) -> Part | None:
        known = [group for group in groups if group.adapter in self.updates]
        if part is None or not known:
            return part
        updates: list[Scaled | None] = [None] * self.board.size
        for adapter, strength, rows in known:
            update = self.updates[adapter]
            if update.compiled is None:
                return None
            scaled = update.compiled, strength * update.scale
            if rows is None:
                return part.with_update(*scaled)
            for row in rows.tolist():
                updates[row] = scaled
        return part.with_updates(updates)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., in) -> (B, ..., out); B sequences, or any rows of which all go one way."""
        if is_few(x) and (part := self.part) is not None and (found := project(x, (part,))):
            return found[0]
        y = self.linear(x)
        for adapter, strength, rows in self.board.groups:
            if (update := self.updates.get(adapter)) is None:
                continue
            if rows is None:
                self._add(update, y, x, strength)
            else:
                part = y.index_select(0, rows)
                self._add(update, part, x.index_select(0, rows), strength)
                y.index_copy_(0, rows, part)
        return y

    def _add(self, update: LiveUpdate, y: Tensor, x: Tensor, strength: float) -> None:
        update.add_to(y.view(-1, y.size(-1)), x.reshape(-1, x.size(-1)), self.linear.bias, strength)


def live_updates(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> dict[str, LiveUpdate]:
    """What an adapter adds to each layer of a model, by the layer's name. Raises CheckpointError for
    an adapter that changes anything but linear layers, or does not fit."""
    biases = {name: tensor for name, tensor in adapter.whole.items() if name.endswith(".bias")}
    merge = "merge it (scripts/merge_lora.py) and use the result"
    if others := sorted(adapter.whole.keys() - biases.keys()):
        raise CheckpointError(
            f"{adapter.file}: replaces {others[0]} as a whole, so it cannot be switched on and off; {merge}"
        )
    names = {*adapter.updates, *(name.removesuffix(".bias") for name in biases)}
    found = {}
    for name in sorted(names):
        try:
            module = _plain(model.get_submodule(name))
        except AttributeError:
            raise CheckpointError(f"{adapter.file}: updates {name}, which the model does not have") from None
        if not isinstance(module, LINEAR):
            raise CheckpointError(
                f"{adapter.file}: changes {name}, which is not a linear layer, so it cannot be switched on "
                f"and off; {merge}"
            )
        update = adapter.updates.get(name)
        if update is not None and (not isinstance(update, Update) or update.kind != "linear"):
            raise CheckpointError(f"{adapter.file}: {name} is not updated by LoRA alone; {merge}")
        try:
            found[name] = _live(module, update, biases.get(f"{name}.bias"), dtype)
        except ValueError as error:
            raise CheckpointError(f"{adapter.file}: does not fit the model: {name} {error}") from None
    return found


def _live(
    module: nn.Linear | FrozenLinear, update: Update | None, bias: Tensor | None, dtype: torch.dtype
) -> LiveUpdate:
    """Raises ValueError for tensors of other sizes than the layer's."""
    weight = frozen_weight(module)
    more = None
    if bias is not None:
        if module.bias is None or module.bias.shape != bias.shape:
            raise ValueError("has no bias of this size")
        more = (bias.float().to(weight.device) - module.bias.float()).to(dtype)
    if update is None:
        return LiveUpdate(None, None, 0.0, None, more)
    if update.shape != tuple(weight.shape):
        raise ValueError(f"is {tuple(weight.shape)}, and its update {update.shape}")
    gain = variant_named(update.variant).gain(update, weight)
    A, B = (part.to(weight.device, dtype) for part in (update.A, update.B))
    return LiveUpdate(
        A.contiguous(), B.t().contiguous(), update.scale, None if gain is None else gain.to(dtype), more
    )


def _plain(module: nn.Module) -> nn.Module:
    return module.linear if isinstance(module, SwitchedLinear) else module


def switch_on(model: nn.Module, board: Switchboard, name: str, updates: dict[str, LiveUpdate]) -> None:
    """Make these updates available on the model as an adapter of this name."""
    for layer, update in updates.items():
        module = model.get_submodule(layer)
        if not isinstance(module, SwitchedLinear):
            module = SwitchedLinear(module, board)
            model.set_submodule(layer, module)
        module.learn(name, update)


def switch_off(model: nn.Module, name: str) -> None:
    """Forget an adapter; layers that no other one updates are plain again."""
    for layer, module in list(model.named_modules()):
        if isinstance(module, SwitchedLinear) and name in module.updates:
            module.forget(name)
            if not module.updates:
                model.set_submodule(layer, module.linear)
