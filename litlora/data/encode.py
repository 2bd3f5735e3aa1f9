"""Conversations to token ids, in one prompt style, and where each answer stands in them.
Torch-free.

An answer is learned after the very token ids that chat asks with. So the prompt of each answer is
rendered and encoded as chat does it, and compared with the conversation encoded as one text.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from litlora.data.conversation import Conversation, Message
from litlora.errors import DataError, UserError, setting
from litlora.prompts import ChatTemplate, PromptStyle
from litlora.prompts.template import TEMPLATE_TEXT, shows, user_message
from litlora.tokenizer import Tokenizer

LONG_RECORD = 10**6
"""Characters of a record above which its size is the likely cause of a template's failure."""


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


@dataclass(frozen=True)
class Encoded:
    """A conversation in token ids."""

    drafts: list[Draft]
    """One with all answers; or several, if the style shows an earlier turn otherwise than it asks
    for it: then each answer stands in the form in which it is asked for."""
    num_apart: int
    """Answers whose first characters share a token with the prompt in the whole text. Prompt and
    answer are then encoded apart, as chat encodes the prompt alone."""


class Encoder:
    """Encodes conversations in a prompt style."""

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle) -> None:
        self._tokenizer, self._style = tokenizer, style
        # A chat template ends a turn with its own token.
        self._turn_end = tokenizer.turn_end(style.template.ending) if style.template is not None else None

    def encode(self, conversations: list[Conversation]) -> list[Encoded]:
        """Each conversation in token ids. Raises DataError, naming the record, if the style has no
        form for it."""
        exchanges = [self._exchanges(conversation) for conversation in conversations]
        texts = [text for of_one in exchanges for exchange in of_one for text in exchange]
        # A chat template writes the begin-of-text token itself.
        ids = iter(self._tokenizer.encode_batch(texts, begin=self._style.template is None))
        encoded = []
        for conversation, of_one in zip(conversations, exchanges, strict=True):
            answers = [message for message in conversation.messages if message.role == "assistant"]
            drafts: list[Draft] = []
            num_apart = 0
            for message, (prompt, finished) in zip(answers, of_one, strict=True):
                before, whole = next(ids), next(ids)
                if apart := whole[: len(before)] != before:
                    whole = before + self._tokenizer.encode(finished[len(prompt) :])
                num_apart += apart
                whole = self._ended(whole, len(before))
                turn = Turn(len(before), len(whole), message.train, not message.content.strip())
                self._add(drafts, Draft(whole, (turn,)))
            learned = [draft for draft in drafts if any(turn.learned for turn in draft.turns)]
            encoded.append(Encoded(learned or drafts[-1:], num_apart))
        return encoded

    def _exchanges(self, conversation: Conversation) -> list[tuple[str, str]]:
        """For each answer, the prompt that asks for it, and the text from the prompt's begin to the
        answer's end."""
        system, turns = _turns(conversation)
        template = self._style.template
        if template is not None:
            size = sum(len(message.content) + len(message.input) for message in conversation.messages)
            if size > TEMPLATE_TEXT:
                raise DataError(
                    f"{conversation.place}: has {size:,} characters, and a chat template may write "
                    f"{TEMPLATE_TEXT:,}; split the record, or remove it"
                )
            try:
                return _rendered(template, system, turns)
            except UserError as error:
                helps = _remedy(template, size, system, turns)
                raise DataError(f"{conversation.place}: {error.args[0]}{helps}") from None
        if system is not None:
            raise DataError(
                f"{conversation.place}: has a system message, for which the prompt style "
                f"{self._style.name} has no place: {setting('prompt_style')} template has, with a model that "
                f"has a chat template; {setting('ignore')} '[system]' leaves it out"
            )
        exchanges = []
        for asked, answer in turns:
            prompt = self._style.render(asked.content, asked.input)
            exchanges.append((prompt, prompt + answer.content))
        return exchanges

    def _ended(self, ids: list[int], start: int) -> list[int]:
        """Token ids with their answer, from `start` on, up to its end."""
        answer = ids[start:]
        if self._turn_end is not None and self._turn_end in answer:
            # What follows the last end of a turn, perhaps a newline, is not part of the answer.
            return ids[: len(ids) - answer[::-1].index(self._turn_end)]
        return [*ids, self._tokenizer.eos_id]

    def _add(self, drafts: list[Draft], new: Draft) -> None:
        """Join the next turn to the one before, if its prompt begins with it."""
        before = drafts[-1] if drafts else Draft([], ())
        (turn,) = new.turns
        if self._style.template is None:  # such a style asks each question after the end of the last
            shift = len(before.ids)
            turn = turn._replace(start=turn.start + shift, stop=turn.stop + shift)
            drafts[:] = [Draft(before.ids + new.ids, (*before.turns, turn))]
        elif turn.start >= len(before.ids) and new.ids[: len(before.ids)] == before.ids:
            drafts[-1:] = [Draft(new.ids, (*before.turns, turn))]
        else:
            drafts.append(new)


def _rendered(
    template: ChatTemplate, system: Message | None, turns: list[tuple[Message, Message]]
) -> list[tuple[str, str]]:
    """Raises UserError, or CheckpointError, for what the template cannot show."""
    said = [] if system is None else [{"role": "system", "content": system.content}]
    exchanges = []
    for asked, answer in turns:
        said.append(user_message(asked.content, asked.input))
        said.append({"role": "assistant", "content": answer.content})
        exchanges.append(template.exchange(said))
        if system is not None and not shows(exchanges[-1][0], system.content):
            raise UserError(f"{template.path}: the chat template leaves out the system message")
    return exchanges


def _remedy(
    template: ChatTemplate, size: int, system: Message | None, turns: list[tuple[Message, Message]]
) -> str:
    """What helps, as the end of a message."""
    if size > LONG_RECORD:
        return f"; it has {size:,} characters: split it, or remove it"
    if system is not None:
        with suppress(UserError):
            _rendered(template, None, turns)
            return f"; {setting('ignore')} '[system]' leaves out the system message"
    return ""


def _turns(conversation: Conversation) -> tuple[Message | None, list[tuple[Message, Message]]]:
    """The system message, if there is one, and each question with its answer."""
    messages = conversation.messages
    system = messages[0] if messages and messages[0].role == "system" else None
    rest = messages if system is None else messages[1:]
    turns = list(zip(rest[::2], rest[1::2], strict=False))
    if not turns or [message.role for message in rest] != ["user", "assistant"] * len(turns):
        roles = ", ".join(message.role for message in messages[:6]) or "no message"
        more = f" and {len(messages) - 6} more" if len(messages) > 6 else ""
        raise DataError(
            f"{conversation.place}: must have turns of user and assistant, after at most one system message; "
            f"it has {roles}{more}"
        )
    return system, turns
