"""An adapter: the updates of some layers, tensors that replace others, its settings and its base."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from litlora.errors import CheckpointError, UserError
from litlora.frozen.low_rank import LowRank
from litlora.frozen.quantize import QuantizedBase
from litlora.lora.rows import TokenRows
from litlora.lora.select import layer_rank, layer_scale
from litlora.lora.update import LORA_A, LORA_B, PREFIX, Update
from litlora.lora.variants import variant_named
from litlora.settings import LoRAConfig, stored_values
from litlora.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class BaseReference:
    """Which weights an adapter was trained on."""

    path: str
    """Relative to the adapter's directory, so that a tree can be moved."""
    absolute_path: str
    """So that the adapter alone can be moved."""
    fingerprint: str | None
    """None: the adapter's format does not tell."""
    quantized: QuantizedBase | None = None
    """In what few bits it was while the adapter trained; None: as its files hold it."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to the model that it was trained on, whatever format it came from."""

    config: LoRAConfig
    updates: dict[str, Update]
    """By the layer's name."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that replace the base's, by name."""
    base: BaseReference | None = None
    file: Path | None = None
    """Where it was read from: what an error about it names."""
    described: dict[str, Any] | None = None
    """Its settings to the letter of the file; None: those of `config`."""
    text_facts: dict[str, str] | None = None
    """What the text that it was trained on depends on: see `litlora.text_facts`."""
    rows: TokenRows | None = None
    """The rows of tokens that it adds. With its base at hand, `whole` has the weights that they make."""

    order: tuple[str, ...] = ()
    """The names of its tensors in the order in which a file holds them; none: updates first."""
    kind: ClassVar[str] = "adapter"

    @property
    def directory(self) -> Path:
        """The directory that it was read from."""
        return self.file.parent

    @property
    def needs_quantised(self) -> bool:
        """Whether it makes up for what quantising its base lost (LoftQ), so that it fits the base in
        these few bits and no other."""
        return self.config.loftq_iterations > 0

    @property
    def has_own_base(self) -> bool:
        """Whether a part was taken out of its base before that was quantised, so that the base in these
        bits is no model without it."""
        return (
            self.base is not None and self.base.quantized is not None and bool(self.base.quantized.taken_out)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What a file stores as "lora"."""
        return stored_values(self.config) if self.described is None else self.described

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by the name that a file has for it."""
        named = {
            f"{layer}.{name}": tensor
            for layer, update in self.updates.items()
            for name, tensor in update.tensors().items()
        }
        made = self.rows.tensors if self.rows else {}
        named |= {name: tensor for name, tensor in self.whole.items() if name not in made}
        named |= self.rows.named() if self.rows else {}
        named |= named_factors(self.base.quantized.taken_out) if self.has_own_base else {}
        return {name: named[name] for name in self.order} if self.order else named

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the adapter: its tensors, its settings and its base's fingerprint."""
        facts = {"lora": self.settings, "base": self.base.fingerprint if self.base else None}
        if self.rows:
            facts["tokens"] = [self.rows.num_rows, *self.rows.ids]
        if self.base and self.base.quantized:
            facts["quantized"] = [self.base.quantized.quantizer.settings(), self.base.quantized.fingerprint]
        return fingerprint(self.tensors, json.dumps(facts, sort_keys=True))

    def answers_to(self, wanted: str) -> bool:
        """Whether this is the adapter of that fingerprint."""
        return wanted == self.fingerprint

    def completed(self, weights: Mapping[str, Tensor | None]) -> "Adapter":
        """The adapter with the weights that its rows make of those below it. Raises CheckpointError if
        they do not fit."""
        if self.rows is None:
            return self
        try:
            return dataclasses.replace(self, whole=self.whole | self.rows.put_into(weights))
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {error}") from None

    def trained_on(self, base: BaseReference) -> "Adapter":
        """The same adapter with another base."""
        return dataclasses.replace(self, base=base)


def parse_settings(values: Mapping[str, Any]) -> LoRAConfig:
    """The settings that a file stores as "lora". Raises UserError for a value that is out of range,
    and for one that this version does not know: it could change what the adapter means."""
    known = {field.name for field in dataclasses.fields(LoRAConfig)}
    if unknown := sorted(map(str, values.keys() - known)):
        raise UserError(f"the setting {unknown[0]} is not known to this version of litlora")
    config = LoRAConfig(**values)
    if not isinstance(config.modules_to_save, list):
        raise TypeError(f"modules_to_save is {config.modules_to_save!r}")
    variant_named(config.variant)
    return config


def parse_tensors(
    tensors: Mapping[str, Tensor], config: LoRAConfig
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """(updates by layer, tensors that replace the base's) of a file's tensors. Raises CheckpointError
    for half a pair, for factors that do not fit each other or the settings, and for a tensor that
    belongs to neither."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf.startswith(PREFIX):
            parts.setdefault(layer, {})[leaf] = tensor
        else:
            whole[name] = tensor
    updates = {layer: _update(layer, found, config) for layer, found in parts.items()}
    saved = [f".{name}." for name in config.modules_to_save]
    if odd := sorted(name for name in whole if not any(part in f".{name}" for part in saved)):
        raise CheckpointError(f"{odd[0]} is not part of an adapter")
    if not tensors:
        raise CheckpointError("the adapter is empty")
    return updates, whole


def _update(layer: str, found: Mapping[str, Tensor], config: LoRAConfig) -> Update:
    variant = variant_named(config.variant)
    wanted = (LORA_A, LORA_B, *variant.extra)
    if found.keys() != set(wanted):
        absent = next((name for name in wanted if name not in found), None)
        if absent is None:
            odd = sorted(found.keys() - set(wanted))
            raise CheckpointError(f"{layer} has {odd[0]}, which no update of the kind {variant.name} has")
        raise CheckpointError(f"{layer} has no {absent}, but {' and '.join(sorted(found))}")
    A, B, rank = found[LORA_A], found[LORA_B], layer_rank(config, layer)
    fits = A.ndim == B.ndim == 2 and A.size(0) == B.size(1) == rank
    if not fits or not (A.numel() and B.numel()):
        raise CheckpointError(
            f"{layer}: A {tuple(A.shape)} and B {tuple(B.shape)} make no update of rank {rank}"
        )
    extra = {name: found[name] for name in variant.extra}
    update = Update(A, B, layer_scale(config, layer), variant=variant.name, extra=extra)
    if problem := variant.problem(update):
        raise CheckpointError(f"{layer}: {problem}")
    return update


TAKEN_A, TAKEN_B = "loftq_A", "loftq_B"
"""What a file calls the factors of what was taken out of a layer's weight before it was quantised."""


def named_factors(taken_out: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The factors of what was taken out of some layers, by the names that a file has for them."""
    return {
        f"{layer}.{leaf}": factor
        for layer, product in taken_out.items()
        for leaf, factor in ((TAKEN_A, product.A), (TAKEN_B, product.B))
    }


def parse_taken_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """(what was taken out of some layers, the other tensors) of a file's. Raises ValueError for half a
    pair, and for factors that make no product."""
    names = {name: None for name in tensors if name.rpartition(".")[2] in (TAKEN_A, TAKEN_B)}
    found: dict[str, LowRank] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in names):  # in the order of the file
        A, B = (tensors.get(f"{layer}.{leaf}") for leaf in (TAKEN_A, TAKEN_B))
        if A is None or B is None:
            raise ValueError(f"{layer} has {TAKEN_A} or {TAKEN_B} alone")
        try:
            found[layer] = LowRank(A, B)
        except ValueError as error:
            raise ValueError(f"what was taken out of {layer}: {error}") from None
    return found, {name: tensor for name, tensor in tensors.items() if name not in names}


def names_of(layers: Iterable[str]) -> set[str]:
    """The names of the weights that updates of these layers change."""
    return {f"{layer}.weight" for layer in layers}
