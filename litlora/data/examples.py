"""Conversations to examples: token ids and the spans of them that are learned. Done once, before
the first step. Torch-free."""

import random
from array import array
from dataclasses import dataclass

from litlora.data.conversation import Conversation, Message
from litlora.errors import DataError, setting
from litlora.prompts import PromptStyle
from litlora.tokenizer import Tokenizer


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

    examples: list[Example]
    num_cut: int
    """Examples whose answer was cut at max_seq_length."""
    num_left_out: int
    """Examples whose prompt alone fills max_seq_length, and empty ones."""


def tokenize(
    conversations: list[Conversation], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int
) -> Examples:
    """Encode every conversation. Each example ends with the end-of-text token, even where a long
    answer is cut.

    Prompt and answer are encoded separately, as chat does. Raises DataError if no example is left.
    """
    turns = [_turn(conversation) for conversation in conversations]
    exchanges = [style.exchange(asked.content, asked.input, answer.content) for asked, answer in turns]
    # A chat template writes the begin-of-text token itself, and ends a turn with its own token.
    prompts = tokenizer.encode_batch([prompt for prompt, _ in exchanges], begin=style.template is None)
    answers = tokenizer.encode_batch([answer for _, answer in exchanges])
    turn_end = tokenizer.turn_end(style.template.ending) if style.template is not None else None
    examples, num_cut, num_left_out = [], 0, 0
    for (_, message), prompt, answer in zip(turns, prompts, answers, strict=True):
        end = tokenizer.eos_id
        if turn_end is not None and turn_end in answer:
            # What follows the last end of a turn, perhaps a newline, is not part of the answer.
            answer, end = answer[: len(answer) - 1 - answer[::-1].index(turn_end)], turn_end
        room = max_seq_length - len(prompt) - 1  # for the answer; its end takes one more
        is_empty = not (prompt or answer)  # nothing predicts an end-of-text that stands alone
        if is_empty or room < min(1, len(answer)):
            num_left_out += 1
            continue
        num_cut += len(answer) > room
        ids = array("i", [*prompt, *answer[:room], end])
        examples.append(Example(ids, ((len(prompt), len(ids)),) if message.train else ()))
    if not examples:
        raise DataError(
            f"no example is left: every prompt is empty, or fills {max_seq_length} tokens by itself "
            f"({setting('max_seq_length')} or the model's context); the first is {conversations[0].place}"
        )
    return Examples(examples, num_cut, num_left_out)


def content_line(example: Example) -> str:
    """An example's length and learned spans as a line of text, for the hash by which a resumed run
    recognises its data."""
    length = len(example.ids)
    if len(example.learned) == 1 and example.learned[0][1] == length:
        return f"{length} {example.learned[0][0]}\n"
    spans = ",".join(f"{start}-{stop}" for start, stop in example.learned)
    return f"{length} {spans or 'nothing'}\n"


def split(
    conversations: list[Conversation], val_fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation), drawn by the seed. With a fraction above 0 each of them gets at least
    one conversation, if there are two."""
    total = len(conversations)
    num_val = min(total - 1, max(1, round(total * val_fraction))) if val_fraction else 0
    chosen = set(random.Random(seed).sample(range(total), num_val))
    train = [conversation for index, conversation in enumerate(conversations) if index not in chosen]
    return train, [conversations[index] for index in sorted(chosen)]


def _turn(conversation: Conversation) -> tuple[Message, Message]:
    """The question and the answer of a conversation, which must have one of each."""
    if [message.role for message in conversation.messages] != ["user", "assistant"]:
        roles = ", ".join(message.role for message in conversation.messages) or "none"
        raise DataError(
            f"{conversation.place}: must have two messages, the user's and the assistant's; it has {roles}"
        )
    question, answer = conversation.messages
    return question, answer
