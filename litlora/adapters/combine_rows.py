"""Combining the rows of added tokens."""

import dataclasses

from torch import Generator

from litlora.adapters.combine_entries import Recipe, combine_dense
from litlora.adapters.factored import common_dtype, wide
from litlora.adapters.merge import Plan
from litlora.checkpoint import Chain
from litlora.errors import CheckpointError
from litlora.lora.rows import TokenRows, new_row
from litlora.tokenizer import Tokenizer


def combine_rows(base: Plan, chains: list[Chain], recipe: Recipe, generator: Generator) -> TokenRows | None:
    """The rows of added tokens: their start + the combination of what training made of it. At weights
    whose sum is 1, linearly, that is the weighted sum of the rows. None if no adapter adds tokens."""
    if not any(chain.top.rows for chain in chains):
        return None
    added = [_added_tokens(chain) for chain in chains]
    for chain, tokens in zip(chains, added, strict=True):
        if tokens != added[0]:
            here, there = (
                ", ".join(f"{token} ({number})" for token, number in each.items()) or "none"
                for each in (tokens, added[0])
            )
            raise CheckpointError(
                f"{chain.top.file}: the tokens that it adds are {here}, those of {chains[0].top.file} "
                f"{there}; adapters can be combined if all add the same ones in the same order; else merge "
                "one first, and train the others on the result"
            )
    first = chains[0].top.rows
    known = Tokenizer(chains[0].inner.sources).vocab_size
    if first.ids != tuple(range(known, known + len(first.ids))):
        raise CheckpointError(
            f"{chains[0].top.file}: trains rows of tokens that do not follow the {known} of its base; such "
            "rows cannot be combined"
        )
    combined = {}
    for name in first.tensors:
        weighted = zip(recipe.weights, chains, strict=True)
        terms = [(weight, chain.top.rows.tensors[name]) for weight, chain in weighted if weight != 0]
        if len(terms) == 1 and terms[0][0] == 1 and recipe.density == 1:
            combined[name] = terms[0][1]
            continue
        exact = wide(terms[0][1].dtype)
        start = new_row(base[name].tensor(), known).to(exact)
        deltas = [weight * (rows.to(exact) - start) for weight, rows in terms]
        dtype = common_dtype(rows for _, rows in terms)
        combined[name] = (start + combine_dense(deltas, recipe, generator)).to(dtype)
    return dataclasses.replace(first, tensors=combined)


def _added_tokens(chain: Chain) -> dict[str, int]:
    """The tokens that the outermost adapter adds, in their order, with their numbers."""
    if chain.top.rows is None:
        return {}
    tokenizer = Tokenizer(chain.sources)
    tokens = {number: tokenizer.token(number) for number in chain.top.rows.ids}
    if None in tokens.values():
        raise CheckpointError(
            f"{chain.top.file}: adds tokens, and its tokenizer is not beside it; which they are is not known"
        )
    return {token: number for number, token in tokens.items()}
