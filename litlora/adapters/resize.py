"""Resizing: another rank for an adapter's updates, exact where it can be and with the least
possible error where it cannot.

The matrix ΔW = s · B A is never formed; it is (out, in), of a convolution (out, in · kernel). With
B = Q_B R_B and A^T = Q_A R_A it is Q_B (s · R_B R_A^T) Q_A^T, so the singular value decomposition
of the small matrix in the middle, rank x rank, is that of the whole. All of it is in float64, which
costs milliseconds a layer; the factors are stored in fp32 at least.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from litlora.errors import CheckpointError
from litlora.lora import Adapter, Update
from litlora.lora.select import layer_rank, layer_scale
from litlora.lora.variants import variant_named
from litlora.settings import LoRAConfig

ROUNDING = 1e-9
"""A share of ΔW that factors in fp32 could not hold: what is smaller is no part of its rank."""
NOISE = 1e-14
"""A share of ‖B‖ ‖A‖ that float64 does not tell from zero: terms that cancel out leave as much of
themselves."""


@dataclass(frozen=True)
class Change:
    """What became of one layer's update."""

    layer: str
    before: int
    """Rank: of several updates, the sum."""
    after: int
    norm: float
    """Frobenius norm of the ΔW that was to be stored."""
    error: float
    """Frobenius norm of what the stored ΔW lacks of it."""


def plain_updates(adapter: Adapter) -> dict[str, Update]:
    """Every layer's update, by the layer's name. Raises CheckpointError for a variant of LoRA whose
    updates are not s · B A."""
    if not variant_named(adapter.config.variant).is_plain:
        raise CheckpointError(
            f"{adapter.file}: is of the variant {adapter.config.variant}, whose updates are not a product "
            "of two factors; merge it with scripts/merge_lora.py instead"
        )
    return adapter.updates


Form = Callable[[Update], Update]
"""What an update is once it is stored."""


def resize_all(
    updates: dict[str, Update],
    *,
    rank: int | None,
    max_error: float | None,
    generator: Generator,
    form: Form = lambda update: update,
) -> tuple[dict[str, Update], list[Change]]:
    """Every update resized, in the form in which it will be stored, and what became of it. See
    `resize`."""
    resized, changes = {}, []
    for name, update in updates.items():
        resized[name] = finite(
            name, form(resize(update, rank=rank, max_error=max_error, generator=generator))
        )
        changes.append(
            Change(name, update.rank, resized[name].rank, norm(update), difference(update, resized[name]))
        )
    return resized, changes


def finite(name: str, update: Update) -> Update:
    """The update, if its dtype could hold all of its numbers. Raises CheckpointError if not."""
    for factor in (update.A, update.B):
        if not torch.isfinite(factor).all():
            kind = str(factor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name}: the result has numbers beyond what {kind} can hold, so nothing is written"
            )
    return update


def resize(update: Update, *, rank: int | None, max_error: float | None, generator: Generator) -> Update:
    """The update at `rank`, or at the least rank whose error is within `max_error`, a share of ‖ΔW‖
    (Frobenius); with both, at most `rank`. The scale stays; where the rank stays, so do the
    factors. No rank exceeds the layer's smaller side.

    A higher rank adds zero columns to B, so ΔW stays as it is, and rows to A as a fresh adapter has
    them (see LoRALinear), so that training can go on.
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

    With an error of 0: at the rank that ΔW has. Where nothing can go, the update itself.
    """
    U, S, Vt = svd(update)
    B, A = update.matrices
    needed = least_rank(S, max_error, NOISE * (B.double().norm() * A.double().norm()).item())
    needed = needed if rank is None else min(needed, rank)
    return update if needed >= update.rank else _truncate(update, needed, U, S, Vt)


def svd(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and Vt (k, in) of B A, without the scale, in float64; k is the smallest of
    rank, out and in."""
    B, A = update.matrices
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vt @ Q_A.T


def least_rank(S: Tensor, max_error: float, noise: float = 0.0) -> int:
    """How many of these singular values, largest first, keep the rest within `max_error` of the
    whole, or within `noise`; at least 1."""
    rest = S.square().flip(0).cumsum(0).flip(0).sqrt()  # rest[k]: the norm of all from the k-th on
    return max(1, int((rest > max(max(max_error, ROUNDING) * rest[0].item(), noise)).sum()))


def _truncate(update: Update, rank: int, U: Tensor, S: Tensor, Vt: Tensor) -> Update:
    # Rows of A of length 1 are of the size of a fresh adapter's; B, which starts at zero there,
    # takes the singular values.
    B, A = U[:, :rank] * S[:rank], Vt[:rank]
    return update.with_matrices(B.to(wide(update.B.dtype)), A.to(wide(update.A.dtype)))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for a factor that was computed: the given one, but at least fp32, so that no error
    is added."""
    return torch.promote_types(dtype, torch.float32)


def norm(update: Update) -> float:
    """‖ΔW‖, Frobenius."""
    B, A = update.matrices
    return _norm(B.double() * update.scale, A.double())


def difference(one: Update, other: Update) -> float:
    """‖ΔW - ΔW'‖, Frobenius, of the factors as they are stored."""
    if one is other:
        return 0.0
    (B, A), (other_B, other_A) = ([factor.double() for factor in update.matrices] for update in (one, other))
    return _norm(torch.cat([B * one.scale, other_B * -other.scale], dim=1), torch.cat([A, other_A]))


def _norm(B: Tensor, A: Tensor) -> float:
    R_B, R_A = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R
    found = torch.linalg.norm(R_B @ R_A.T).item()
    return 0.0 if found <= NOISE * (R_B.norm() * R_A.norm()).item() else found


def settings_for(updates: dict[str, Update], like: LoRAConfig) -> LoRAConfig:
    """Settings by which every update has its rank and its scale: `like` itself if it says so
    already."""

    def says(name: str, update: Update) -> bool:
        return layer_rank(like, name) == update.rank and math.isclose(
            layer_scale(like, name), update.scale, rel_tol=1e-12
        )

    if all(says(name, update) for name, update in updates.items()):
        return like
    ranks = {name: update.rank for name, update in updates.items()}
    # 14 digits: 16.000000000000004 comes of dividing and multiplying, and 16 is meant
    alphas = {
        name: float(f"{u.scale * (math.sqrt(u.rank) if like.rslora else u.rank):.14g}")
        for name, u in updates.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return dataclasses.replace(
        like,
        rank=rank,
        alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )


def table(changes: list[Change]) -> list[str]:
    """A line a layer, ranks and relative error, and the total of both."""
    rows = [
        (change.layer, change.before, change.after, change.error / (change.norm or 1.0)) for change in changes
    ]
    total_norm, total_error = (
        math.hypot(*(getattr(change, part) for change in changes)) for part in ("norm", "error")
    )
    total = (
        "all",
        sum(change.before for change in changes),
        sum(change.after for change in changes),
        total_error / (total_norm or 1.0),
    )
    width = max((len(row[0]) for row in rows), default=0)
    lines = [f"{'layer':{width}}  rank before  after  error"]
    return lines + [
        f"{name:{width}}  {before:11}  {after:5}  {error:.2e}"
        for name, before, after, error in (*rows, total)
    ]
