"""What a chat template makes of a conversation: the texts in which the assistant's turns are
learned. Torch-free.

A turn is learned after the prompt that asks for it, which is the text that chat sends. Where one
text ends is known by writing the conversation's beginnings, never by looking for words in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from litlora.errors import UserError, setting
from litlora.prompts.shown import CANARY, Asked, answer_left_out, check_context, check_shape, check_turn
from litlora.prompts.template import ChatTemplate, Wanted, template_message, thought_of


class TurnText(NamedTuple):
    """Where a turn of the assistant stands in a text."""

    index: int
    """Of the message."""
    start: int
    """Where the prompt that asks for the turn ends."""
    stop: int
    """Up to where the text is that of the prompt and the finished turn."""
    rest: str = ""
    """How the finished turn goes on from there, where the text goes on to the next turn instead."""


@dataclass
class Passage:
    """A text, and those turns of the assistant in it that are shown as they are asked for."""

    text: str = ""
    turns: list[TurnText] = field(default_factory=list)


def passages(template: ChatTemplate, asked: Asked, ends: Sequence[str]) -> list[Passage]:
    """The texts in which the turns are learned: one; or several, where the template shows an
    earlier turn otherwise than it asks for it. `ends` are the names of the tokens that end turns.

    Raises UserError, or CheckpointError, for what the template refuses or does not show.
    """
    wanted = [w for index in asked.turns for w in (Wanted(index, [], True), Wanted(index + 1, [], False))]
    try:
        texts = list(asked.texts(template, wanted))
    except UserError:
        if asked.turns[0] > 0 or not _can_ask(template, asked):
            raise
        raise UserError(
            f"{template.path}: the chat template cannot ask for an assistant's message that begins a "
            "conversation: put a user's message before it, or mark it with train: false"
        ) from None
    check_shape(template, asked)
    found: list[Passage] = []
    since, is_rewritten = 0, True
    for number, index in enumerate(asked.turns):
        (with_last, prompt), (shared, finished) = texts[2 * number : 2 * number + 2]
        check_context(template, asked, range(since, index), prompt, with_last)
        follows = not is_rewritten and _goes_on(found[-1], with_last, ends)
        if is_rewritten := shared < len(prompt):
            finished = _as_asked(template, asked, index, prompt, finished)
        check_turn(template, asked, index, finished[len(prompt) :])
        if not follows:
            found.append(Passage())
        found[-1].text = finished
        found[-1].turns.append(TurnText(index, len(prompt), len(finished)))
        since = index + 1
    return found


def _can_ask(template: ChatTemplate, asked: Asked) -> bool:
    """Whether the template takes the conversation as a whole."""
    list(asked.texts(template, [Wanted(len(asked.messages), [], False)]))
    return True


def _goes_on(passage: Passage, shared: int, ends: Sequence[str]) -> bool:
    """Whether a text can go on to the next turn, whose prompt has the first `shared` characters in
    common with it, and its last turn keeps its end."""
    last = passage.turns[-1]
    answer, rest = passage.text[last.start : shared], passage.text[shared:]
    lost = any(end in passage.text[max(0, shared + 1 - len(end)) :] for end in ends)
    has_end = any(end in answer for end in ends) and not lost
    if shared < last.start or (rest and not has_end):
        return False
    passage.turns[-1] = last._replace(stop=shared, rest=rest)
    return True


def _as_asked(template: ChatTemplate, asked: Asked, index: int, prompt: str, finished: str) -> str:
    """The finished turn after its prompt, for a template that shows it otherwise: some begin the
    answer with a thought when they ask, and leave it out afterwards; some take the thoughts out of
    earlier turns as soon as there is an answer."""
    message = asked.messages[index]
    content, ending = message["content"], template.ending
    shown = content.strip()
    is_plain = not message.get("tool_calls") and thought_of(message) is None
    head = finished.removesuffix(shown + ending)
    if not (is_plain and head != finished and prompt.startswith(head)):
        begin, opening = _where_it_answers(template, asked, index, prompt, finished)
        if not (opening and is_plain):
            return prompt + finished[begin:]
        mark = opening.strip()
        if mark and content.lstrip().startswith(mark):  # the content has the thought that was begun
            return prompt + content.lstrip()[len(mark) :].lstrip("\n") + ending
        if shown and not finished.endswith(shown + ending):
            raise UserError(answer_left_out(template, content))
    return prompt + (content if shown else "") + ending


def _where_it_answers(
    template: ChatTemplate, asked: Asked, index: int, prompt: str, finished: str
) -> tuple[int, str]:
    """Where in the finished text the answer begins, and what the prompt has beyond that, such as
    the begin of a thought."""
    canary = template_message("assistant", CANARY)
    wanted = [Wanted(index, [], False), Wanted(index, [canary], False)]
    (_, before), (_, with_canary) = asked.texts(template, wanted)
    head, is_shown, _ = with_canary.partition(CANARY)
    asking = prompt.removeprefix(before)  # what add_generation_prompt adds
    if is_shown and asking and prompt.startswith(before):
        if asking in head:
            begin, number = head.rfind(asking) + len(asking), len(asking)
        else:
            begin = len(head)
            number = next(n for n in range(len(asking), -1, -1) if head.endswith(asking[:n]))
        if number and finished[:begin] == head[:begin]:
            return begin, asking[number:]
    raise UserError(
        f"{template.path}: the chat template shows message {index}, of the assistant, otherwise than it asks "
        f"for it, after {prompt[-30:]!r}; choose another {setting('prompt_style')}, or leave the record out"
    )
