"""LoRA files added to a model of whatever architecture: which tensor each update means, and the
sum, a tensor at a time."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from litlora.adapters.orientation import oriented, oriented_experts
from litlora.errors import CheckpointError
from litlora.formats.aliases import ALL, Part, Rows
from litlora.formats.diffusion_names import COMFYUI, FLAT_PREFIXES, PREFIXES, other_names, spelling
from litlora.formats.lora_content import END_OF
from litlora.formats.lora_files import LoRAFile
from litlora.formats.peft import PREFIX as PEFT_PREFIX
from litlora.formats.peft_config import EXPERTS, is_parameter
from litlora.lora import Update
from litlora.lora.dense import DecomposedUpdate, DenseUpdate, ExpertsUpdate, fits_plain
from litlora.lora.update import fitting

ENDS = (".weight", ".bias", ".modulation", "")
"""The ends of a tensor's name that a module's name in a LoRA file lacks."""
DECODER = "model."
BIAS_OF_B = ".lora_B.bias"
_IN_MIXTRAL = re.compile(r"\.mlp\.(gate(?=\.|$)|experts\.\d+\.)(gate_proj|up_proj|down_proj|)")
_MIXTRALS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "": ""}
"""What transformers calls the router and the experts' layers of Mixtral, and what files call them."""


@dataclass(frozen=True)
class Addition:
    """What one entry of a LoRA file makes of a tensor W, or of some rows of it: W + factor · (its
    update, or its difference, or T - W)."""

    file: Path
    key: str
    value: Update | DenseUpdate | Tensor
    factor: float
    replaces: bool = False
    """Whether the value is a tensor T that replaces W."""
    rows: Rows = ALL
    """The rows of W that it is added to."""
    of: Rows = ALL
    """The rows of the value that are added to them."""


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
        where: dict[str, list[Addition]] = {}
        for key, ends, addition in _entries(lora, factor, names):
            parts = names.find(key, ends, addition)
            if not parts:
                unmatched.append(f"{lora.path}: {addition.key}: the model has no such tensor")
                continue
            is_peft = lora.config is not None or addition.key.startswith(PEFT_PREFIX)
            if is_peft and not is_parameter(f"{key}.weight", lora.config or {}):
                addition = _oriented(addition, parts[0].tensor, model, lora)
            if misfit := _misfit(addition, parts, model):
                unmatched.append(misfit)
                continue
            for part in parts:
                one = replace(addition, rows=part.rows, of=part.of)
                _check_twins(one, part.tensor, where.setdefault(part.tensor, []), model)
                found.setdefault(part.tensor, []).append(one)
    return found, unmatched


Entry = tuple[str, tuple[str, ...], Addition]
"""A tensor's name without its end, the ends that it may have, what is added to it."""


def _entries(lora: LoRAFile, factor: float, names: "_Names") -> Iterator[Entry]:
    """What a file holds. Whether experts are one tensor or one each, the model's names tell."""
    for key, update in (lora.updates | lora.dense).items():
        addition = Addition(lora.path, key, update, factor)
        if isinstance(update, ExpertsUpdate):
            yield from _experts(addition, update, names)
        else:
            yield key, (".weight", ""), addition
    for key, tensor in lora.biases.items():
        yield key, (".bias",), Addition(lora.path, key + BIAS_OF_B, tensor, factor)
    for key, tensor in lora.diffs.items():
        diff = next(diff for diff in END_OF if key.endswith(diff))
        ends = (".weight", "") if END_OF[diff] == ".weight" else (END_OF[diff],)
        yield key.removesuffix(diff), ends, Addition(lora.path, key, tensor, factor)
    for key, tensor in lora.whole.items():
        yield key, ("",), Addition(lora.path, key, tensor, factor, replaces=True)


def _experts(addition: Addition, update: ExpertsUpdate, names: "_Names") -> Iterator[Entry]:
    """The updates of a parameter of a layer's experts: of each expert's layers, if the model has them,
    else of the parameter."""
    leaves = EXPERTS[update.parameter]
    first, beyond = (f"{update.experts}.{expert}.{leaves[0]}" for expert in (0, len(update.A)))
    if not names.find(first, (".weight",), addition):
        yield f"{update.experts}.{update.parameter}", ("",), addition
        return
    if names.find(beyond, (".weight",), addition):
        raise CheckpointError(
            f"{addition.file}: {addition.key} is for {len(update.A)} experts, and the model has more"
        )
    for expert in range(len(update.A)):
        for part, leaf in enumerate(leaves):
            value = update.of_expert(expert, part, len(leaves))
            yield f"{update.experts}.{expert}.{leaf}", (".weight",), replace(addition, value=value)


class _Names:
    """A model's tensors by every name that a LoRA file may give them."""

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        self._model = model
        self._names = frozenset(model)
        self._flat: dict[tuple[str, str], set[str]] = {}
        for name in self._names:
            for end in ENDS:
                if name.endswith(end):
                    for stem in _stems(name.removesuffix(end)):
                        self._flat.setdefault((stem.replace(".", "_"), end), set()).add(name)

    def find(self, key: str, ends: tuple[str, ...], addition: Addition) -> tuple[Part, ...]:
        """The tensors, or their rows, that a key means; none if the model has no such tensor.

        The first end that gives one counts. The exact name comes before one with another prefix,
        and any of them before one of the other layout. A decoder's layers may be named as in the
        model with its head, or without it; Mixtral's, as in transformers or as in its files.
        """
        in_files = _IN_MIXTRAL.sub(lambda found: f".block_sparse_moe.{found[1]}{_MIXTRALS[found[2]]}", key)
        spellings = [each for name in dict.fromkeys((key, in_files)) for each in _with_and_without_head(name)]
        return next((parts for each in spellings if (parts := self._find(each, ends, addition))), ())

    def _find(self, key: str, ends: tuple[str, ...], addition: Addition) -> tuple[Part, ...]:
        for end in ends:
            hits = {(Part(name),) for name in self._own(key, end)} or self._other(key, end)
            if len(hits) > 1:
                several = sorted(part.tensor for parts in hits for part in parts)
                raise CheckpointError(
                    f"{addition.file}: {addition.key} may mean {' or '.join(several)}; rename it"
                )
            if hits:
                return next(iter(hits))
        return ()

    def _own(self, key: str, end: str) -> set[str]:
        """The tensors of that name, as the model itself calls them."""
        for exact in (key.removeprefix(COMFYUI) + end, key + end):
            if exact in self._names:
                return {exact}
        hits = {other + stem + end for stem in _stems(key) for other in ("", *PREFIXES)} & self._names
        for prefix in FLAT_PREFIXES:
            if key.startswith(prefix) and not hits:
                hits = self._flat.get((key.removeprefix(prefix), end), set())
        return hits

    def _other(self, key: str, end: str) -> set[tuple[Part, ...]]:
        """What the name means in the other layout of a diffusion model, or in another spelling."""
        read = spelling(key)
        # Old versions of diffusers leave the number of the output projection out.
        for name in (read.name, f"{read.name}{'_' if read.is_flat else '.'}0"):
            if hits := self._aliases.get((read.part + name.replace(".", "_"), end), set()):
                return hits if read.is_flat else self._dotted(read.part + name + end, hits)
        return set()

    def _dotted(self, name: str, hits: set[tuple[Part, ...]]) -> set[tuple[Part, ...]]:
        return {self._others[name]} if name in self._others else hits

    @cached_property
    def _others(self) -> dict[str, tuple[Part, ...]]:
        return other_names({name: tuple(tensor.shape) for name, tensor in self._model.items()})

    @cached_property
    def _aliases(self) -> dict[tuple[str, str], set[tuple[Part, ...]]]:
        """The names of the other layout without dots and ends."""
        found: dict[tuple[str, str], set[tuple[Part, ...]]] = {}
        for name, parts in self._others.items():
            for end in ENDS:
                if name.endswith(end):
                    found.setdefault((_flat(name.removesuffix(end)), end), set()).add(parts)
        return found


def _flat(name: str) -> str:
    """A name with its part of the pipeline, its dots as underscores."""
    part, _, rest = name.partition(".")
    return f"{part}.{rest.replace('.', '_')}"


def _with_and_without_head(key: str) -> list[str]:
    """The names of a layer `base_model.model.layers...`: PEFT names it by the model that it was given,
    with a head or without."""
    name = key.removeprefix(PEFT_PREFIX)
    if name == key:
        return [key]
    return [key, name.removeprefix(DECODER) if name.startswith(DECODER) else DECODER + name]


def _stems(name: str) -> list[str]:
    """A name, and what is left of it without its prefix, and without the prefix after that."""
    shorter = [name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)]
    return [name, *(stem for rest in shorter for stem in _stems(rest))]


def _oriented(addition: Addition, name: str, model: Mapping[str, Tensor], lora: LoRAFile) -> Addition:
    """What a PEFT folder adds, as the model's tensor `name` needs it."""
    value, where = addition.value, f"{addition.file}: {addition.key}"
    if isinstance(value, Update):
        return replace(addition, value=oriented(value, name, model, where))
    if isinstance(value, ExpertsUpdate):
        siblings = [other for other in lora.dense.values() if isinstance(other, ExpertsUpdate)]
        return replace(addition, value=oriented_experts(value, name, model, siblings, where))
    inner = value.update if isinstance(value, DecomposedUpdate) else None
    if isinstance(inner, Update) and (turned := oriented(inner, name, model, where)).kind != inner.kind:
        axis = "in" if value.axis == "out" else "out"  # of the weight as it is stored
        return replace(addition, value=replace(value, update=turned, axis=axis))
    return addition


def _misfit(addition: Addition, parts: tuple[Part, ...], model: Mapping[str, Tensor]) -> str | None:
    """Why a value cannot be added to these rows; None if it can."""
    tensors = [model[part.tensor] for part in parts]
    rows = sum(
        len(range(len(tensor))[slice(*part.rows)]) if tensor.ndim else 1
        for tensor, part in zip(tensors, parts, strict=True)
    )
    shape = (rows, *tensors[0].shape[1:]) if tensors[0].ndim else ()
    if getattr(addition.value, "axis", "out") == "in" and any(part.of != ALL for part in parts):
        raise CheckpointError(
            f"{addition.file}: {addition.key}: DoRA by input cannot be added to a part of its layer, and the "
            f"model has {parts[0].tensor} apart; use a model whose layers are as the file's"
        )
    if all(tensor.is_floating_point() for tensor in tensors) and _fits(addition.value, shape, parts):
        return None
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
    names = ", ".join(part.tensor for part in parts)
    return f"{addition.file}: {addition.key} is {tuple(addition.value.shape)}, {names} {shape} of {dtypes}"


def _fits(value: Update | DenseUpdate | Tensor, shape: tuple[int, ...], parts: tuple[Part, ...]) -> bool:
    if isinstance(value, Tensor):
        return tuple(value.shape) == shape
    if len(shape) < 2:
        return False
    inner = value.update if isinstance(value, DecomposedUpdate) else value
    if isinstance(inner, Update) and inner.kind != "linear" and parts != (Part(parts[0].tensor),):
        return False  # it would be added transposed
    return value.fits(shape) if isinstance(value, DenseUpdate) else fits_plain(value, shape)


def _check_twins(addition: Addition, name: str, before: list[Addition], model: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if another entry of the same file updates one of the same rows."""
    numbers = range(len(model[name])) if model[name].ndim else range(1)
    for other in before:
        same_kind = _kind(other) == _kind(addition)
        ours, theirs = numbers[slice(*addition.rows)], numbers[slice(*other.rows)]
        if same_kind and max(ours.start, theirs.start) < min(ours.stop, theirs.stop):
            raise CheckpointError(
                f"{addition.file}: {other.key} and {addition.key} both update {name}; keep one of them"
            )
    before.append(addition)


def _kind(addition: Addition) -> str:
    """An update, what it adds to the bias, or a whole tensor or difference: one of each may belong to
    a tensor."""
    if not isinstance(addition.value, Tensor):
        return "update"
    return "bias" if addition.key.endswith(BIAS_OF_B) else "tensor"


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
        replaced = {addition.file: addition.value for addition in additions if addition.replaces}
        for addition in additions:
            # What an adapter adds may depend on W, in whose place the adapter may have put its own.
            trained_on = tensor if addition.replaces else replaced.get(addition.file, tensor)
            _add(exact, trained_on, addition)
        result = exact.to(dtype)
    if not torch.isfinite(result).all() and (additions or torch.isfinite(tensor.to(_wide(tensor))).all()):
        files = ", ".join(sorted({str(addition.file) for addition in additions})) or "nothing"
        raise CheckpointError(
            f"{name}: with {files} added it holds values that are not finite (NaN or infinity) in {dtype}"
        )
    return result


def _add(exact: Tensor, tensor: Tensor, addition: Addition) -> None:
    """Add to W, in fp32 or better, in place; `tensor` is the W that the addition was trained on."""
    value, of = addition.value, f"{addition.file}: {addition.key}"
    if exact.ndim:
        exact, tensor = exact[slice(*addition.rows)], tensor[slice(*addition.rows)]
    if isinstance(value, Update):
        fitting(addition.factor * value.scale, of)
        value.add_product(exact, slice(*addition.of), addition.factor)
        return
    if isinstance(value, DenseUpdate):
        fitting(addition.factor * value.scale, of)
        value.add_to(exact, tensor, addition.factor, slice(*addition.of).indices(value.shape[0])[0])
        return
    value = value.to(exact.dtype)
    value = value[slice(*addition.of)] if value.ndim else value
    change = value - tensor.to(exact.dtype) if addition.replaces else value
    exact.add_(change, alpha=fitting(addition.factor, of))
