"""Pairs of conversations to pairs of examples. Torch-free."""

from collections import Counter
from dataclasses import dataclass, replace

from litlora.data.conversation import is_document
from litlora.data.encode import Encoder
from litlora.data.examples import EVENTS, Example, Examples, chunks, examples_of, no_example_left
from litlora.data.records import Pair
from litlora.data.skipped import Skipped
from litlora.errors import DataError, setting
from litlora.prompts import PromptStyle
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two answers to one prompt as token ids; of both the answer alone is learned."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] | None = None
    """The log-probabilities of the two answers before training."""


def tokenize_pairs(
    pairs: list[Pair],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    skipped: Skipped | None = None,
) -> Examples:
    """Encode every pair. One of which an answer does not fit is left out. Raises DataError if none
    is left; and for a pair that cannot be learned, unless there is `skipped` to note it."""
    encoder = Encoder(tokenizer, style)
    sides = [side for pair in pairs for side in pair]
    errors: list[DataError] | None = None if skipped is None else []
    encoded = [one for chunk in chunks(sides) for one in encoder.encode(chunk, errors)]
    refusals = iter(errors or ())
    found: list[PairExample] = []
    counts: Counter[str] = Counter()
    for pair, chosen, rejected in zip(pairs, encoded[::2], encoded[1::2], strict=True):
        if refused := [next(refusals) for side in (chosen, rejected) if not side.drafts]:
            skipped.append(refused[0])
            continue
        of_pair: Counter[str] = Counter()
        examples = [examples_of(side, max_seq_length, of_pair) for side in (chosen, rejected)]
        if (problem := _problem(examples, of_pair)) is not None:
            error = DataError(f"{pair.chosen.place}: {problem}")
            if skipped is None:
                raise error
            skipped.append(error)
            continue
        if not all(examples):
            counts["left out"] += 1
            continue
        both = PairExample(*(example for (example,) in examples))
        if is_document(pair.chosen) and is_document(pair.rejected):
            both = _after_shared(both)
        counts += of_pair
        found.append(both)
    if not found:
        left_out = [] if skipped is None else skipped.notices()
        raise no_example_left(max_seq_length, pairs[0].chosen.place, left_out)
    return Examples(found, *(counts[name] for name in EVENTS))


def _problem(sides: list[list[Example]], counts: Counter[str]) -> str | None:
    """Why a pair cannot be learned, if so."""
    if counts["split"] or counts["pieces"]:
        return (
            "each of its two sides must be one example, and one is several: "
            "let both be short, and learn their last answer alone"
        )
    if not all(sides) or sides[0][0].ids != sides[1][0].ids:
        return None
    if counts["cut"]:
        return f"chosen and rejected are the same up to {setting('max_seq_length')}, where they are cut"
    return "chosen and rejected are the same"


def _after_shared(pair: PairExample) -> PairExample:
    """Of two texts, what they do not share is learned: the prompt is what both begin with."""
    ids = (pair.chosen.ids, pair.rejected.ids)
    shared = next((n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    sides = (pair.chosen, pair.rejected)
    # One that is the beginning of the other still ends there.
    starts = (min(shared, len(side.ids) - 1) for side in sides)
    chosen, rejected = (
        replace(side, learned=((start, len(side.ids)),)) for side, start in zip(sides, starts, strict=True)
    )
    return replace(pair, chosen=chosen, rejected=rejected)
