"""Conversations to token ids, in one prompt style, and where each answer stands in them.
Torch-free.

An answer is learned after the very token ids that chat asks with, and up to the token at which
generation stops. A text that has several answers is encoded once, and the ids of each prompt in it
are compared with those that it has alone, as chat encodes it.
"""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from litlora.data.conversation import Conversation, Message, is_document
from litlora.data.skipped import Skipped
from litlora.errors import CheckpointError, DataError, UserError, setting
from litlora.prompts import ChatTemplate, PromptStyle
from litlora.prompts.exchange import Passage, TurnText, passages
from litlora.prompts.shown import Asked
from litlora.prompts.template import TEMPLATE_TEXT, Refusal, TurnEnds, template_message
from litlora.tokenizer import Cut, Tokenizer

LONG_RECORD = 10**6
"""Characters of a record above which its size is the likely cause of a template's or a tokenizer's
failure."""

_WITHOUT_SYSTEM = (
    f"; without the system message it can be learned: unset {setting('system')}, or "
    f"{setting('ignore')} '[system]' if it is a field of the record, or take it out of the messages"
)


class Turn(NamedTuple):
    """Where an answer stands in token ids, its end included."""

    start: int
    stop: int
    learned: bool
    is_empty: bool


@dataclass(frozen=True)
class Draft:
    """Token ids that end with an answer's end, and the answers in them."""

    ids: list[int]
    turns: tuple[Turn, ...]
    is_document: bool = False
    """Whether it is a text that stands alone, which can be learned in pieces."""

    def pieces(self, length: int) -> list["Draft"]:
        """Itself; or a document that has more ids, in pieces of at most so many. Each begins with
        the last id of the one before, so that all ids are learned, once."""
        if not self.is_document or len(self.ids) <= length or length < 2:
            return [self]
        (turn,) = self.turns
        found = []
        for begin in range(0, len(self.ids) - 1, length - 1):
            ids = self.ids[begin : begin + length]
            found.append(
                replace(self, ids=ids, turns=(turn._replace(start=min(turn.start, 1), stop=len(ids)),))
            )
        return found


@dataclass(frozen=True)
class Encoded:
    """A conversation in token ids."""

    drafts: list[Draft]
    """One with all answers; or several, if the style shows an earlier turn otherwise than it asks
    for it: then each answer stands in the form in which it is asked for. None, if the style has no
    form for the conversation, and such ones are left out."""
    num_apart: int
    """Answers whose first characters share a token with the prompt in the whole text. Prompt and
    answer are then encoded apart, as chat encodes the prompt alone."""
    num_trailing: int = 0
    """Messages after the last answer that is learned. Nothing is learned of them or after them, so
    they are left out."""


class Encoder:
    """Encodes conversations in a prompt style."""

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle) -> None:
        self._tokenizer, self._style = tokenizer, style
        template = style.template
        self._ends = TurnEnds(None, None) if template is None else template.turn_ends(tokenizer)
        self._begins_anew = template is None
        self._now = time.time()  # a template that writes the time must not change from text to text

    def encode(
        self, conversations: list[Conversation], skipped: Skipped | list[DataError] | None = None
    ) -> list[Encoded]:
        """Each conversation in token ids. Raises DataError, naming the record, if the style has no
        form for it; or, with `skipped`, adds the error to it and gives no draft."""
        problems: dict[int, DataError] = {}
        found = []
        for number, conversation in enumerate(conversations):
            try:
                found.append(self._passages(conversation))
            except DataError as error:
                if skipped is None:
                    raise
                problems[number] = error
                found.append([])
        ids = iter(self._ids(conversations, found, None if skipped is None else problems))
        for number in sorted(problems):
            skipped.append(problems[number])
        return [
            self._encoded(conversation, [(passage, *next(ids)) for passage in of_one])
            for conversation, of_one in zip(conversations, found, strict=True)
        ]

    def _ids(
        self,
        conversations: list[Conversation],
        found: list[list[Passage]],
        problems: dict[int, DataError] | None,
    ) -> list[tuple[list[int], list[Cut]]]:
        """Of each text its ids, and where its answers begin and end in them. A conversation that is
        too long for the tokenizer is raised, or, with `problems`, noted there and taken out of
        `found`."""
        texts = [
            (passage.text, [place for turn in passage.turns for place in (turn.start, turn.stop)])
            for of_one in found
            for passage in of_one
        ]
        try:
            return self._tokenizer.encode_cut(texts)
        except CheckpointError as error:
            number = self._too_long(found)
            if number is None:
                raise
            problem = _too_long(conversations[number], found[number], error)
        if problems is None:
            raise problem
        problems[number], found[number] = problem, []
        return self._ids(conversations, found, problems)

    def _too_long(self, found: list[list[Passage]]) -> int | None:
        """Which of the conversations the tokenizer cannot encode as it is long; None: that is not
        why it failed."""
        long = [number for number, passages in enumerate(found) if _size(passages) > LONG_RECORD]
        if len(long) == 1:
            return long[0]
        for number in long:
            try:
                self._tokenizer.encode_batch([passage.text for passage in found[number]])
            except CheckpointError:
                return number
        return None

    def _passages(self, conversation: Conversation) -> list[Passage]:
        """The texts of a conversation."""
        if self._style.template is not None and not is_document(conversation):
            return _of_template(self._style.template, conversation, self._ends, self._now)
        return _of_style(self._style, conversation)

    def _encoded(
        self, conversation: Conversation, found: list[tuple[Passage, list[int], list[Cut]]]
    ) -> Encoded:
        if not found:
            return Encoded([], 0)
        messages = conversation.messages
        # A chat template writes the begin-of-text token itself.
        begin = self._tokenizer.begin_ids if self._begins_anew or is_document(conversation) else []
        drafts: list[Draft] = []
        num_apart = last = 0
        for passage, ids, cuts in found:
            for turn, start, stop in zip(passage.turns, cuts[::2], cuts[1::2], strict=True):
                message, last = messages[turn.index], turn.index
                prompt, finished = begin + _up_to(start, ids), begin + _up_to(stop, ids)
                if apart := finished[: len(prompt)] != prompt:
                    answer = passage.text[turn.start : turn.stop] + turn.rest
                    finished = prompt + self._tokenizer.encode(answer)
                num_apart += apart
                after = [] if apart or stop.kept is not None else ids[stop.number : stop.number + 1]
                finished = self._ended(finished, len(prompt), message, after)
                is_empty = not message.content.strip() and not message.more
                new = Turn(len(prompt), len(finished), message.train, is_empty)
                self._add(drafts, Draft(finished, (new,), is_document(conversation)))
        learned = [draft for draft in drafts if any(turn.learned for turn in draft.turns)]
        return Encoded(learned or drafts[-1:], num_apart, len(messages) - 1 - last)

    def _ended(self, ids: list[int], start: int, message: Message, after: list[int]) -> list[int]:
        """Token ids with an answer, from `start` on, up to its end. `after` is what comes next in
        the text, if it goes on to the next turn."""
        answer = ids[start:]
        end = self._ends.of(message.more)
        if end is not None and end.id in answer:
            # What follows the last end of a turn, perhaps a newline, is not part of the answer.
            return ids[: len(ids) - answer[::-1].index(end.id)]
        # Some templates end a turn only with the mark of the next one, at which generation stops.
        return [*ids, *(after if {*after} & self._tokenizer.stop_ids else [self._tokenizer.eos_id])]

    def _add(self, drafts: list[Draft], new: Draft) -> None:
        """Join the next turn to the one before, if its prompt begins with it."""
        before = drafts[-1] if drafts else Draft([], ())
        (turn,) = new.turns
        if new.is_document:
            drafts.append(new)
        elif self._begins_anew:  # such a style asks each question after the end of the last
            shift = len(before.ids)
            turn = turn._replace(start=turn.start + shift, stop=turn.stop + shift)
            drafts[:] = [Draft(before.ids + new.ids, (*before.turns, turn))]
        elif turn.start >= len(before.ids) and new.ids[: len(before.ids)] == before.ids:
            drafts[-1:] = [Draft(new.ids, (*before.turns, turn))]
        else:
            drafts.append(new)


def _size(passages: list[Passage]) -> int:
    """Characters of the longest text."""
    return max((len(passage.text) for passage in passages), default=0)


def _too_long(conversation: Conversation, passages: list[Passage], error: CheckpointError) -> DataError:
    return DataError(
        f"{conversation.place}: has {_size(passages):,} characters, which is too long for the tokenizer: "
        f"split the record, or remove it ({error.args[0]})"
    )


def _up_to(cut: Cut, ids: list[int]) -> list[int]:
    """The ids of a text up to a place."""
    return ids[: cut.number] if cut.kept is None else ids[: cut.kept] + cut.others


def _of_template(
    template: ChatTemplate, conversation: Conversation, ends: TurnEnds, now: float
) -> list[Passage]:
    messages = conversation.messages
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        roles = _some([message.role for message in messages])
        raise DataError(f"{conversation.place}: the assistant says nothing in it; it has {roles}")
    turns = [index for index in answers if messages[index].train] or answers[-1:]
    size = sum(len(message.content) + len(message.input) for message in messages)
    beside = [message.more for message in messages if message.more]
    size += len(json.dumps([beside, conversation.tools])) if beside or conversation.tools else 0
    if size > TEMPLATE_TEXT:
        raise DataError(
            f"{conversation.place}: has {size:,} characters, and a chat template may write "
            f"{TEMPLATE_TEXT:,}; split the record, or remove it"
        )
    given = [template_message(m.role, m.content, m.input, m.more) for m in messages[: turns[-1] + 1]]
    asked = Asked(given, turns, [*conversation.tools] or None, now)
    try:
        return passages(template, asked, ends)
    except UserError as error:
        helps = _remedy(template, size, asked, ends, error)
        raise DataError(f"{conversation.place}: {error.args[0]}{helps}") from None


def _remedy(template: ChatTemplate, size: int, asked: Asked, ends: TurnEnds, error: UserError) -> str:
    """What helps, as the end of a message."""
    if size > LONG_RECORD:
        return f"; it has {size:,} characters: split it, or remove it"
    roles = [message["role"] for message in asked.messages]
    if roles[0] == "system" and len(roles) > 1:
        without = replace(asked, messages=asked.messages[1:], turns=[index - 1 for index in asked.turns])
        with suppress(UserError):
            passages(template, without, ends)
            return _WITHOUT_SYSTEM
    if isinstance(error, Refusal):
        for number, (role, following) in enumerate(pairwise(roles)):
            if role == following != "tool":
                return f"; messages {number} and {number + 1} are both of the {role}: join them"
        return f"; the roles are {_some(roles)}"
    return ""


def _of_style(style: PromptStyle, conversation: Conversation) -> list[Passage]:
    """Of a style that is not a chat template: a text for each question with its answer."""
    if is_document(conversation):
        (message,) = conversation.messages
        return [Passage(message.content, [TurnText(0, 0, len(message.content))])]
    messages = conversation.messages
    first = 1 if messages and messages[0].role == "system" else 0
    roles = [message.role for message in messages[first:]]
    while roles and roles[-1] == "user":
        roles.pop()
    _check_place_for(style, conversation)
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{conversation.place}: must have turns of user and assistant in the prompt style {style.name}; "
            f"it has {_some([m.role for m in messages])}; {setting('prompt_style')} chatml takes any order"
        )
    found = []
    for index in range(first + 1, first + len(roles), 2):
        prompt = style.render(messages[index - 1].content, messages[index - 1].input)
        text = prompt + messages[index].content
        found.append(Passage(text, [TurnText(index, len(prompt), len(text))]))
    return found


def _check_place_for(style: PromptStyle, conversation: Conversation) -> None:
    """Raises DataError for what only chat templates show."""
    messages = conversation.messages
    what = next(
        (f"{name} in a message" for message in messages for name, value in message.more.items() if value), ""
    )
    what = "a message of a tool" if any(message.role == "tool" for message in messages) else what
    what = "tools" if conversation.tools else what
    helps = ""
    if messages and messages[0].role == "system":
        what, helps = "a system message", _WITHOUT_SYSTEM
    if what:
        raise DataError(
            f"{conversation.place}: has {what}, for which the prompt style {style.name} has no place: "
            f"{setting('prompt_style')} template has, with a model that has one, and chatml has{helps}"
        )


def _some(roles: list[str]) -> str:
    """Roles, for an error."""
    more = f" and {len(roles) - 6} more" if len(roles) > 6 else ""
    return f"{', '.join(roles[:6]) or 'no message'}{more}"
