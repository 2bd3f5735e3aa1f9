"""The tokenizer inside a GGUF file, as the files that a Hugging Face folder would have. Torch-free.

    "gpt2"    byte-level BPE: tokens, merges, and the name of a division of texts -> tokenizer.json
    "llama"   SentencePiece: pieces with their scores and types -> tokenizer.model

They are written into a temporary directory of this process, and every command copies them from there
like those of any other base. So what is trained on such a file has a tokenizer of its own.
"""

import atexit
import json
import os
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from litlora.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens; SentencePiece's have the same numbers."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = ("byte level", "GPT-2")


class Division(NamedTuple):
    """A way to divide a text before BPE that llama.cpp knows."""

    name: str
    """tokenizer.ggml.pre."""
    steps: tuple[tuple[str, ...], ...]
    """The pre-tokenizers of a tokenizer.json, in words: ("split", pattern), ("digits", "one by one" or
    "together"), ("punctuation",), and GPT2 for ByteLevel with its own pattern."""
    ignores_merges: bool = False
    """A whole piece that is a token stays one, whatever the merges."""
    also: tuple[str, ...] = ()
    """Other names that files have for it."""


DIVISIONS = (
    Division(
        "gpt-2",
        (GPT2,),
        also=("phi-2", "olmo", "mpt", "gigachat", "jais", "exaone4", "trillion", "granite-docling"),
    ),
    Division("llama-bpe", (("split", _LLAMA3),), True, ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2")),
    Division("dbrx", (("split", _LLAMA3),), also=("smaug-bpe", "glm4", "chatglm-bpe")),
    Division("qwen2", (("split", _QWEN2),), also=("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan")),
    Division("qwen35", (("split", _QWEN35),)),
    Division(
        "deepseek-v3",
        (("split", r"\p{N}{1,3}"), ("split", "[一-龥぀-ゟ゠-ヿ]+"), ("split", _DEEPSEEK)),
        also=("hunyuan-dense",),
    ),
    Division(
        "smollm",
        (("digits", "one by one"), GPT2),
        also=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    Division("falcon", (("punctuation",), GPT2, ("digits", "together"), ("split", "[0-9][0-9][0-9]"))),
)
"""Of the names of one division, `name` is the one that most versions know."""


def tokenizer_files(directory: Path) -> Path | None:
    """A directory with the files of the tokenizer inside the one GGUF file of a directory; None if
    there is no such file, or none that holds a tokenizer.

    Raises CheckpointError for a tokenizer that is not known here, or broken.
    """
    files = sorted(file for file in directory.glob("*.gguf") if file.is_file())
    if len(files) != 1:
        return None
    facts = files[0].stat()
    return _written(files[0], facts.st_mtime_ns, facts.st_size)


@cache
def _written(file: Path, _changed: int, _size: int) -> Path | None:
    try:
        from gguf import GGUFReader
    except ImportError:
        return None  # whoever opens the weights says so
    try:
        fields = GGUFReader(file).fields
        values = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, OSError):
        return None  # likewise
    if "tokenizer.ggml.tokens" not in values:
        return None
    try:
        made = _files_of({key.removeprefix("tokenizer."): value for key, value in values.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}; put the model's tokenizer.json beside it") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file}: the tokenizer inside is broken ({type(error).__name__}); put the model's "
            "tokenizer.json beside it"
        ) from None
    place = Path(tempfile.mkdtemp(prefix="litlora-gguf-"))
    atexit.register(_remove, place, os.getpid())
    for name, content in made.items():
        (place / name).write_bytes(content)
    return place


def _remove(place: Path, process: int) -> None:
    if os.getpid() == process:  # a fork of it may end first
        shutil.rmtree(place, ignore_errors=True)


def _files_of(values: dict[str, Any]) -> dict[str, bytes]:
    """The files by their names, from the metadata without "tokenizer."."""
    kind, tokens = values.get("ggml.model"), values["ggml.tokens"]
    types = values.get("ggml.token_type") or [NORMAL] * len(tokens)
    count = max((number for number, kind in enumerate(types, 1) if kind != UNUSED), default=0)
    tokens, types = tokens[:count], types[:count]  # the rest fills the embedding up
    if kind == "gpt2":
        name, content = "tokenizer.json", json.dumps(_byte_level(values, tokens, types)).encode()
    elif kind == "llama":
        name, content = "tokenizer.model", _sentencepiece(values, tokens, types)
    else:
        raise CheckpointError(f"the tokenizer inside is of the kind {kind!r}, and gpt2 and llama are read")
    classes = {"tokenizer.json": "PreTrainedTokenizerFast", "tokenizer.model": "LlamaTokenizer"}
    settings = {"add_bos_token": _adds_begin(values), "tokenizer_class": classes[name]}
    for key, named in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ):
        number = values.get(f"ggml.{key}_token_id")
        if number is not None and 0 <= number < len(tokens):
            settings[named] = tokens[number]
    if isinstance(template := values.get("chat_template"), str):
        settings["chat_template"] = template
    stops = [values.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    files = {name: content, "tokenizer_config.json": json.dumps(settings).encode()}
    return files | ({"generation_config.json": json.dumps({"eos_token_id": stops}).encode()} if stops else {})


def _adds_begin(values: dict[str, Any]) -> bool:
    """Whether a begin-of-text token comes before a text: some kinds do so if the file does not say."""
    by_kind = values.get("ggml.model") == "llama" or values.get("ggml.pre") in (
        "llama-bpe",
        "llama3",
        "llama-v3",
    )
    return bool(values.get("ggml.add_bos_token", by_kind))


def _byte_level(values: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer of the kind gpt2."""
    pre = values.get("ggml.pre")
    division = next((one for one in DIVISIONS if pre in (one.name, *one.also)), None)
    if division is None:
        raise CheckpointError(f"the tokenizer inside divides texts as {pre!r}, which is not known here")
    added = [
        {"id": number, "content": token, "special": kind != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    merges = []
    for merge in values["ggml.merges"]:
        cut = merge.index(" ", 1)
        merges.append([merge[:cut], merge[cut + 1 :]])
    begin = tokens[values["ggml.bos_token_id"]] if _adds_begin(values) else None
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*map(_step, division.steps), *_bytes(division)],
        },
        "post_processor": None if begin is None else _beginning(begin, values["ggml.bos_token_id"]),
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {
                token: number
                for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
                if kind != UNUSED
            },
            "merges": merges,
            "ignore_merges": division.ignores_merges,
        },
    }


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _step(step: tuple[str, ...]) -> dict[str, Any]:
    kind, *what = step
    if kind == "split":
        return {"type": "Split", "pattern": {"Regex": what[0]}, "behavior": "Isolated", "invert": False}
    if kind == "digits":
        return {"type": "Digits", "individual_digits": what[0] == "one by one"}
    return {"type": "Punctuation", "behavior": "Contiguous"} if kind == "punctuation" else _BYTE_LEVEL


def _bytes(division: Division) -> list[dict[str, Any]]:
    """What makes bytes of the pieces, where no step does."""
    return [] if GPT2 in division.steps else [{**_BYTE_LEVEL, "use_regex": False}]


def _beginning(token: str, number: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, one],
        "pair": [special, one, special, two],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


# ---- SentencePiece's protocol buffer


def _sentencepiece(values: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """The tokenizer.model of a tokenizer of the kind llama."""
    scores = values["ggml.scores"][: len(tokens)]
    pieces = b"".join(
        _message(1, _text(1, token) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    begin = values.get("ggml.bos_token_id", 1)
    trainer = _number(3, 2) + _number(35, 1) + _number(41, begin)  # BPE, with bytes
    normalizer = _number(3, int(values.get("ggml.add_space_prefix", True))) + _number(4, 0)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while True:
        value, low = value >> 7, value & 127
        found.append(low | (128 if value else 0))
        if not value:
            return bytes(found)
