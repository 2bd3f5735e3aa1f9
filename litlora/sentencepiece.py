"""A SentencePiece `tokenizer.model`, read without its library: from the protocol buffer to a
tokenizer of the `tokenizers` library. Torch-free.

Such a model consists of pieces and their scores. BPE joins the two pieces whose union has the
highest score; Unigram takes the likeliest division of a text. Characters without a piece become
bytes.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
Piece = tuple[str, float, int]
"""A piece's text, score and type."""
LARGEST_MODEL, LONGEST_PIECE = 64 * 2**20, 512
"""Bytes. The largest known models have 5 MB, the longest known pieces 48 bytes."""


def read_sentencepiece(path: Path, *, add_bos_token: bool) -> Any:
    """The `tokenizers.Tokenizer` that a SentencePiece model describes. With `add_bos_token` it puts
    the begin-of-text piece before a text.

    Raises CheckpointError for a file that is not such a model, or of an unsupported kind.
    """
    try:
        pieces, trainer, normalizer = _read_model(_read_bytes(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        raise CheckpointError(
            f"{path}: broken, or not a SentencePiece model; copy or download it again"
        ) from None
    kind = trainer.get(3, UNIGRAM)
    names, kinds = {piece for piece, _, _ in pieces}, [kind for _, _, kind in pieces]
    splits_by_suffix = trainer.get(24, 0)
    if kind not in (UNIGRAM, BPE) or UNKNOWN not in kinds or len(names) < len(pieces) or splits_by_suffix:
        raise CheckpointError(
            f"{path}: this kind of SentencePiece model is not supported; convert it to a tokenizer.json "
            f"with transformers"
        )
    backend = _backend(pieces, trainer, kind)
    _add_text_rules(backend, normalizer)
    _add_tokens(backend, pieces)
    begin = trainer.get(41, 1)
    if add_bos_token and 0 <= begin < len(pieces) and pieces[begin][2] == CONTROL:
        from tokenizers import processors

        name = pieces[begin][0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, begin)]
        )
    return backend


def _backend(pieces: list[Piece], trainer: dict[int, Any], kind: int) -> Any:
    """A tokenizer with the pieces of a BPE or Unigram model, and nothing else yet."""
    from tokenizers import Tokenizer, models

    fallback = bool(trainer.get(35, 0))
    unknown = next(number for number, (_, _, type_) in enumerate(pieces) if type_ == UNKNOWN)
    if kind == UNIGRAM:
        scored = [(piece, score) for piece, score, _ in pieces]
        return Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=fallback))
    vocab = {piece: number for number, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, type_ in pieces if type_ in (NORMAL, USER_DEFINED)}
    return Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=fallback,
        )
    )


def _add_text_rules(backend: Any, normalizer: dict[int, Any]) -> None:
    """What the model does to a text before it looks for pieces, and to pieces to make a text."""
    from tokenizers import Regex, decoders, normalizers

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


def _add_tokens(backend: Any, pieces: list[Piece]) -> None:
    """Make the control pieces special tokens, and the user's own pieces whole tokens."""
    from tokenizers import AddedToken

    special = [piece for piece, _, type_ in pieces if type_ in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    own = [piece for piece, _, type_ in pieces if type_ == USER_DEFINED]
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in own])


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_MODEL:
        raise ValueError("too large")
    return path.read_bytes()


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into another, the highest score first; equal scores are ordered
    by the numbers of the parts."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in scores and right in scores]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(-score, left, right) for left, right in known]
    return [(left, right) for _, left, right in sorted(found, key=lambda entry: entry[0])]


def _read_model(data: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """(pieces, the trainer's settings, the normaliser's settings), settings by field number."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            if len(piece[1]) > LONGEST_PIECE:
                raise ValueError("a piece is too long")
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: varints as int, anything else as bytes."""
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
            raise ValueError("a varint of more than 64 bits")
