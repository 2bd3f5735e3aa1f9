"""What training will see of a data set: some conversations token by token, and figures on all of
them."""

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from litlora.checkpoint import Chain
from litlora.cli import option_for
from litlora.console import say
from litlora.data.batches import num_supervised, padding_share
from litlora.data.conversation import Place
from litlora.data.examples import Example, Examples, tokenize
from litlora.data.labelled import LabelledExample, tokenize_labelled
from litlora.data.pairs import PairExample, tokenize_pairs
from litlora.data.records import Labelled, Learned, Learns, Pair
from litlora.data.sources import Dataset
from litlora.data.store import lengths_of
from litlora.errors import DataError, with_options
from litlora.load import load_text
from litlora.prompts import PromptStyle, lacking_tokens
from litlora.settings import ShowData, ShowDistill, ShowPreference, TrainConfig
from litlora.tokenizer import Tokenizer
from litlora.train.plan import Plan, pack_tokens
from litlora.train.prepare import Preparation
from litlora.train.vocabulary import AddedTokens, cut_notice, missing_tokens

Description = dict[str, Any]
"""As JSON holds it."""
BARS = 8
"""Of a histogram, at most."""
AnyExample = Example | PairExample | LabelledExample
TOKENIZE: dict[Learns, Callable[..., Examples]] = {
    "answers": tokenize,
    "pairs": tokenize_pairs,
    "labels": tokenize_labelled,
}
"""What makes examples for each kind of training."""


@dataclass(frozen=True)
class Reading:
    """What decides on the token ids of a conversation, and on what is learned of them."""

    tokenizer: Tokenizer
    style: PromptStyle
    max_seq_length: int
    mask_prompt: bool
    learns: Learns = "answers"


def first_conversations(conversations: Iterable[Learned], count: int, reading: Reading) -> list[Description]:
    """The first `count` records, each with its place and its examples token by token, or with the
    reason why it is left out."""
    return [_conversation(conversation, reading) for conversation in islice(conversations, count)]


def _conversation(record: Learned, reading: Reading) -> Description:
    """Of a pair or a labelled answer, "answers" says what each of the examples is, and "prompt" how
    many tokens at its beginning are the prompt."""
    found: Description = {"place": str(_place(record)), "examples": [], "left_out": None}
    make = TOKENIZE[reading.learns]
    try:
        made = make([record], reading.tokenizer, reading.style, reading.max_seq_length)
    except DataError as error:
        return found | {"left_out": str(error)}
    if reading.learns == "answers":
        return found | {"examples": [_tokens(example, reading) for example in made.examples]}
    sides = [side for example in made.examples for side in answers_of(example)]
    return found | {
        "examples": [_tokens(answer, reading) for _, answer in sides],
        "answers": [name for name, _ in sides],
        "prompt": [prompt_length(answer) for _, answer in sides],
        "cut": made.num_cut + made.num_shortened,
    }


def _place(record: Learned) -> Place:
    if isinstance(record, Pair):
        return record.chosen.place
    return record.conversation.place if isinstance(record, Labelled) else record.place


def answers_of(example: AnyExample) -> list[tuple[str, Example]]:
    """The token ids that an example is, with what each of them is; an answer that is learned by
    itself has no name."""
    if isinstance(example, PairExample):
        return [("chosen", example.chosen), ("rejected", example.rejected)]
    if isinstance(example, LabelledExample):
        return [("good" if example.is_desirable else "bad", example.answer)]
    return [("", example)]


def prompt_length(answer: Example) -> int:
    """The number of tokens before the first one that is learned."""
    return next((start for start, _ in answer.learned_spans()), len(answer.ids))


def _tokens(example: Example, reading: Reading) -> list[Description]:
    spans = example.learned_spans(reading.mask_prompt)
    learned = {index for start, stop in spans for index in range(start, stop)}
    ids = list(example.ids)
    return [
        {"id": token, "text": text, "learned": index in learned}
        for index, (token, text) in enumerate(zip(ids, reading.tokenizer.pieces(ids), strict=True))
    ]


def figures(examples: Sequence[AnyExample], mask_prompt: bool) -> Description:
    """How many examples and tokens there are, how long they are, and how much is learned; of pairs
    and of labelled answers also those of each side, "answers". One pass that keeps 12 bytes an
    example."""
    lengths, hashes = array("i"), array("Q")
    nothing_learned = 0
    sides: dict[str, Counter[str]] = {}
    for example in examples:
        length = learned = 0
        content = hashlib.blake2b(digest_size=8)
        for name, answer in answers_of(example):
            count = num_supervised(answer, mask_prompt)
            side = sides.setdefault(name, Counter())
            side.update(examples=1, tokens=len(answer.ids), learned_tokens=count)
            length, learned = length + len(answer.ids), learned + count
            content.update(name.encode() + answer.ids.tobytes())
        lengths.append(length)
        hashes.append(int.from_bytes(content.digest()))
        nothing_learned += not learned
    total = sum(lengths)
    learned = sum(side["learned_tokens"] for side in sides.values())
    found = {
        "examples": len(lengths),
        "tokens": total,
        "learned_tokens": learned,
        "learned_share": learned / max(1, total),
        "nothing_learned": nothing_learned,
        "duplicates": len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64))),
        "shortest": min(lengths, default=0),
        "median": float(np.median(lengths)) if lengths else 0,
        "longest": max(lengths, default=0),
        "histogram": histogram(lengths),
    }
    if sides.keys() <= {""}:
        return found
    shares = {
        name: {**side, "learned_share": side["learned_tokens"] / max(1, side["tokens"])}
        for name, side in sides.items()
    }
    return found | {"answers": shares}


def histogram(lengths: Sequence[int]) -> list[Description]:
    """How many lengths lie in each of a few equal ranges, {"from", "to" (included), "examples"}."""
    if not lengths:
        return []
    shortest, longest = min(lengths), max(lengths)
    width = -(-(longest - shortest + 1) // BARS)
    counts = [0] * (-(-(longest - shortest + 1) // width))
    for length in lengths:
        counts[(length - shortest) // width] += 1
    starts = range(shortest, longest + 1, width)
    return [
        {"from": start, "to": min(start + width - 1, longest), "examples": count}
        for start, count in zip(starts, counts, strict=True)
    ]


def _lengths(examples: Sequence[AnyExample]) -> Sequence[int]:
    """The number of tokens that the model computes for each example."""
    if examples and not isinstance(examples[0], Example):
        return array("i", (sum(len(answer.ids) for _, answer in answers_of(each)) for each in examples))
    return lengths_of(examples)


def steps(examples: Sequence[AnyExample], config: TrainConfig, seed: int) -> Description:
    """How many steps a run takes, and how full its micro-batches are."""
    lengths = _lengths(examples)
    plan = Plan(lengths, config, seed)
    num_micro_batches = sum(map(len, plan.epoch(0)))
    found = {
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": config.max_steps or config.epochs * plan.steps_per_epoch,
        "micro_batches_per_epoch": num_micro_batches,
    }
    if config.auto_batch:  # their size is found when training starts
        return found
    capacity = pack_tokens(config)
    if capacity is None:
        return found | {"padding_share": padding_share(lengths, plan.epoch(0))}
    return found | {"packed_tokens": capacity, "packed_share": sum(lengths) / (num_micro_batches * capacity)}


def preview(
    settings: ShowData | ShowPreference | ShowDistill, dataset: Dataset, chain: Chain, learns: Learns
) -> Description:
    """Everything that `scripts/show_data.py` shows of a run on this model."""
    text = load_text(chain)
    tokenizer = text.tokenizer
    style, reason = text.style(settings.prompt_style, default="alpaca")
    notes, asked = [], settings.tokenizer.add_tokens
    if asked:
        added = AddedTokens()
        if tokens := missing_tokens(asked, style, tokenizer):
            tokenizer = added.extend_tokenizer(tokenizer, chain.sources, tokens)
        notes.append(f"tokenizer: {added.notice}")
    if cut := lacking_tokens(style, tokenizer) if style.called else []:
        notes.append(cut_notice(cut))
    limit = min(settings.train.max_seq_length, chain.config.max_position_embeddings)
    reading = Reading(tokenizer, style, limit, settings.train.mask_prompt, learns)
    told = partial(say, file=sys.stderr)
    prepare = Preparation(settings.data, tokenizer, style, limit, told, tokenize=TOKENIZE[learns])
    made, made_val = prepare.examples(dataset)
    option = partial(option_for, type(settings))
    said = (dataset.notice, *dataset.notices, *dataset.late_notices(), *prepare.notices)
    notes += [*filter(None, said), *made.notices(limit)]
    return {
        "prompt_style": style.title,
        "prompt_style_reason": reason,
        "conversations": first_conversations(dataset.conversations, settings.examples, reading),
        "train": figures(made.examples, settings.train.mask_prompt),
        "val": figures(made_val.examples, settings.train.mask_prompt) if made_val else None,
        "notices": [with_options(note, option) for note in notes],
        "steps": steps(made.examples, settings.train, settings.seed),
    }
