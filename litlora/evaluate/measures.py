"""Measures of a model: loss and perplexity, exact match, multiple choice."""

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from litlora.data.conversation import Conversation, is_document
from litlora.data.encode import Draft
from litlora.data.examples import Example, tokenize
from litlora.errors import DataError
from litlora.evaluate.choices import Choices
from litlora.evaluate.likelihood import likelihoods
from litlora.evaluate.subject import Subject

MOST_WRONG = 20
"""Wrong answers that are kept, the first ones."""


@dataclass(frozen=True)
class Measured:
    """What one measure found."""

    figures: dict[str, float]
    records: int
    """On how many it was measured."""
    wrong: list[dict[str, Any]] = field(default_factory=list)
    """The first wrong answers: place, answer, expected."""
    notices: list[str] = field(default_factory=list)
    """What the user must know."""


def measure_loss(subject: Subject, conversations: list[Conversation]) -> Measured:
    """The loss of the answers' tokens in nats, each counting the same, as in training; and its
    exponential, the perplexity."""
    made = tokenize(conversations, subject.tokenizer, subject.style, subject.context)
    found = likelihoods(subject.model, made.examples, subject.batch_tokens)
    tokens = sum(one.num_tokens for one in found)
    if not tokens:
        raise DataError(f"{conversations[0].place}: no token of the records is an answer's")
    loss = -sum(one.log_prob for one in found) / tokens
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}
    return Measured(figures, len(made.examples), notices=made.notices(subject.context))


def measure_exact_match(
    subject: Subject,
    conversations: Sequence[Conversation],
    *,
    pattern: str | None = None,
    ignore_case: bool = False,
    max_new_tokens: int = 256,
) -> Measured:
    """The share of records whose last answer the model gives itself, by the likeliest token each
    time.

    Both are compared without white space at their ends, and with one space for each other stretch of
    it. With a pattern, what it finds last in each of them is compared; a record's answer in which it
    finds nothing counts as a whole. Raises DataError for a record without an answer in text.
    """
    right, wrong, unfound = 0, [], 0
    answers = [last_answer(conversation) for conversation in conversations]
    prompts = [prompt_ids(subject, conversation) for conversation in conversations]
    given = subject.answers(prompts, max_new_tokens)
    for conversation, expected, said in zip(conversations, answers, given, strict=True):
        extracted = said if pattern is None else _last_match(pattern, said)
        wanted = expected if pattern is None else _last_match(pattern, expected) or expected
        unfound += extracted is None
        same = extracted is not None and _plain(extracted, ignore_case) == _plain(wanted, ignore_case)
        right += same
        if not same and len(wrong) < MOST_WRONG:
            wrong.append({"place": str(conversation.place), "answer": said, "expected": expected})
    figures = shares("exact_match", right, len(conversations))
    if pattern is not None:
        figures["without_match"] = unfound / len(conversations)
    return Measured(figures, len(conversations), wrong)


def measure_choice(subject: Subject, questions: Sequence[Choices]) -> Measured:
    """The share of questions whose right choice is the likeliest answer, its end included; and the
    likeliest per character, which does not favour short choices."""
    examples = [_choice(subject, each) for question in questions for each in question.conversations]
    scores = iter(likelihoods(subject.model, examples, subject.batch_tokens))
    right = right_by_length = 0
    wrong = []
    for question in questions:
        log_probs = [next(scores).log_prob for _ in question.texts]
        by_length = [log_prob / max(1, len(t)) for log_prob, t in zip(log_probs, question.texts, strict=True)]
        chosen = log_probs.index(max(log_probs))
        right += chosen == question.right
        right_by_length += by_length.index(max(by_length)) == question.right
        if chosen != question.right and len(wrong) < MOST_WRONG:
            texts = question.texts
            wrong.append(
                {"place": str(question.place), "answer": texts[chosen], "expected": texts[question.right]}
            )
    figures = shares("accuracy", right, len(questions))
    figures |= shares("accuracy_per_character", right_by_length, len(questions))
    return Measured(figures, len(questions), wrong)


def shares(name: str, right: int, total: int) -> dict[str, float]:
    """A share, and the standard error of its mean."""
    share = right / total
    return {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(1, total - 1))}


def last_answer(conversation: Conversation) -> str:
    """What the model is to answer at the end of a conversation."""
    if is_document(conversation):
        raise DataError(f"{conversation.place}: is a text without a question; exact_match needs an answer")
    answer = next(message for message in reversed(conversation.messages) if message.train)
    if answer.more:
        more = ", ".join(answer.more)
        raise DataError(f"{conversation.place}: its answer has {more}; exact_match compares text alone")
    return answer.content


def prompt_ids(subject: Subject, conversation: Conversation) -> list[int]:
    """The token ids that ask for the last answer, as chat asks."""
    draft, turn = _last_turn(subject, conversation)
    if turn[0] >= subject.context:
        raise DataError(
            f"{conversation.place}: its prompt has {turn[0]:,} tokens; the model's context holds "
            f"{subject.context:,}, the answer included"
        )
    return draft.ids[: turn[0]]


def _choice(subject: Subject, conversation: Conversation) -> Example:
    draft, turn = _last_turn(subject, conversation)
    if turn[1] > subject.context:
        raise DataError(
            f"{conversation.place}: has {turn[1]:,} tokens with a choice; the model's context holds "
            f"{subject.context:,}"
        )
    return Example(array("i", draft.ids[: turn[1]]), (turn,))


def _last_turn(subject: Subject, conversation: Conversation) -> tuple[Draft, tuple[int, int]]:
    """A conversation in token ids, and where its last learned answer stands in them."""
    (encoded,) = subject.encoder.encode([conversation])
    draft = encoded.drafts[-1]
    turn = [turn for turn in draft.turns if turn.learned][-1]
    return draft, (turn.start, turn.stop)


def _last_match(pattern: str, text: str) -> str | None:
    """The last match's group, or all of it if there is none."""
    matches = [*re.finditer(pattern, text)]
    return matches[-1][matches[-1].re.groups] if matches else None


def _plain(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.lower() if ignore_case else text
