"""Conversations to examples: token ids and the spans of them that are learned. Done once, before
the first step. Torch-free."""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from litlora.data.conversation import Conversation, Place
from litlora.data.encode import Draft, Encoded, Encoder
from litlora.data.skipped import Skipped
from litlora.errors import DataError, setting
from litlora.prompts import PromptStyle
from litlora.tokenizer import Tokenizer

CHUNK = 2 * 10**7
"""Characters that are rendered and encoded at a time, about."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as token ids."""

    ids: array
    """32-bit integers: a list would take nine times the memory."""
    learned: tuple[tuple[int, int], ...]
    """(start, stop) of the ids that are learned, in order and apart from each other. The id at
    position 0 is never learned, as nothing predicts it."""

    def learned_spans(self, mask_prompt: bool = True) -> list[tuple[int, int]]:
        """What a loss is computed on: `learned` without position 0, or every id after the first
        where prompts are learned too."""
        spans = self.learned if mask_prompt else ((0, len(self.ids)),)
        return [(max(1, start), stop) for start, stop in spans if stop > max(1, start)]


@dataclass(frozen=True)
class Examples:
    """A tokenised data set, and what had to be done to it."""

    examples: Sequence[Example]
    num_cut: int
    """Examples with an answer that was cut at max_seq_length."""
    num_shortened: int
    """Examples that lost whole turns at the end to max_seq_length."""
    num_left_out: int
    """Examples whose first prompt alone fills max_seq_length, and empty ones."""
    num_empty: int
    """Answers without text that are learned."""
    num_split: int
    """Conversations that became several examples (`Encoded.drafts`)."""
    num_apart: int
    """Answers that were encoded apart from their prompts (`Encoded.num_apart`)."""
    num_trailing: int
    """Conversations that go on after their last learned answer (`Encoded.num_trailing`)."""
    num_in_pieces: int
    """Documents that became several examples, as they are longer than max_seq_length."""

    def counts(self) -> Counter[str]:
        """The numbers, by EVENTS."""
        numbers = [getattr(self, field.name) for field in fields(self)[1:]]
        return Counter(dict(zip(EVENTS, numbers, strict=True)))

    def notices(self, max_seq_length: int) -> list[str]:
        """What the user must know, a line each."""
        lines = (
            (
                self.num_cut,
                f"examples are longer than {max_seq_length:,} tokens: "
                "their answers were cut, each keeps its end-of-text",
            ),
            (
                self.num_shortened,
                f"conversations are longer than {max_seq_length:,} tokens: their last turns were left out",
            ),
            (
                self.num_left_out,
                f"examples left out: their prompts alone fill {max_seq_length:,} tokens, or they are empty",
            ),
            (self.num_empty, "answers are empty: only their end is learned"),
            (
                self.num_split,
                "conversations became an example for each answer: "
                "the chat template shows earlier turns otherwise than it asks for them",
            ),
            (
                self.num_apart,
                "answers share a token with their prompts in the whole text: "
                "they were encoded apart, as chat asks",
            ),
            (
                self.num_trailing,
                "conversations go on after the last answer that is learned: "
                "what follows it teaches nothing and was left out",
            ),
            (
                self.num_in_pieces,
                f"documents are longer than {max_seq_length:,} tokens: they are learned in pieces",
            ),
        )
        return [f"{number:,} {what}" for number, what in lines if number]


EVENTS = ("cut", "shortened", "left out", "empty", "split", "apart", "trailing", "pieces")
"""What is counted of a conversation, in the order of the numbers in `Examples`."""


def tokenize(
    conversations: list[Conversation],
    tokenizer: Tokenizer,
    style: PromptStyle,
    max_seq_length: int,
    skipped: Skipped | None = None,
) -> Examples:
    """Encode every conversation. Each example ends with the end of an answer, even where a long
    answer is cut.

    Raises NoExampleError if no example is left, and DataError for a conversation that the style has
    no form for, unless there is `skipped` to note it.
    """
    encoder = Encoder(tokenizer, style)
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    for chunk in chunks(conversations):
        for encoded in encoder.encode(chunk, skipped):
            examples += examples_of(encoded, max_seq_length, counts)
    if not examples:
        left_out = [] if skipped is None else skipped.notices()
        raise no_example_left(max_seq_length, conversations[0].place, left_out)
    return Examples(examples, *(counts[name] for name in EVENTS))


def examples_of(encoded: Encoded, max_seq_length: int, counts: Counter[str]) -> list[Example]:
    """The examples of one conversation; adds what is done to it to the `counts` of EVENTS."""
    examples = []
    counts["split"] += len(encoded.drafts) > 1
    counts["apart"] += encoded.num_apart
    counts["trailing"] += encoded.num_trailing > 0
    drafts = [piece for draft in encoded.drafts for piece in draft.pieces(max_seq_length)]
    counts["pieces"] += len(drafts) > len(encoded.drafts)
    for draft in drafts:
        fitting = _fitting(draft, max_seq_length)
        if fitting is None:
            counts["left out"] += 1
            continue
        counts["cut"] += fitting.turns[-1] not in draft.turns
        counts["shortened"] += len(fitting.turns) < len(draft.turns)
        learned = [turn for turn in fitting.turns if turn.learned]
        counts["empty"] += sum(turn.is_empty for turn in learned)
        spans = tuple((turn.start, turn.stop) for turn in learned)
        examples.append(Example(array("i", fitting.ids), spans))
    return examples


class NoExampleError(DataError):
    """No record of a data set gives an example."""


def no_example_left(max_seq_length: int, first: Place | str, left_out: list[str]) -> NoExampleError:
    """The error of a data set without an example; `first` is the place of its first record,
    `left_out` what is said of records that were."""
    return NoExampleError(
        f"no example is left: every prompt is empty, or fills {max_seq_length} tokens by itself "
        f"({setting('max_seq_length')} or the model's context); the first is {first}"
        + "".join(f"; {notice}" for notice in left_out)
    )


def chunks(conversations: Iterable[Conversation], size: int = CHUNK) -> Iterator[list[Conversation]]:
    """Conversations in groups of about `size` characters, where each turn repeats what came before
    it."""
    group: list[Conversation] = []
    characters = 0
    for conversation in conversations:
        messages = conversation.messages
        group.append(conversation)
        characters += len(messages) * sum(len(message.content) + len(message.input) for message in messages)
        if characters >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _fitting(draft: Draft, max_seq_length: int) -> Draft | None:
    """As many turns as fit; of the last one at least the first token of its answer. None if there
    is no such turn, or nothing to learn."""
    if len(draft.ids) <= max_seq_length:
        # Nothing predicts an end-of-text that stands alone.
        return draft if len(draft.ids) > 1 else None
    for number, turn in reversed(list(enumerate(draft.turns))):
        if turn.stop <= max_seq_length:
            return Draft(draft.ids[: turn.stop], draft.turns[: number + 1])
        if turn.start + 2 <= max_seq_length:  # for a token of the answer, and its end
            ids = [*draft.ids[: max_seq_length - 1], draft.ids[turn.stop - 1]]
            cut = turn._replace(stop=max_seq_length)
            return Draft(ids, (*draft.turns[:number], cut))
    return None


def content_line(example: Example) -> str:
    """An example's length and learned spans as a line of text, for the hash by which a resumed run
    recognises its data."""
    length = len(example.ids)
    if len(example.learned) == 1 and example.learned[0][1] == length:
        return f"{length} {example.learned[0][0]}\n"
    spans = ",".join(f"{start}-{stop}" for start, stop in example.learned)
    return f"{length} {spans or 'nothing'}\n"


def split(
    conversations: list[Conversation],
    val_fraction: float,
    seed: int,
    usable: Sequence[int] | None = None,
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation), drawn by the seed. With a fraction above 0 each of them gets at least
    one conversation, if there are two; and, with `usable`, one of those (see `drawn`)."""
    held_out = drawn(len(conversations), val_fraction, seed, usable)
    chosen = set(held_out)
    train = [conversation for index, conversation in enumerate(conversations) if index not in chosen]
    return train, [conversations[index] for index in held_out]


def drawn(total: int, val_fraction: float, seed: int, usable: Sequence[int] | None = None) -> list[int]:
    """The numbers of the conversations that are held out for validation, of so many in all.

    `usable` are the numbers of those that give an example, any of them more than once. Where all, or
    none, of them would be held out, others are: drawn from the usable alone.
    """
    num_val = min(total - 1, max(1, round(total * val_fraction))) if val_fraction else 0
    numbers = sorted(random.Random(seed).sample(range(total), num_val))
    if usable is None or not (numbers and len(usable)):
        return numbers
    import numpy as np

    is_held_out = np.isin(usable, numbers)
    if is_held_out.any() and not is_held_out.all():
        return numbers
    usable = np.unique(usable)
    return usable[drawn(len(usable), val_fraction, seed)].tolist()
