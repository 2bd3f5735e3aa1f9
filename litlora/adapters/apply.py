"""LoRA files added to a model of whatever architecture: which tensor each update means, and the
sum, a tensor at a time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats.lora_content import END_OF
from litlora.formats.lora_files import LoRAFile
from litlora.lora import Update
from litlora.lora.dense import DenseUpdate, fits_plain
from litlora.lora.update import fitting

COMFYUI = "diffusion_model."
PEFT_PREFIX, DECODER = "base_model.model.", "model."
PREFIXES = (COMFYUI, PEFT_PREFIX, "unet.", "transformer.", "model.diffusion_model.")
"""Prefixes of a module's name in a LoRA file, and with some tools of a tensor's name in a model."""
FLAT_PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lycoris_",
)
"""Prefixes of a name whose dots are underscores."""


@dataclass(frozen=True)
class Addition:
    """What one entry of a LoRA file makes of a tensor W: W + factor · (its update, or its
    difference, or T - W)."""

    file: Path
    key: str
    value: Update | DenseUpdate | Tensor
    factor: float
    replaces: bool = False
    """Whether the value is a tensor T that replaces W."""


def match(
    loras: Iterable[tuple[LoRAFile, float]], model: Mapping[str, Tensor]
) -> tuple[dict[str, list[Addition]], list[str]]:
    """(what is added to each tensor of the model, why something cannot be added: a line each).

    Raises CheckpointError for a name that may mean two tensors, and for two entries of a file that
    mean the same one.
    """
    names = _Names(model)
    found: dict[str, list[Addition]] = {}
    unmatched: list[str] = []
    for lora, factor in loras:
        unmatched += [f"{lora.path}: unrecognised key {key}" for key in lora.unknown]
        taken: dict[tuple[str, bool], str] = {}
        for key, ends, addition in _entries(lora, factor):
            name = names.find(key, ends, addition)
            if name is None:
                unmatched.append(f"{lora.path}: {addition.key}: the model has no such tensor")
                continue
            if not _fits(addition.value, model[name]):
                here, there = tuple(addition.value.shape), tuple(model[name].shape)
                unmatched.append(
                    f"{lora.path}: {addition.key} is {here}, {name} {there} of {model[name].dtype}"
                )
                continue
            twin = taken.setdefault((name, isinstance(addition.value, Tensor)), addition.key)
            if twin != addition.key:
                raise CheckpointError(
                    f"{lora.path}: {twin} and {addition.key} both update {name}; keep one of them"
                )
            found.setdefault(name, []).append(addition)
    return found, unmatched


def _entries(lora: LoRAFile, factor: float) -> Iterator[tuple[str, tuple[str, ...], Addition]]:
    """(a tensor's name without its end, the ends that it may have, what is added to it) of every
    entry of a file."""
    for key, update in (lora.updates | lora.dense).items():
        yield key, (".weight", ""), Addition(lora.path, key, update, factor)
    for key, tensor in lora.diffs.items():
        diff = next(diff for diff in END_OF if key.endswith(diff))
        ends = (".weight", "") if END_OF[diff] == ".weight" else (END_OF[diff],)
        yield key.removesuffix(diff), ends, Addition(lora.path, key, tensor, factor)
    for key, tensor in lora.whole.items():
        yield key, ("",), Addition(lora.path, key, tensor, factor, replaces=True)


class _Names:
    """A model's tensors by every name that a LoRA file may give them."""

    def __init__(self, model: Iterable[str]) -> None:
        self._names = frozenset(model)
        self._flat: dict[tuple[str, str], set[str]] = {}
        for name in self._names:
            for end in (".weight", ".bias", ".modulation", ""):
                if name.endswith(end):
                    for stem in _stems(name.removesuffix(end)):
                        self._flat.setdefault((stem.replace(".", "_"), end), set()).add(name)

    def find(self, key: str, ends: tuple[str, ...], addition: Addition) -> str | None:
        """The tensor that a key means: the first end that gives one counts, and the exact name
        comes before one with another prefix. A decoder's layers may be named as in the model with
        its head, or without it."""
        spellings = (key, *_with_and_without_head(key))
        return next((name for each in spellings if (name := self._find(each, ends, addition))), None)

    def _find(self, key: str, ends: tuple[str, ...], addition: Addition) -> str | None:
        for end in ends:
            for exact in (key.removeprefix(COMFYUI) + end, key + end):
                if exact in self._names:
                    return exact
            hits = {other + stem + end for stem in _stems(key) for other in ("", *PREFIXES)} & self._names
            for prefix in FLAT_PREFIXES:
                if key.startswith(prefix) and not hits:
                    hits = self._flat.get((key.removeprefix(prefix), end), set())
            if len(hits) > 1:
                raise CheckpointError(
                    f"{addition.file}: {addition.key} may mean {' or '.join(sorted(hits))}; rename it"
                )
            if hits:
                return next(iter(hits))
        return None


def _with_and_without_head(key: str) -> list[str]:
    """The other names of a layer `base_model.model.layers...`: PEFT names it by the model that it
    was given, with a head or without."""
    name = key.removeprefix(PEFT_PREFIX)
    if name == key:
        return []
    return [name.removeprefix(DECODER) if name.startswith(DECODER) else DECODER + name]


def _stems(name: str) -> list[str]:
    """A name, and what is left of it without its prefix, and without the prefix after that."""
    shorter = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    return [name, *(stem for rest in shorter for stem in _stems(rest))]


def _fits(value: Update | DenseUpdate | Tensor, tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return False
    if isinstance(value, Tensor):
        return value.shape == tensor.shape
    if tensor.ndim < 2:
        return False
    shape = tuple(tensor.shape)
    return value.fits(shape) if isinstance(value, DenseUpdate) else fits_plain(value, shape)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def added(name: str, tensor: Tensor, additions: list[Addition], dtype: torch.dtype) -> Tensor:
    """W plus all additions, summed in fp32 or better and rounded once to `dtype`; integers are
    unchanged.

    Raises CheckpointError for a result that is not finite; infinities of the model itself, in a
    mask perhaps, stay.
    """
    if not tensor.is_floating_point():
        return tensor
    if not additions:
        result = tensor.to(dtype)
    else:
        exact = tensor.to(_wide(tensor), copy=True, memory_format=torch.contiguous_format)
        for addition in additions:
            value, of = addition.value, f"{addition.file}: {addition.key}"
            if isinstance(value, Update):
                fitting(addition.factor * value.scale, of)
                value.add_product(exact, factor=addition.factor)
                continue
            if isinstance(value, DenseUpdate):
                fitting(addition.factor * value.scale, of)
                value.add_to(exact, tensor, addition.factor)
                continue
            value = value.to(exact.dtype)
            change = value - tensor.to(exact.dtype) if addition.replaces else value
            exact.add_(change, alpha=fitting(addition.factor, of))
        result = exact.to(dtype)
    if not torch.isfinite(result).all() and (additions or torch.isfinite(tensor.to(_wide(tensor))).all()):
        files = ", ".join(sorted({str(addition.file) for addition in additions})) or "nothing"
        raise CheckpointError(
            f"{name}: with {files} added it holds values that are not finite (NaN or infinity) in {dtype}"
        )
    return result
