"""Resizing: another rank for an adapter's updates, exact where possible and with the least possible
error elsewhere.

ΔW = s · B A is never formed (see `litlora.adapters.factored`); the factors are stored in fp32 at
least.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from litlora.adapters.factored import NOISE, difference, least_rank, norm, svd, wide
from litlora.errors import CheckpointError
from litlora.formats.lora_files import LoRAFile, as_stored
from litlora.lora import Adapter, Update
from litlora.lora.select import settings_for
from litlora.lora.variants import variant_named
from litlora.storage.dtypes import dtype_name


@dataclass(frozen=True)
class Change:
    """What became of one layer's update."""

    layer: str
    before: int
    """Its rank; for several updates, the sum of their ranks."""
    after: int
    norm: float
    """Frobenius norm of the ΔW that was to be stored."""
    error: float
    """Frobenius norm of what the stored ΔW lacks."""


def plain_updates(adapter: Adapter) -> dict[str, Update]:
    """Every layer's update, by the layer's name. Raises CheckpointError for a variant of LoRA whose
    updates are not s · B A."""
    if not variant_named(adapter.config.variant).is_plain:
        raise CheckpointError(
            f"{adapter.file}: has the variant {adapter.config.variant}, whose updates are not a product "
            "of two factors; merge it with scripts/merge_lora.py instead"
        )
    return adapter.updates


Form = Callable[[Update], Update]
"""Turns an update into what will be stored."""


def resize_adapter(
    adapter: Adapter, *, rank: int | None, max_error: float | None, generator: Generator
) -> tuple[Adapter, list[Change]]:
    """The adapter with every update resized, and what became of each layer. Tensors saved whole
    stay. See `resize`."""
    updates, changes = _resize_all(
        plain_updates(adapter), rank=rank, max_error=max_error, generator=generator
    )
    config = settings_for(updates, adapter.config)
    return Adapter(config, updates, adapter.whole, adapter.base, rows=adapter.rows), changes


def resize_file(
    lora: LoRAFile,
    dtype: torch.dtype,
    *,
    rank: int | None,
    max_error: float | None,
    generator: Generator,
) -> tuple[LoRAFile, list[Change]]:
    """The same for a LoRA file of another tool that will be stored in `dtype`; its names, its
    format and its differences stay."""
    updates, changes = _resize_all(
        lora.plain().updates,
        rank=rank,
        max_error=max_error,
        generator=generator,
        form=lambda update: as_stored(update, alpha=lora.keeps_scale, dtype=dtype),
    )
    return dataclasses.replace(lora, updates=updates), changes


def factors_of(lora: LoRAFile) -> dict[str, Tensor]:
    """Every A and B of a LoRA file, by the name that an error gives it. Raises CheckpointError for a
    file that holds other updates as well."""
    updates = lora.plain().updates
    return {f"{name}, {part}": getattr(update, part) for name, update in updates.items() for part in "AB"}


def _resize_all(
    updates: dict[str, Update],
    *,
    rank: int | None,
    max_error: float | None,
    generator: Generator,
    form: Form = lambda update: update,
) -> tuple[dict[str, Update], list[Change]]:
    resized, changes = {}, []
    for name, update in updates.items():
        small = form(resize(update, rank=rank, max_error=max_error, generator=generator))
        resized[name] = finite(name, small)
        changes.append(Change(name, update.rank, small.rank, norm(update), difference(update, small)))
    return resized, changes


def finite(name: str, update: Update) -> Update:
    """The update itself. Raises CheckpointError if its dtype could not hold all of its values."""
    for factor in (update.A, update.B):
        if not torch.isfinite(factor).all():
            kind = dtype_name(factor.dtype)
            raise CheckpointError(
                f"{name}: the result has values beyond what {kind} can hold, so nothing is written"
            )
    return update


def resize(update: Update, *, rank: int | None, max_error: float | None, generator: Generator) -> Update:
    """The update at `rank`, or at the least rank whose error is within `max_error`, a share of ‖ΔW‖
    (Frobenius); with both, at most `rank`. The scale stays; where the rank stays, so do the
    factors. No rank exceeds the layer's smaller side.

    A higher rank adds zero columns to B, which leave ΔW unchanged, and rows to A that are drawn as
    for a fresh adapter (see `Variant.start`), so that training can continue.
    """
    if max_error is not None:
        return shrink(update, rank=rank, max_error=max_error)
    B, A = update.matrices
    rank = min(rank, B.size(0), A.size(1))
    if rank > update.rank:
        missing = rank - update.rank
        bound = 1 / math.sqrt(A.size(1))  # Kaiming-uniform with a = √5
        fresh = torch.empty(missing, A.size(1)).uniform_(-bound, bound, generator=generator)
        return update.with_matrices(
            torch.cat([B, B.new_zeros(B.size(0), missing)], dim=1), torch.cat([A, fresh.to(A.dtype)])
        )
    return update if rank == update.rank else _truncate(update, rank, *svd(update))


def shrink(update: Update, *, rank: int | None = None, max_error: float = 0.0) -> Update:
    """The update at the least rank whose error is within `max_error`, a share of ‖ΔW‖, but at most
    `rank`.

    With an error of 0: at the rank of ΔW. The update itself if nothing can be removed.
    """
    U, S, Vt = svd(update)
    B, A = update.matrices
    needed = least_rank(S, max_error, NOISE * (B.double().norm() * A.double().norm()).item())
    needed = needed if rank is None else min(needed, rank)
    return update if needed >= update.rank else _truncate(update, needed, U, S, Vt)


def _truncate(update: Update, rank: int, U: Tensor, S: Tensor, Vt: Tensor) -> Update:
    # Rows of length 1 make A about as large as a fresh adapter's. B, which starts at zero in one,
    # takes the singular values.
    B, A = U[:, :rank] * S[:rank], Vt[:rank]
    return update.with_matrices(B.to(wide(update.B.dtype)), A.to(wide(update.A.dtype)))


def table(changes: list[Change]) -> list[str]:
    """A line for each layer with its ranks and its relative error, and one for all of them."""
    rows = [
        (change.layer, change.before, change.after, change.error / (change.norm or 1.0)) for change in changes
    ]
    total_norm = math.hypot(*(change.norm for change in changes))
    total_error = math.hypot(*(change.error for change in changes))
    before, after = sum(change.before for change in changes), sum(change.after for change in changes)
    width = max((len(row[0]) for row in rows), default=0)
    rows.append(("all", before, after, total_error / (total_norm or 1.0)))
    return [
        f"{'layer':{width}}  rank before  after  error",
        *(f"{name:{width}}  {old:11}  {new:5}  {error:.2e}" for name, old, new, error in rows),
    ]
