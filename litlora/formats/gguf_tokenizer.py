"""A tokenizer as the vocabulary of a GGUF file. Torch-free.

llama.cpp has tokenizers of its own: "gpt2" is byte-level BPE after a division of the text that has a
name, "llama" is SentencePiece's BPE by scores. A tokenizer fits if what its tokenizer.json says is
what one of them does; everything else is refused, since such a file would read a prompt as other
tokens than those of training.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from litlora.errors import CheckpointError
from litlora.formats.gguf_prompt import Asking
from litlora.gguf_vocabulary import BYTE, CONTROL, DIVISIONS, GPT2, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from litlora.tokenizer import Tokenizer, token_text

ENDS_BY_NAME = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
)
"""Tokens at which llama.cpp stops whatever the metadata says."""


PHI3_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}
"""Phi 3's special tokens that leave the spaces behind them."""


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says about the tokenizer."""

    model: str
    """tokenizer.ggml.model: gpt2 or llama."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False
    """A text gets a space before it, and so does what follows a special token."""
    strips: bool = False
    """Special tokens take the spaces behind them, as Phi 3's do."""
    lacks_space: bool = False
    """The tokenizer puts a space before a text that no special token precedes; llama.cpp does not."""
    notes: list[str] = field(default_factory=list)
    """What people must know."""


def vocabulary_of(tokenizer: Tokenizer, num_rows: int, asking: Asking) -> Vocabulary:
    """The vocabulary of a model whose embedding has so many rows, for prompts of this kind. Raises
    CheckpointError for a tokenizer that llama.cpp does not have, and says what it does otherwise."""
    source = tokenizer.source()
    model = source.get("model") or {}
    if model.get("type") != "BPE":
        raise _refused(f"is a {model.get('type')} model")
    if odd := [
        name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)
    ]:
        raise _refused(f"has {odd[0]} {model[odd[0]]!r}")
    tokens, types = _tokens(tokenizer, source, num_rows)
    decoder = source.get("decoder") or {}
    parts = [part.get("type") for part in decoder.get("decoders", [decoder])]
    if "ByteLevel" in parts:
        found = _byte_level(source, tokens, types)
    else:
        found = _by_scores(source, tokens, types, asking.marked)
    if len(set(tokens)) < len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise _refused(f"has two tokens with the text {twice!r}")
    return replace(found, strips=_strips(source, found, asking))


def _strips(source: Mapping[str, Any], vocabulary: Vocabulary, asking: Asking) -> bool:
    """Whether special tokens take the spaces behind them, as Phi 3's do: llama.cpp knows that by the
    model's name. Raises CheckpointError for tokens of prompts that take spaces in another way."""
    flags = ("lstrip", "rstrip", "single_word")
    taking = {one["content"]: [one[flag] for flag in flags] for one in source["added_tokens"]}
    taking = {token: found for token, found in taking.items() if any(found)}
    special = (CONTROL, USER_DEFINED, UNKNOWN)
    known = [
        token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in special
    ]
    if PHI3_PLAIN | {"</s>"} <= {*vocabulary.tokens}:
        as_phi3 = dict.fromkeys(({*known} | {"</s>"}) - PHI3_PLAIN, [False, True, False])
        if taking == as_phi3:
            return True
    if odd := sorted(taking.keys() & asking.written):
        raise _refused(f"takes spaces beside {odd[0]}")
    return False


def name_for(name: str, *, strips: bool) -> str:
    """general.name of a model that people call so: one with Phi 3's name has Phi 3's tokens for
    llama.cpp, and no other may have it."""
    plain = re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE)
    return f"phi-3 {plain}" if strips else plain


def _refused(why: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer {why}, which no tokenizer of llama.cpp does: the file would read other tokens than "
        "the model was trained with; write a Hugging Face folder with scripts/convert_lit_checkpoint.py "
        "instead"
    )


def _tokens(tokenizer: Tokenizer, source: Mapping[str, Any], num_rows: int) -> tuple[list[str], list[int]]:
    """(texts, types) of the tokens, one for each row of the embedding."""
    names: list[str | None] = [*tokenizer.tokens(), *[None] * num_rows][:num_rows]
    tokens = [f"[PAD{number}]" if name is None else name for number, name in enumerate(names)]
    types = [UNUSED if name is None else NORMAL for name in names]
    for number, (_, special) in tokenizer.added.items():
        if number < num_rows:
            types[number] = CONTROL if special else USER_DEFINED
    unknown = source["model"].get("unk_token")
    if unknown in tokens and types[tokens.index(unknown)] != NORMAL:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


# ---- byte-level BPE


def _byte_level(source: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """A tokenizer of the kind gpt2."""
    notes = []
    for step in _flat(source.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise _refused(f"changes texts by {step['type']}")
        notes.append(
            "the tokenizer composes accents (NFC) and llama.cpp's does not: a text with decomposed accents "
            "has other tokens there"
        )
    steps = _steps(source.get("pre_tokenizer"))
    ignores = bool(source["model"].get("ignore_merges"))
    name = next((d.name for d in DIVISIONS if (d.steps, d.ignores_merges) == (steps, ignores)), None)
    if name is None:
        what = " then ".join(": ".join(step) for step in steps) + (", ignoring merges" if ignores else "")
        raise _refused(f"divides texts by {what}")
    merges = [" ".join(merge) for merge in _merges(source)]
    return Vocabulary("gpt2", name, tokens, types, merges=merges, notes=notes)


def _flat(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for one in step[parts] for inner in _flat(one, parts)]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[str, ...], ...]:
    """How a text is divided, in the words of `DIVISIONS`. Raises CheckpointError for steps that are
    not among them."""
    found: list[tuple[str, ...]] = []
    for step in _flat(pre_tokenizer, "pretokenizers"):
        kind, pattern = step["type"], step.get("pattern") or {}
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise _refused("puts a space before every text")
            found += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Split" and "Regex" in pattern:
            # Both leave every piece where the pattern matches all of the text, as these do.
            if (step["behavior"], step["invert"]) not in (("Isolated", False), ("Removed", True)):
                raise _refused(f"divides texts by a pattern with {step['behavior']}")
            # Some files have the characters themselves.
            spelled = pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")
            found.append(("split", spelled))
        elif kind == "Digits":
            found.append(("digits", "one by one" if step["individual_digits"] else "together"))
        elif kind == "Punctuation" and step["behavior"] == "Contiguous":
            found.append(("punctuation",))
        else:
            raise _refused(f"divides texts by {kind}")
    return tuple(found)


def _merges(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges in order. Older files have them as one text each."""
    merges = source["model"]["merges"]
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]


# ---- SentencePiece's BPE


def _by_scores(source: Mapping[str, Any], tokens: list[str], types: list[int], marked: bool) -> Vocabulary:
    """A tokenizer of the kind llama: ▁ for a space, bytes for what has no token, and of all pairs of
    neighbours whose union is a token, the one with the highest score is joined."""
    model = source["model"]
    if not model.get("byte_fallback"):
        raise _refused("has no bytes for characters without a token")
    if model.get("ignore_merges"):
        raise _refused("ignores merges")
    prefix = _space_before(source)
    if prefix == "first" and not marked:
        raise _refused("puts a space before a text but not before what follows a special token")
    notes = [
        "the tokenizer puts a space before a text that no special token precedes, and llama.cpp's does not: "
        "write it where you ask without the chat template"
    ]
    tokens = list(tokens)
    for number, token in enumerate(tokens):
        if types[number] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[number] = BYTE
        if types[number] == USER_DEFINED:  # found in the text itself, whose spaces are spaces
            tokens[number] = token.replace("▁", " ")
    found = Vocabulary("llama", "default", tokens, types, scores=_scores(source, tokens, types))
    if prefix == "first":
        return replace(found, lacks_space=True, notes=notes)
    return replace(found, space_prefix=prefix == "always")


def _space_before(source: Mapping[str, Any]) -> str:
    """Where the tokenizer puts a space: before every text and what follows a special token (always),
    before a text (first), or nowhere (never). Raises CheckpointError for what else it does to a
    text."""
    found = "never"
    for step in _flat(source.get("normalizer"), "normalizers"):
        kind, pattern = step["type"], step.get("pattern") or {}
        if kind == "Prepend" and step["prepend"] == "▁":
            found = "always"
        elif not (kind == "Replace" and pattern.get("String") == " " and step["content"] == "▁"):
            raise _refused(f"changes texts by {kind}")
    for step in _flat(source.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and not step.get("split", True) and step["replacement"] == "▁":
            scheme = step["prepend_scheme"]
            if scheme == "always" and found == "never":
                raise _refused("puts a space before every text that has none")
            found = scheme if found == "never" else found
        elif not (step["type"] == "Split" and (step.get("pattern") or {}).get("String") == " "):
            # Behind the normalizer no space is left to divide at.
            raise _refused(f"divides texts by {step['type']}")
    return found


def _scores(source: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """The scores that join pieces in the order of the merges. Raises CheckpointError if none do: all
    ways to make a token must be merges, and have neighbouring places."""
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    scores: dict[str, float] = {}
    pairs: dict[str, int] = {}
    last = None
    for left, right in _merges(source):
        token = left + right
        if token in scores and token != last:
            raise _refused(f"makes {token!r} by merges of different rank")
        scores.setdefault(token, -float(len(scores)))
        pairs[token] = pairs.get(token, 0) + 1
        last = token
    for token in known:
        ways = sum(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        if ways != pairs.get(token, 0):
            raise _refused(
                f"has {pairs.get(token, 0)} merges for {token!r}, whose parts are {ways} pairs of tokens"
            )
    unmade = -float(len(scores))
    return [scores.get(token, unmade) for token in tokens]


# ---- the tokens that end an answer


def special_ids(tokenizer: Tokenizer, taught: list[int]) -> dict[str, int]:
    """The numbers of special tokens, by the names that the metadata has for them: of those that a
    model was taught to end its answers with, too.

    Raises CheckpointError if llama.cpp could not stop at one of them.
    """
    found = {"eos": tokenizer.eos_id}
    names = {"bos": "bos_token", "unk": "unk_token", "pad": "pad_token"}
    wanted = {key: token_text(tokenizer.settings.get(name)) for key, name in names.items()}
    known = {text: number for number, (text, _) in tokenizer.added.items()}
    found |= {key: known[text] for key, text in wanted.items() if text in known}
    if tokenizer.begin_ids:
        found["bos"] = tokenizer.begin_ids[0]
    rest = [stop for stop in taught if stop != tokenizer.eos_id]
    places = iter(("eot", "eom"))
    for stop in rest:
        if (place := next(places, None)) is not None:
            found[place] = stop
        elif tokenizer.token(stop) not in ENDS_BY_NAME:
            raise CheckpointError(
                f"answers end with {len(taught)} tokens, {', '.join(map(tokenizer.token, taught))}, and "
                "llama.cpp stops at three"
            )
    return found
