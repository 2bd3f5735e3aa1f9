"""Labelled answers, and pairs taken apart into them, to examples. Torch-free."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from litlora.data.encode import Encoder
from litlora.data.examples import EVENTS, Example, Examples, chunks, examples_of, no_example_left
from litlora.data.pairs import tokenize_pairs
from litlora.data.records import Labelled, Pair
from litlora.data.skipped import Skipped
from litlora.errors import DataError
from litlora.prompts import PromptStyle
from litlora.tokenizer import Tokenizer

ONE_EXAMPLE = (
    "an answer with a label must be one example, and this one is several: let it be short, and let its "
    "last message alone be learned"
)


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """An answer as token ids, and whether it is a good one; the answer alone is learned."""

    answer: Example
    is_desirable: bool
    reference: tuple[float] | None = None
    """The log-probability of the answer before training."""
    other: Example | None = None
    """The prompt with the answer of another example, by which KTO estimates z."""
    other_reference: float = 0.0
    """The log-probability of that answer before training."""


def tokenize_labelled(
    records: Sequence[Labelled | Pair],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    skipped: Skipped | None = None,
) -> Examples:
    """Encode every labelled answer, and of pairs first the chosen answers, as good ones, then the
    rejected ones: apart, as KTO combines neighbours. One that does not fit is left out. Raises
    DataError if none is left; and for one that cannot be learned, unless there is `skipped` to note
    it."""
    pairs = [record for record in records if isinstance(record, Pair)]
    labelled = [record for record in records if isinstance(record, Labelled)]
    found: list[LabelledExample] = []
    counts: Counter[str] = Counter()
    if pairs:
        made = tokenize_pairs(pairs, tokenizer, style, max_seq_length, skipped)
        found += [LabelledExample(pair.chosen, True) for pair in made.examples]
        found += [LabelledExample(pair.rejected, False) for pair in made.examples]
        counts += made.counts()
    encoder = Encoder(tokenizer, style)
    errors: list[DataError] | None = None if skipped is None else []
    groups = chunks([record.conversation for record in labelled])
    encoded = [one for chunk in groups for one in encoder.encode(chunk, errors)]
    refusals = iter(errors or ())
    for record, each in zip(labelled, encoded, strict=True):
        error = None if each.drafts else next(refusals)
        of_answer: Counter[str] = Counter()
        examples = examples_of(each, max_seq_length, of_answer) if each.drafts else []
        if of_answer["split"] or of_answer["pieces"]:
            error = DataError(f"{record.conversation.place}: {ONE_EXAMPLE}")
        if error is not None:
            if skipped is None:
                raise error
            skipped.append(error)
            continue
        counts += of_answer
        found += [LabelledExample(example, record.is_desirable) for example in examples if example.learned]
    if not found:
        left_out = [] if skipped is None else skipped.notices()
        raise no_example_left(max_seq_length, labelled[0].conversation.place, left_out)
    return Examples(found, *(counts[name] for name in EVENTS))
