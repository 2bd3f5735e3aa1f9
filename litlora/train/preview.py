"""What training will see of a data set: some conversations token by token, and figures on all of
them."""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np

from litlora.checkpoint import Chain
from litlora.console import say
from litlora.data.batches import num_supervised, padding_share
from litlora.data.conversation import Conversation
from litlora.data.examples import Example, tokenize
from litlora.data.sources import Dataset
from litlora.data.store import lengths_of
from litlora.errors import DataError
from litlora.load import load_text
from litlora.prompts import PromptStyle, choose_style, lacking_tokens
from litlora.settings import ShowData, TrainConfig
from litlora.tokenizer import Tokenizer
from litlora.train.plan import Plan, pack_tokens
from litlora.train.prepare import Preparation
from litlora.train.vocabulary import AddedTokens, cut_notice, missing_tokens

Description = dict[str, Any]
"""As JSON holds it."""
MOST_TOKENS = 1500
"""Of an example that are shown; the middle of a longer one is left out."""
BARS = 8
"""Of a histogram, at most."""


@dataclass(frozen=True)
class Reading:
    """What decides on the token ids of a conversation, and on what is learned of them."""

    tokenizer: Tokenizer
    style: PromptStyle
    max_seq_length: int
    mask_prompt: bool


def first_conversations(
    conversations: Iterable[Conversation], count: int, reading: Reading
) -> list[Description]:
    """The first `count` conversations, each with its place and its examples token by token, or with
    the reason why it is left out."""
    return [_conversation(conversation, reading) for conversation in islice(conversations, count)]


def _conversation(conversation: Conversation, reading: Reading) -> Description:
    found: Description = {"place": str(conversation.place), "examples": [], "left_out": None}
    try:
        made = tokenize([conversation], reading.tokenizer, reading.style, reading.max_seq_length)
    except DataError as error:
        return found | {"left_out": str(error)}
    return found | {"examples": [_tokens(example, reading) for example in made.examples]}


def _tokens(example: Example, reading: Reading) -> list[Description]:
    spans = example.learned_spans(reading.mask_prompt)
    learned = {index for start, stop in spans for index in range(start, stop)}
    ids = list(example.ids)
    return [
        {"id": token, "text": text, "learned": index in learned}
        for index, (token, text) in enumerate(zip(ids, reading.tokenizer.pieces(ids), strict=True))
    ]


def figures(examples: Sequence[Example], mask_prompt: bool) -> Description:
    """How many examples and tokens there are, how long they are, and how much is learned. One pass
    that keeps 12 bytes an example."""
    lengths, hashes = array("i"), array("Q")
    learned = nothing_learned = 0
    for example in examples:
        lengths.append(len(example.ids))
        hashes.append(int.from_bytes(hashlib.blake2b(example.ids.tobytes(), digest_size=8).digest()))
        count = num_supervised(example, mask_prompt)
        learned += count
        nothing_learned += not count
    total = sum(lengths)
    return {
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


def steps(examples: Sequence[Example], config: TrainConfig, seed: int) -> Description:
    """How many steps a run takes, and how full its micro-batches are."""
    lengths = lengths_of(examples)
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


def preview(settings: ShowData, dataset: Dataset, chain: Chain) -> Description:
    """Everything that `scripts/show_data.py` shows of a run on this model."""
    text = load_text(chain)
    tokenizer = text.tokenizer
    style, reason = choose_style(
        settings.prompt_style, text.prompt_style, text.template, default="alpaca", tokenizer=tokenizer
    )
    notes, asked = [], settings.tokenizer.add_tokens
    if asked:
        added = AddedTokens()
        if tokens := missing_tokens(asked, style, tokenizer):
            tokenizer = added.extend_tokenizer(tokenizer, chain.sources, tokens)
        notes.append(f"tokenizer: {added.notice}")
    if cut := lacking_tokens(style, tokenizer) if style.called else []:
        notes.append(cut_notice(cut))
    limit = min(settings.train.max_seq_length, chain.config.max_position_embeddings)
    reading = Reading(tokenizer, style, limit, settings.train.mask_prompt)
    told = partial(say, file=sys.stderr)
    prepare = Preparation(settings.data, tokenizer, style, limit, told)
    made, made_val = prepare.examples(dataset)
    said = (dataset.notice, *dataset.notices, *dataset.late_notices(), *prepare.notices)
    return {
        "prompt_style": style.title,
        "prompt_style_reason": reason,
        "conversations": first_conversations(dataset.conversations, settings.examples, reading),
        "train": figures(made.examples, settings.train.mask_prompt),
        "val": figures(made_val.examples, settings.train.mask_prompt) if made_val else None,
        "notices": [*notes, *filter(None, said), *made.notices(limit)],
        "steps": steps(made.examples, settings.train, settings.seed),
    }


# ---- for people


def title(found: Description) -> str:
    """Of a conversation, its place, and what becomes of it."""
    if found["left_out"]:
        return f"==== {found['left_out']}"
    if not found["examples"]:
        return f"==== {found['place']}: no example"
    counts = [
        f"{len(tokens):,} tokens, {sum(token['learned'] for token in tokens):,} learned"
        for tokens in found["examples"]
    ]
    several = f"{len(counts)} examples: " if len(counts) > 1 else ""
    return f"==== {found['place']}: {several}{'; '.join(counts)}"


def marked(tokens: list[Description]) -> list[tuple[str, bool]]:
    """An example as spans of text, with a bar between tokens, and whether they are learned."""
    spans: list[tuple[str, bool]] = []
    hidden = range(MOST_TOKENS // 2, len(tokens) - MOST_TOKENS // 2)
    for is_learned, group in groupby(enumerate(tokens), key=lambda each: each[1]["learned"]):
        texts = [_text(index, token, hidden) for index, token in group]
        if spans:
            spans.append(("|", False))
        spans.append(("|".join(text for text in texts if text is not None), is_learned))
    return spans


def _text(index: int, token: Description, hidden: range) -> str | None:
    if index in hidden:
        return f" ... {len(hidden):,} tokens ... " if index == hidden.start else None
    return token["text"].replace("\n", "\u21b5\n")


def table(d: Description) -> list[str]:
    """The figures as lines."""
    lines = [f"prompt style: {d['prompt_style']} ({d['prompt_style_reason']})"]
    for name, what in (("train", "to train on"), ("val", "to validate")):
        if not (part := d[name]):
            continue
        lines.append(
            f"{part['examples']:,} examples {what}: {part['tokens']:,} tokens, "
            f"{part['learned_tokens']:,} learned ({part['learned_share']:.1%}); "
            f"shortest {part['shortest']:,}, median {part['median']:,.0f}, longest {part['longest']:,} tokens"
        )
        if part["duplicates"]:
            lines.append(f"    {part['duplicates']:,} of them repeat another one, token for token")
        if part["nothing_learned"]:
            lines.append(f"    nothing is learned of {part['nothing_learned']:,} of them")
    lines += [f"note: {notice}" for notice in d["notices"]]
    lines += [
        "",
        "length of the training examples in tokens",
        *_bars(d["train"]["histogram"]),
        "",
        _steps_line(d["steps"]),
    ]
    return lines


def _bars(ranges: list[Description]) -> list[str]:
    most = max((each["examples"] for each in ranges), default=1)
    wide = max((len(f"{each['from']:,}-{each['to']:,}") for each in ranges), default=0)
    return [
        f"    {each['from']:,}-{each['to']:,}".ljust(wide + 6)
        + f"{'#' * -(-40 * each['examples'] // most)} {each['examples']:,}".lstrip()
        for each in ranges
    ]


def _steps_line(d: Description) -> str:
    line = f"{d['steps']:,} steps, {d['steps_per_epoch']:,} an epoch"
    micro_batches = f"{d['micro_batches_per_epoch']:,} micro-batches an epoch"
    if "padding_share" in d:
        return f"{line}; {micro_batches}, padding {d['padding_share']:.1%}"
    if "packed_share" in d:
        return (
            f"{line}; {micro_batches}, packed without padding, "
            f"filled to {d['packed_share']:.1%} of {d['packed_tokens']:,} tokens"
        )
    return f"{line}; the size of micro-batches is found when training starts"
