"""Extraction: the low-rank updates and the differences that turn one model into another, a tensor
at a time."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litlora.adapters.lowrank import RankRule, distance, frobenius, truncate, truncate_exact
from litlora.adapters.orientation import CONV1D_NAMES, has_conv1d
from litlora.errors import CheckpointError, setting
from litlora.formats import peft
from litlora.formats.lora_files import PEFT_PARTS, LoRAFile
from litlora.formats.scaled import shapes
from litlora.lora import Adapter, LoRAConfig, Update
from litlora.storage.blocks import Memory, rows_at_a_time
from litlora.storage.dtypes import dtype_name
from litlora.storage.pages import Pages

EMBEDDINGS = (
    "embed_tokens",
    "embed_in",
    "wte",
    "wpe",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "shared",
)
"""Names of embeddings, whose weight, (tokens, width), looks like that of a linear layer."""


@dataclass(frozen=True)
class Plan:
    """What is extracted, and how."""

    rule: RankRule
    exact: bool = False
    """Decompose whole matrices instead of taking random samples of them."""
    seed: int = 0
    min_size: int = 0
    """Weights of fewer values are kept as whole differences."""
    diff_only: bool = False
    """Keep every difference whole."""
    replace: bool = False
    """For a tensor that is not decomposed, keep the target's tensor and not the difference."""
    dtype: torch.dtype = torch.bfloat16
    """In which the result will be stored; reported errors include its rounding."""
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Extracted:
    """One tensor that differs, with what was made of it."""

    name: str
    shape: tuple[int, ...]
    result: Update | Tensor
    """An update, or the whole difference (or with Plan.replace the target's tensor)."""
    norm: float
    """The Frobenius norm of the difference."""
    error: float
    """The Frobenius norm of what the stored result lacks."""
    excess: float
    """Proved: before rounding, the update's error is at most this share above the least possible at
    its rank; inf if not proved."""

    @property
    def rank(self) -> int | None:
        """None if the difference is kept whole."""
        return self.result.rank if isinstance(self.result, Update) else None


def mismatches(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, str]:
    """Why some tensors cannot be subtracted, by name: only one model has them, their shapes differ,
    or their values are not real numbers."""
    found = {name: "only in the source" for name in source if name not in target}
    found |= {name: "only in the target" for name in target if name not in source}
    for name, before in source.items():
        if name in found:
            continue
        after = target[name]
        if before.shape != after.shape:
            found[name] = f"{tuple(before.shape)} in the source, {tuple(after.shape)} in the target"
        elif not (before.is_floating_point() and after.is_floating_point()):
            if before.dtype != after.dtype or not torch.equal(before, after):
                kinds = f"{_kind(before)} in the source, {_kind(after)} in the target"
                found[name] = f"{kinds}: not real numbers, and different"
    return dict(sorted(found.items()))


def differs(before: Tensor | None, after: Tensor | None) -> bool:
    """Whether two models differ in a tensor, which one of them may lack."""
    if before is None or after is None or before.shape != after.shape:
        return True
    if before.dtype != after.dtype:
        before, after = before.double(), after.double()
    return not torch.equal(before, after)


def _kind(tensor: Tensor) -> str:
    return dtype_name(tensor.dtype)


def extract(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], plan: Plan, left_out: Collection[str] = ()
) -> Iterator[Extracted]:
    """What became of every tensor that differs, in the order of their names; one tensor of each
    model is in memory at a time.

    `left_out`: those of `mismatches`. Raises CheckpointError for values that are not finite, unless
    the tensors are equal.
    """
    pages, memory = Pages(), Memory(1)
    for name in sorted(source.keys() & target.keys() - set(left_out)):
        before, after = source[name], target[name]
        if before.is_floating_point():
            D = _difference(before, after, memory)
            if (norm := frobenius(D)) and not (math.isnan(norm) and torch.equal(before, after)):
                yield _extract(name, D, norm, after, plan)
        pages.done_with(before, after)
    pages.release()


def _difference(before: Tensor, after: Tensor, memory: Memory) -> Tensor:
    """after - before in fp32 or better, some rows at a time: several times as fast as whole
    tensors, which leave the caches twice."""
    exact = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    D = memory.empty(after.shape, exact)
    step = rows_at_a_time(after.shape, exact.itemsize)
    for total, new, old in zip(
        *(torch.atleast_1d(tensor).split(step) for tensor in (D, after, before)), strict=True
    ):
        total.copy_(new).sub_(old.to(exact) if old.dtype.itemsize == 1 else old)
    return D


def _extract(name: str, D: Tensor, norm: float, after: Tensor, plan: Plan) -> Extracted:
    if not math.isfinite(norm):
        raise CheckpointError(
            f"{name}: holds values that are not finite (NaN or infinity) in one of the two models; "
            "make that one again"
        )
    if D.ndim < 2 or D.numel() < plan.min_size or plan.diff_only:
        if plan.replace:
            return Extracted(name, tuple(D.shape), after, norm, 0.0, 0.0)
        stored = _stored(name, D.clone(), plan)  # the next difference takes this one's memory
        return Extracted(name, tuple(D.shape), stored, norm, frobenius(D - stored), 0.0)
    matrix = D.flatten(1).to(plan.device)
    rule = plan.rule if plan.rule.rank is None else RankRule(min(plan.rule.rank, *matrix.shape))
    best = truncate_exact(matrix, rule) if plan.exact else truncate(matrix, rule, plan.seed)
    A, B = (_stored(name, factor.cpu(), plan).contiguous() for factor in best.factors)
    error = best.error if plan.dtype == matrix.dtype else distance(matrix, A.to(matrix), B.to(matrix))
    kernel = D.shape[2:]
    update = Update(A.view(-1, *D.shape[1:]), B.view(*B.shape, *(1 for _ in kernel)))
    return Extracted(name, tuple(D.shape), update, norm, error, best.excess)


def as_adapter(found: Iterable[Extracted]) -> Adapter:
    """What `extract` found with Plan.replace, between two models under our names, as an adapter."""
    updates: dict[str, Update] = {}
    whole: dict[str, Tensor] = {}
    order: list[str] = []
    for one in found:
        module = one.name.rpartition(".")[0]
        if isinstance(one.result, Update):
            updates[module] = one.result
            order += [f"{module}.{part}" for part in one.result.tensors()]
        else:
            whole[one.name] = one.result
            order.append(one.name)
    ranks = {module: update.rank for module, update in updates.items()}
    rank = max(ranks.values(), default=1)
    others = {module: value for module, value in ranks.items() if value != rank}
    config = LoRAConfig(
        rank=rank,
        alpha=rank,
        targets=list(ranks) or ["none"],
        rank_pattern=others,
        alpha_pattern={module: float(value) for module, value in others.items()},
        modules_to_save=list(dict.fromkeys(name.rpartition(".")[0] for name in whole)),
    )
    return Adapter(config, updates, whole, order=tuple(order))


def as_peft(found: Iterable[Extracted], target: Mapping[str, Tensor], base_name: str) -> LoRAFile:
    """The same between two models with names of any kind, as a PEFT folder for the module that has
    these names.

    Only its name tells that a weight is an embedding's: see EMBEDDINGS. PEFT expects every tensor
    of a module that is saved.
    """
    updates: dict[str, Update] = {}
    whole: dict[str, Tensor] = {}
    conv1d = has_conv1d(shapes(target))
    for one in found:
        module = one.name.rpartition(".")[0]
        if not isinstance(one.result, Update):
            whole[peft.PREFIX + one.name] = one.result
        elif not one.name.endswith(".weight"):
            raise CheckpointError(
                f"{one.name}: PEFT adapts the weights of modules only; choose another {setting('format')}"
            )
        elif module.rpartition(".")[2] in EMBEDDINGS:
            updates[peft.PREFIX + module] = Update(one.result.B.T, one.result.A.T, kind="embedding")
        elif conv1d and module.rpartition(".")[2] in CONV1D_NAMES:
            updates[peft.PREFIX + module] = Update(one.result.B.T, one.result.A.T, kind="conv1d")
        else:
            updates[peft.PREFIX + module] = one.result
    for module in {name.rpartition(".")[0] for name in whole} - updates.keys():
        inside = module.removeprefix(peft.PREFIX)
        whole |= {peft.PREFIX + name: target[name] for name in target if name.rpartition(".")[0] == inside}
    config = {
        "base_model_name_or_path": base_name,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(update.kind == "conv1d" for update in updates.values()),
        "inference_mode": True,
    }
    return LoRAFile(Path(base_name), updates, whole=whole, config=config, parts=PEFT_PARTS)


def _stored(name: str, tensor: Tensor, plan: Plan) -> Tensor:
    stored = tensor.to(plan.dtype)
    if not torch.isfinite(stored).all():
        raise CheckpointError(
            f"{name}: the difference is beyond what {_kind(stored)} can hold; "
            f"choose another {setting('output_dtype')}"
        )
    return stored
