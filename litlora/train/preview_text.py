"""What `preview` found, as text for people."""

from itertools import groupby

from litlora.train.preview import Description

MOST_TOKENS = 1500
"""Of an example that are shown; the middle of a longer one is left out."""


def title(found: Description) -> str:
    """Of a record, its place, and what becomes of it."""
    if found["left_out"]:
        return f"==== {found['left_out']}"
    if not found["examples"]:
        return f"==== {found['place']}: no example"
    counts = [
        f"{len(tokens):,} tokens, {sum(token['learned'] for token in tokens):,} learned"
        for tokens in found["examples"]
    ]
    if names := found.get("answers"):
        counts = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
        counts += ["cut at max_seq_length"] * bool(found["cut"])
        return f"==== {found['place']}: {'; '.join(counts)}"
    several = f"{len(counts)} examples: " if len(counts) > 1 else ""
    return f"==== {found['place']}: {several}{'; '.join(counts)}"


def answers(found: Description) -> list[tuple[str, list[Description]]]:
    """The examples of a record, of which the answers of a pair and those with a label have a heading.
    The second answer of a pair is shown without the prompt that it shares with the first."""
    names = found.get("answers")
    if names is None:
        return [("", tokens) for tokens in found["examples"]]
    shown: list[tuple[str, list[Description]]] = []
    for number, (name, tokens, start) in enumerate(
        zip(names, found["examples"], found["prompt"], strict=True)
    ):
        first = found["examples"][0]
        if number and start and tokens[:start] == first[:start] and start == found["prompt"][0]:
            shown.append((f"-- {name}, after the same {start:,} tokens", tokens[start:]))
        else:
            shown.append((f"-- {name}", tokens))
    return shown


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
        lines += [
            f"    {name}: {side['examples']:,} examples, {side['tokens']:,} tokens, "
            f"{side['learned_tokens']:,} learned ({side['learned_share']:.1%})"
            for name, side in part.get("answers", {}).items()
        ]
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
            f"{line}; {micro_batches}, without padding, "
            f"filled to {d['packed_share']:.1%} of {d['packed_tokens']:,} tokens"
        )
    return f"{line}; the size of micro-batches is found when training starts"
