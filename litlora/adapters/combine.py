"""Combining: one adapter out of several on the same base. Everything is defined on ΔW = s · B A,
never on A and B separately: a mean of factors is not the factor of a mean, and (Σ B)(Σ A) has cross
terms B_i A_j that nobody trained.

    linear           Σ w_i ΔW_i, exact, stored at the rank of the sum
    cat              Σ w_i ΔW_i, exact, stored as the factors side by side, whose ranks add
    svd              Σ w_i ΔW_i at a given rank or error, the nearest one (Eckart and Young 1936)
    magnitude_prune  Σ w_i ΔW_i, of each ΔW_i only the largest entries, a share `density` of them
    dare_linear      the same of random entries, divided by the density
                     (DARE, Yu et al. 2024, arXiv:2311.03099)
    ties             the largest entries; the sum elects each entry's sign, and the mean is taken of
                     those that agree (TIES, Yadav et al. 2023, arXiv:2306.01708)
    dare_ties        random entries as in dare_linear, elected as in ties

Entries are trimmed layer by layer, so that one layer is in memory at a time, and the weights are
applied before the election. A ΔW whose entries were dropped or elected no longer has a low rank; it
is stored as the nearest one of the requested rank, and the error is measured and reported. A layer
that only one adapter updates, with nothing to drop, keeps its A and B bit for bit: the weight is
multiplied into its scale.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor

from litlora.adapters.combine_entries import Recipe, combine_dense
from litlora.adapters.combine_rows import combine_rows
from litlora.adapters.factored import common_dtype, difference, least_rank, norm, wide
from litlora.adapters.merge import EMBEDDING, HEAD, Plan, plan_merge, whole_of
from litlora.adapters.resize import Change, Form, finite, plain_updates, shrink
from litlora.checkpoint import Chain
from litlora.errors import CheckpointError, UserError, setting
from litlora.formats.lora_files import LoRAFile, as_stored
from litlora.formats.lora_header import in_common
from litlora.formats.lora_spelling import in_first_spelling
from litlora.lora import Adapter, Update
from litlora.lora.select import settings_for
from litlora.storage.dtypes import dtype_name

_OVERSAMPLE, _ITERATIONS = 16, 4


def combine_adapters(chains: list[Chain], recipe: Recipe) -> tuple[Adapter, list[Change]]:
    """The combination of the outermost adapters of `chains`, and what became of every layer.

    Tensors saved whole are combined by their differences from the base, and rows of added tokens by
    those from what they started as. Raises CheckpointError for a layer whose shapes differ, for
    adapters that add different tokens, and for what a mode cannot combine.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    base, model = plan_merge(chains[0].inner)
    chains = [_with_whole(chain, whole_of(chain.top, model)) for chain in chains]
    adapters = [chain.top for chain in chains]
    if making_up := [adapter for adapter in adapters if adapter.needs_quantised]:
        raise CheckpointError(
            f"{making_up[0].file}: was started by LoftQ, and makes up for what quantising lost; merge "
            "it first, and train the others on the result"
        )
    updates, changes = _combine_all(
        [adapter.file for adapter in adapters],
        [plain_updates(adapter) for adapter in adapters],
        recipe,
        generator,
    )
    configs = [adapter.config for adapter in adapters]
    whole = _combine_whole(base, chains, recipe, generator)
    rows = combine_rows(base, chains, recipe, generator)
    if model.tie_word_embeddings:
        whole |= _other_ends(base, updates, whole)
    saved = dict.fromkeys(name for config in configs for name in config.modules_to_save)
    ends = [name for name in (EMBEDDING, HEAD) if name in whole]
    saved |= {
        name.removesuffix(".weight"): None
        for name in ends
        if not any(f".{module}." in f".{name}" for module in saved)
    }
    same = all(config.targets == configs[0].targets for config in configs)
    like = dataclasses.replace(
        configs[0],
        rslora=all(config.rslora for config in configs),
        targets=configs[0].targets if same else list(updates),
        modules_to_save=list(saved),
    )
    return Adapter(settings_for(updates, like), updates, whole, adapters[0].base, rows=rows), changes


def combine_files(loras: list[LoRAFile], recipe: Recipe, dtype: torch.dtype) -> tuple[LoRAFile, list[Change]]:
    """The same for LoRA files of other tools, with the names and the format of the first, to be
    stored in `dtype`.

    Differences of whole tensors are combined entry by entry. Raises CheckpointError for files whose
    layers have other names, as those might be the same layers, and for shapes that differ. A layer that
    another file spells in another way is the same layer.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    loras = _in_one_spelling([lora.plain() for lora in loras])
    first = loras[0]
    for other in loras[1:]:
        shared = (other.updates.keys() | other.diffs.keys()) & (first.updates.keys() | first.diffs.keys())
        if not shared:
            raise CheckpointError(
                f"{other.path}: has no layer of a name that {first.path} has; name files of one model"
            )
    updates, changes = _combine_all(
        [lora.path for lora in loras],
        [lora.updates for lora in loras],
        recipe,
        generator,
        form=lambda update: as_stored(update, alpha=first.keeps_scale, dtype=dtype),
    )
    diffs = _combine_diffs(loras, recipe, generator)
    for key, diff in diffs.items():
        if not torch.isfinite(diff.to(dtype)).all():
            kind = dtype_name(dtype)
            raise CheckpointError(f"{key}: the result has values beyond what {kind} can hold")
    header = in_common([lora.header for lora in loras])
    return dataclasses.replace(first, updates=updates, diffs=diffs, header=header), changes


def _in_one_spelling(loras: list[LoRAFile]) -> list[LoRAFile]:
    """The files with the layers' names of the first, however each spells them."""
    modules = [[*lora.updates, *(_module(key) for key in lora.diffs)] for lora in loras]
    files = [(lora.path, dict.fromkeys(own)) for lora, own in zip(loras, modules, strict=True)]
    names = in_first_spelling(files)
    return [
        dataclasses.replace(
            lora,
            updates={renamed[name]: update for name, update in lora.updates.items()},
            diffs={
                renamed[_module(key)] + key.removeprefix(_module(key)): diff
                for key, diff in lora.diffs.items()
            },
        )
        for lora, renamed in zip(loras, names, strict=True)
    ]


def _module(key: str) -> str:
    """The module of a difference of a whole tensor."""
    return key.rpartition(".")[0]


def _combine_diffs(loras: list[LoRAFile], recipe: Recipe, generator: Generator) -> dict[str, Tensor]:
    """Differences of whole tensors, entry by entry."""
    diffs = {}
    for key in dict.fromkeys(key for lora in loras for key in lora.diffs):
        _check_shapes(key, [(lora.path, lora.diffs[key].shape) for lora in loras if key in lora.diffs])
        weighted = zip(recipe.weights, loras, strict=True)
        terms = [(weight, lora.diffs[key]) for weight, lora in weighted if key in lora.diffs and weight != 0]
        if len(terms) == 1 and terms[0][0] == 1 and recipe.density == 1:
            diffs[key] = terms[0][1]
        elif terms:
            deltas = [weight * tensor.to(wide(tensor.dtype)) for weight, tensor in terms]
            diffs[key] = combine_dense(deltas, recipe, generator)
    return diffs


def _combine_all(
    files: list[Path],
    found: list[dict[str, Update]],
    recipe: Recipe,
    generator: Generator,
    form: Form = lambda update: update,
) -> tuple[dict[str, Update], list[Change]]:
    """The combination of the updates that each of `files` holds, by the layers' names, in the form
    in which it will be stored, and what became of every layer."""
    updates, changes = {}, []
    for name in dict.fromkeys(name for one in found for name in one):
        holders = zip(files, found, strict=True)
        _check_shapes(name, [(file, one[name].shape) for file, one in holders if name in one])
        weighted = zip(recipe.weights, found, strict=True)
        terms = [(weight, one[name]) for weight, one in weighted if name in one and weight != 0]
        if not terms:
            continue
        updates[name], full, lost = combine_layer(terms, recipe, generator, form)
        finite(name, updates[name])
        changes.append(Change(name, sum(update.rank for _, update in terms), updates[name].rank, full, lost))
    return updates, changes


def combine_layer(
    terms: list[tuple[float, Update]],
    recipe: Recipe,
    generator: Generator,
    form: Form = lambda update: update,
) -> tuple[Update, float, float]:
    """One layer's combination in its form, the norm of the ΔW that was to be stored, and that of
    what the stored one lacks."""
    exact = _checked_range(concatenate(terms))
    alone = len(terms) == 1
    if recipe.density < 1 or (recipe.elects and not alone):
        dense = combine_dense([weight * update.product() for weight, update in terms], recipe, generator)
        most = exact.rank if recipe.max_error is None else min(dense.shape)
        stored = exact.with_matrices(*factorized(dense, recipe.rank or most, recipe.max_error, generator))
        stored = form(dataclasses.replace(stored, scale=1.0))
        lost = torch.linalg.norm(dense.double() - stored.product().double()).item()
        return stored, torch.linalg.norm(dense.double()).item(), lost
    stored = exact
    if recipe.mode != "cat":
        rank = recipe.rank
        if recipe.mode == "svd" and rank is None and recipe.max_error is None:
            rank = max(update.rank for _, update in terms)
        # A single adapter keeps its factors unless a smaller one is requested: they may have more
        # columns than their product has rank.
        if not alone or (rank or exact.rank) < exact.rank or recipe.max_error is not None:
            stored = shrink(exact, rank=rank, max_error=recipe.max_error or 0.0)
    stored = form(stored)
    return stored, norm(exact), difference(exact, stored)


def concatenate(terms: list[tuple[float, Update]]) -> Update:
    """Σ w_i s_i B_i A_i, the factors side by side. The largest w_i s_i becomes the scale, and each
    B is multiplied by its own share of it."""
    first = terms[0][1]
    scale = max((weight * update.scale for weight, update in terms), key=abs)
    columns = []
    for weight, update in terms:
        factor, B = weight * update.scale / scale, update.matrices[0]
        columns.append(B if factor == 1 else (B.double() * factor).to(wide(B.dtype)))
    rows = torch.cat([update.matrices[1] for _, update in terms])
    return dataclasses.replace(first, scale=scale).with_matrices(torch.cat(columns, dim=1), rows)


def _checked_range(update: Update) -> Update:
    """The update itself. Raises UserError if its values are beyond fp32."""
    if not norm(update) < torch.finfo(torch.float32).max:
        raise UserError(f"{setting('weights')}: the sum has values beyond fp32; choose smaller ones")
    return update


def factorized(
    delta: Tensor, rank: int, max_error: float | None, generator: Generator
) -> tuple[Tensor, Tensor]:
    """B and A, the nearest of at most `rank` to a dense (out, in) matrix, or of the least rank
    within `max_error`, a share of its norm.

    First an orthonormal basis U of its shorter side: by subspace iteration on a random sketch
    (Halko, Martinsson and Tropp 2011, arXiv:0909.4061) if a small part of the spectrum is enough,
    else from all eigenvectors of the smaller Gram matrix. The matrix expressed in that basis makes
    the other factor. The rows of A are orthonormal, like those of a resized update.
    """
    turned = delta.size(0) > delta.size(1)
    flat = delta.T if turned else delta
    sketch = rank + _OVERSAMPLE
    if max_error is None and 4 * sketch < flat.size(0):
        start = torch.randn(flat.size(1), sketch, dtype=delta.dtype, generator=generator)
        Q = torch.linalg.qr(flat @ start).Q
        for _ in range(_ITERATIONS):
            Q = torch.linalg.qr(flat @ torch.linalg.qr(flat.T @ Q).Q).Q
        small = (Q.T @ flat).double()
        U = Q.double() @ torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)[:, :rank]
    else:
        exact = flat.double()
        squares, vectors = torch.linalg.eigh(exact @ exact.T)
        needed = rank
        if max_error is not None:
            needed = min(rank, least_rank(squares.flip(0).clamp(min=0).sqrt(), max_error))
        U = vectors.flip(1)[:, :needed]
    inside = flat.double().T @ U  # (longer side, rank)
    if turned:
        return inside.to(delta.dtype), U.T.to(delta.dtype)
    Q, R = torch.linalg.qr(inside)
    return (U @ R.T).to(delta.dtype), Q.T.to(delta.dtype)


# ---- tensors saved whole


def _combine_whole(
    base: Plan, chains: list[Chain], recipe: Recipe, generator: Generator
) -> dict[str, Tensor]:
    """W + the combination of all W_i - W, in the dtype of the W_i. A tensor that one adapter holds,
    at weight 1, keeps its bits."""
    combined = {}
    for name in dict.fromkeys(name for chain in chains for name in chain.top.whole):
        weighted = zip(recipe.weights, chains, strict=True)
        terms = [(weight, chain.top) for weight, chain in weighted if name in chain.top.whole and weight != 0]
        if not terms:
            continue
        _check_not_adapted(name, chains, terms[0][1], recipe)
        if len(terms) == 1 and terms[0][0] == 1 and recipe.density == 1:
            combined[name] = terms[0][1].whole[name]
            continue
        weight = _base_tensor(base, name, terms[0][1])
        shapes = [(adapter.file, adapter.whole[name].shape) for _, adapter in terms]
        _check_shapes(name, [(chains[0].inner.top.file, weight.shape), *shapes])
        exact = wide(weight.dtype)
        before = weight.to(exact)
        deltas = [factor * (adapter.whole[name].to(exact) - before) for factor, adapter in terms]
        dtype = common_dtype(adapter.whole[name] for _, adapter in terms)
        combined[name] = (before + combine_dense(deltas, recipe, generator)).to(dtype)
    return combined


def _with_whole(chain: Chain, whole: dict[str, Tensor]) -> Chain:
    """The chain, with these tensors held whole by its outermost adapter, but for those that the rows
    of its added tokens make."""
    *inner, top = chain.adapters
    whole = {name: tensor for name, tensor in whole.items() if not top.rows or name not in top.rows.tensors}
    return dataclasses.replace(chain, adapters=[*inner, dataclasses.replace(top, whole=whole)])


def _other_ends(base: Plan, updates: Mapping[str, Update], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tied weight, for the output head if the embedding is updated and held whole, or the other
    way round: it would be taken for the one below the update, which both share (`whole_of`), though
    another adapter may have trained it."""
    return {
        other: base[EMBEDDING].tensor()
        for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING))
        if name in whole and name.removesuffix(".weight") in updates and other not in whole
    }


def _check_not_adapted(name: str, chains: list[Chain], holder: Adapter, recipe: Recipe) -> None:
    """Raise CheckpointError if a mode would drop or elect entries of a tensor that one adapter
    updates and another holds whole."""
    adapted = [chain.top for chain in chains if name.removesuffix(".weight") in chain.top.updates]
    if adapted and (recipe.density < 1 or (recipe.elects and len(chains) > 1)):
        raise CheckpointError(
            f"{adapted[0].file}: adapts {name}, which {holder.file} replaces whole; "
            f"{setting('mode')} {recipe.mode} cannot combine the two, linear, cat and svd can"
        )


def _base_tensor(base: Plan, name: str, holder: Adapter) -> Tensor:
    """The base's tensor of that name; for a tied output head, its embedding."""
    stored_as = EMBEDDING if name == HEAD and HEAD not in base else name
    if stored_as not in base:
        raise CheckpointError(f"{holder.file}: replaces {name}, which the base does not have")
    return base[stored_as].tensor()


def _check_shapes(name: str, shapes: list[tuple[Path, tuple[int, ...]]]) -> None:
    (first, expected), *others = shapes
    for file, shape in others:
        if shape != expected:
            here, there = (" x ".join(map(str, size)) for size in (shape, expected))
            raise CheckpointError(
                f"{file}: {name} is {here}, but {there} in {first}; the two are not for the same base"
            )
