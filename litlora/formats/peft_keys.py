"""The keys of a PEFT file, sorted out by module; see peft.py."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.lora.variants import MAGNITUDE
from litlora.storage.tensors import at_least_16_bits

PREFIX = "base_model.model."

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!weight$|bias$)([^.]+))?(?:\.(weight|bias))?")
"""A factor's key: the module, the factor, the adapter's name, which PEFT drops from a file but other
programs do not, and the leaf."""
_MAGNITUDE = re.compile(rf"(.+)\.{MAGNITUDE}(?:\.(?!weight$)([^.]+))?(?:\.weight)?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?")


@dataclass
class PeftTensors:
    """What a file holds, by PEFT's names of modules, without the prefix and the adapter's name."""

    file: Path
    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """{module: {"A": ..., "B": ..., and where the adapter has them "magnitude" and "bias"}}."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that replace others."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """{module: rows that replace those of some tokens}."""
    embeddings: set[str] = field(default_factory=set)
    """Modules whose factors are spelled as PEFT spells those of an embedding."""

    @property
    def modules(self) -> list[str]:
        return [*self.pairs, *self.whole, *self.rows]


def sort_out(file: Path, stored: Mapping[str, Tensor]) -> PeftTensors:
    """The tensors of a file. Raises CheckpointError for a key that means nothing here, for two
    adapters in one file, and for a tensor that is there twice with different values."""
    found, rest, adapters = PeftTensors(file), {}, set()
    for key, stored_tensor in stored.items():
        name, tensor = key.removeprefix(PREFIX), at_least_16_bits(stored_tensor)
        if factor := _FACTOR.fullmatch(name):
            module, is_embedding, part, adapter, leaf = factor.groups()
            if leaf == "bias":
                part = "bias" if part == "B" else "bias of A"
            elif is_embedding:  # stored transposed: its A is our B
                part, tensor = {"A": "B", "B": "A"}[part], tensor.T
                found.embeddings.add(module)
            _put(file, found.pairs.setdefault(module, {}), part, tensor, key)
        elif magnitude := _MAGNITUDE.fullmatch(name):
            module, adapter = magnitude.groups()
            _put(file, found.pairs.setdefault(module, {}), "magnitude", tensor, key)
        elif tokens := _TOKENS.fullmatch(name):
            module, adapter = tokens.groups()
            _put(file, found.rows, module, tensor, key)
        elif ".lora_" in name or ".token_adapter." in name:
            raise CheckpointError(
                f"{file}: {key} is not supported; LoRA's and DoRA's factors, replaced rows of tokens and "
                "tensors saved whole are"
            )
        else:
            rest[name] = tensor
            continue
        adapters.add(adapter)
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise CheckpointError(f"{file}: holds several adapters ({names}); save each one to a file of its own")
    found.whole = _saved_whole(file, rest, next(iter(adapters), None))
    return found


def _put(file: Path, parts: dict[str, Tensor], part: str, tensor: Tensor, key: str) -> None:
    if part in parts:
        raise CheckpointError(f"{file}: {key} is there twice, with and without its adapter's name")
    parts[part] = tensor


def _saved_whole(file: Path, stored: Mapping[str, Tensor], adapter: str | None) -> dict[str, Tensor]:
    """The tensors that replace others, by the name of the other."""
    whole: dict[str, Tensor] = {}
    untrained: list[str] = []
    named = f".modules_to_save.{adapter}."
    for key, tensor in stored.items():
        if ".original_module." in key:
            untrained.append(key)
            continue
        name = key.replace(named, ".").replace(".modules_to_save.", ".").replace(".base_layer.", ".")
        if name in whole and not (whole[name].dtype == tensor.dtype and torch.equal(whole[name], tensor)):
            raise CheckpointError(f"{file}: holds {name} twice, with different values")
        whole[name] = tensor
    # Beside a module that was trained whole, PEFT may store the original, which has no effect.
    if orphans := [name for name in untrained if name.replace(".original_module.", ".") not in whole]:
        raise CheckpointError(
            f"{file}: {orphans[0]} is a module before training, but the trained one is missing"
        )
    return whole
