"""A SentencePiece `tokenizer.model`, read without the library: its protocol buffer to a tokenizer
of `tokenizers`. Torch-free.

The pieces and their scores are all there is to it: BPE joins the pair whose joined piece has the
highest score, Unigram takes the likeliest division. Bytes stand in for characters that no piece
has.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
LARGEST_MODEL, LONGEST_PIECE = 64 * 2**20, 512
"""Bytes; the largest models known have 5 MB, the longest pieces 48."""


def read_sentencepiece(path: Path, *, add_bos_token: bool) -> Any:
    """The `tokenizers.Tokenizer` that a SentencePiece model describes; it puts the begin-of-text
    piece in front if asked.

    Raises CheckpointError for a file that is no such model, or of a kind that cannot be expressed.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    try:
        pieces, trainer, normalizer = _read_model(_read_bytes(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        raise CheckpointError(f"{path}: broken, or no SentencePiece model; copy or make it again") from None
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    unknown = next((number for number, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    kind, fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35, 0))
    if kind not in (UNIGRAM, BPE) or unknown is None or len(vocab) < len(pieces) or trainer.get(24, 0):
        raise CheckpointError(
            f"{path}: a SentencePiece model of this kind is not read; make a tokenizer.json of it with transformers"
        )
    if kind == BPE:
        scores = {piece: score for piece, score, type_ in pieces if type_ in (NORMAL, USER_DEFINED)}
        backend = Tokenizer(
            models.BPE(
                vocab,
                _merges(vocab, scores),
                unk_token=pieces[unknown][0],
                fuse_unk=True,
                byte_fallback=fallback,
            )
        )
    else:
        backend = Tokenizer(
            models.Unigram(
                [(piece, score) for piece, score, _ in pieces], unk_id=unknown, byte_fallback=fallback
            )
        )
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if (charsmap := normalizer.get(2)) else []
    if normalizer.get(4, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = bool(normalizer.get(3, 1))
    steps += [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    special = [piece for piece, _, type_ in pieces if type_ in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    backend.add_tokens(
        [
            AddedToken(piece, special=False, normalized=False)
            for piece, _, type_ in pieces
            if type_ == USER_DEFINED
        ]
    )
    begin = trainer.get(41, 1)
    if add_bos_token and 0 <= begin < len(pieces) and pieces[begin][2] == CONTROL:
        name = pieces[begin][0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, begin)]
        )
    return backend


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_MODEL:
        raise ValueError("too large")
    return path.read_bytes()


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest score first; of equal ones the parts'
    numbers decide."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        there = [
            (vocab[left], vocab[right], left, right)
            for left, right in pairs
            if left in scores and right in scores
        ]
        found += [(-score, left, right) for _, _, left, right in sorted(there)]
    return [(left, right) for _, left, right in sorted(found, key=lambda entry: entry[0])]


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """(pieces with score and type, the trainer's settings, the normaliser's settings), settings by
    field number."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            if len(piece[1]) > LONGEST_PIECE:
                raise ValueError("a piece as long as a page")
            pieces.append(
                (
                    piece[1].decode("utf-8"),
                    struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0,
                    piece.get(3, NORMAL),
                )
            )
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: numbers as int, all else as bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, place = data[place : place + size], place + size
        elif kind == 2:
            size, place = _varint(data, place)
            value, place = data[place : place + size], place + size
        else:
            raise ValueError(f"wire type {kind}")
        if place > len(data):
            raise ValueError("cut short")
        yield key >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
