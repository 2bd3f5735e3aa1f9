"""What a chat template makes of a conversation: the texts in which the assistant's turns are
learned. Torch-free.

A turn is learned after the prompt that asks for it, which is the text that chat sends. Where one
text ends is known by writing the conversation's beginnings, never by looking for words in it.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from litlora.errors import UserError, setting
from litlora.prompts.shown import CANARY, Asked, answer_left_out, check_context, check_shape, check_turn
from litlora.prompts.template import ChatTemplate, TurnEnds, Wanted, template_message, thought_of


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


def passages(template: ChatTemplate, asked: Asked, ends: TurnEnds) -> list[Passage]:
    """The texts in which the turns are learned: one; or several, where the template shows an
    earlier turn otherwise than it asks for it.

    Raises UserError, or CheckpointError, for what the template refuses or does not show.
    """
    wanted = [w for index in asked.turns for w in (Wanted(index, [], True), Wanted(index + 1, [], False))]
    try:
        texts = list(asked.texts(template, wanted))
    except UserError:
        if asked.turns[0] > 0:
            raise
        # Whatever is wrong with the conversation itself is said first.
        list(asked.texts(template, [Wanted(len(asked.messages), [], False)]))
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
        end = ends.of(asked.messages[since - 1])  # of the turn before
        follows = not is_rewritten and _goes_on(found[-1], with_last, "" if end is None else end.name)
        if is_rewritten := shared < len(prompt):
            finished = _as_asked(template, asked, index, prompt, finished)
        check_turn(template, asked, index, finished[len(prompt) :])
        if not follows:
            found.append(Passage())
        found[-1].text = finished
        found[-1].turns.append(TurnText(index, len(prompt), len(finished)))
        since = index + 1
    return found


def _goes_on(passage: Passage, shared: int, end: str) -> bool:
    """Whether a text can go on to the next turn, whose prompt has the first `shared` characters in
    common with it, and its last turn keeps its end."""
    last = passage.turns[-1]
    rest = passage.text[shared:]
    if shared < last.start:
        return False
    if rest:
        where = passage.text.rfind(end, last.start) if end else -1
        if where < 0 or where + len(end) > shared:
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
    spellings = (content, content.lstrip(), content.rstrip(), shown)
    written = next((text for text in spellings if finished.endswith(text + ending)), None)
    head = finished if written is None else finished.removesuffix(written + ending)
    opening = prompt[len(head) :]  # what the prompt has beyond the text before the answer
    if not (is_plain and head != finished and prompt.startswith(head)):
        begin, opening = _where_it_answers(template, asked, index, prompt, finished)
        # An answer may stand behind the end of the thought that the prompt begins.
        is_behind = begin is not None and not finished[begin:].lstrip().startswith(shown or ending.lstrip())
        if begin is not None and not (is_plain and opening and (opening.strip() or not is_behind)):
            return prompt + finished[begin:]
        if not is_plain:
            raise UserError(
                f"{template.path}: the chat template shows message {index} otherwise than it asks for it, "
                f"after {prompt[-30:]!r}; choose another {setting('prompt_style')}, or leave the record out"
            )
    mark = opening.strip()
    if mark and content.lstrip().startswith(mark):  # the content has the thought that was begun
        return prompt + content.lstrip()[len(mark) :].lstrip("\n") + ending
    if shown and written is None:
        raise UserError(answer_left_out(template, content))
    return prompt + (content if shown else "") + ending


def _where_it_answers(
    template: ChatTemplate, asked: Asked, index: int, prompt: str, finished: str
) -> tuple[int | None, str]:
    """Where in the finished text the answer begins, and what the prompt has beyond that, such as
    the begin of a thought; None if that cannot be said."""
    canary = template_message("assistant", CANARY)
    wanted = [Wanted(index, [], False), Wanted(index, [canary], False)]
    (_, before), (_, with_canary) = asked.texts(template, wanted)
    head, is_shown, _ = with_canary.partition(CANARY)
    asking = prompt.removeprefix(before)  # what add_generation_prompt adds
    if not is_shown or not prompt.startswith(before):
        return None, ""
    number = next(n for n in range(len(asking), -1, -1) if asking[:n] in head)
    begin = head.rfind(asking[:number]) + number
    opening = asking[number:]
    is_there = number and finished[:begin] == head[:begin]
    # What it asks with beyond that, it leaves out; or it writes the same with other spaces.
    if is_there and (begin == len(head) or not opening.strip()):
        return begin, opening
    return None, opening
