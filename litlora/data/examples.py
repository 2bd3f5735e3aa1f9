"""Records to examples: token ids, and where the answer begins. Done once, before the first step.
Torch-free."""

import random
from array import array
from dataclasses import dataclass

from litlora.data.records import Record
from litlora.errors import DataError
from litlora.prompts import PromptStyle
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """Prompt and answer as token ids; the answer ends with the end-of-text token."""

    ids: array
    """32-bit integers: a list would take nine times the memory."""
    prompt_length: int
    """The first so many ids are the prompt's."""


@dataclass(frozen=True)
class Examples:
    """A tokenised data set, and what had to be done to it."""

    examples: list[Example]
    num_cut: int
    """Examples whose answer lost its end to max_seq_length."""
    num_left_out: int
    """Examples whose prompt alone fills max_seq_length, and empty ones."""


def tokenize(
    records: list[Record], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int
) -> Examples:
    """Encode every record; the end-of-text token is always there, also when a long answer is cut.

    Prompt and answer are encoded apart, as chat meets them. Raises DataError if nothing is left.
    """
    exchanges = [style.exchange(record.instruction, record.input, record.output) for record in records]
    # A chat template writes the begin-of-text token itself, and ends a turn with a token of its
    # own.
    prompts = tokenizer.encode_batch([prompt for prompt, _ in exchanges], begin=style.template is None)
    answers = tokenizer.encode_batch([answer for _, answer in exchanges])
    end = tokenizer.turn_end(style.template.ending) if style.template is not None else None
    examples, num_cut, num_left_out = [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        end_id = tokenizer.eos_id
        if (
            end is not None and end in answer
        ):  # what follows the mark, a newline perhaps, is no part of the answer
            answer, end_id = answer[: len(answer) - 1 - answer[::-1].index(end)], end
        room = max_seq_length - len(prompt) - 1  # for the answer, beside its end-of-text
        if room < min(1, len(answer)) or not (
            prompt or answer
        ):  # a lone end-of-text is predicted from nothing
            num_left_out += 1
            continue
        num_cut += len(answer) > room
        examples.append(Example(array("i", [*prompt, *answer[:room], end_id]), len(prompt)))
    if not examples:
        raise DataError(
            f"no example is left: every prompt fills {max_seq_length} tokens by itself (--train.max_seq_length or the model's context), "
            f"or is empty; the first is {records[0].place}"
        )
    return Examples(examples, num_cut, num_left_out)


def split(records: list[Record], val_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(training, validation), drawn by the seed; with a fraction above 0, each has at least one
    record if there are two."""
    num_val = min(len(records) - 1, max(1, round(len(records) * val_fraction))) if val_fraction else 0
    chosen = set(random.Random(seed).sample(range(len(records)), num_val))
    train = [record for index, record in enumerate(records) if index not in chosen]
    return train, [records[index] for index in sorted(chosen)]
