"""Text to token ids and back, over the `tokenizers` library; special ids; decoding a stream piece
by piece. Torch-free."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError, UserError
from litlora.sentencepiece import read_sentencepiece
from litlora.storage.untrusted import own_file, read_json

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
SIDECAR_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    SENTENCEPIECE_FILE,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
"""What travels with a model besides its weights; every command copies those that the base has."""
LARGEST_TOKENIZER = 256 * 2**20
"""Bytes; Gemma's, one of the largest, has 33 MB."""
TOKENIZER_NAMES = (TOKENIZER_FILE, SENTENCEPIECE_FILE)
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Special tokens known to end a text, for tokenizers that come without their settings. (Ends of a
turn are not among them.)"""


def find_sidecars(directories: list[Path]) -> list[Path]:
    """The files that travel with a model, each from the first directory that has it.

    Those of the tokenizer all come from the first directory that has a tokenizer: an adapter's
    folder may bring its own.
    """
    home = next(
        (place for place in directories if any((place / name).is_file() for name in TOKENIZER_NAMES)), None
    )
    found = []
    for name in SIDECAR_FILES:
        places = directories if name in ("generation_config.json", "config.json") else [home] if home else []
        found += [own_file(place / name) for place in places if (place / name).is_file()][:1]
    return found


class Tokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(self, directories: Path | list[Path]) -> None:
        """Reads `tokenizer.json`, else a SentencePiece `tokenizer.model`; and, where present,
        `tokenizer_config.json` and `generation_config.json`.

        Of several directories, those of a chain, each file comes from the first that has it
        (`find_sidecars`). Raises CheckpointError for a missing or broken file and where no
        end-of-text token can be found.
        """
        from tokenizers import Tokenizer as Backend

        directories = [directories] if isinstance(directories, Path) else directories
        files = {file.name: file for file in find_sidecars(directories)}
        settings = read_settings(files.get("tokenizer_config.json"))
        path = files.get(TOKENIZER_FILE) or files.get(SENTENCEPIECE_FILE) or directories[0] / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a checkpoint directory needs its tokenizer")
        if path.name == SENTENCEPIECE_FILE:
            self._backend = read_sentencepiece(path, add_bos_token=settings.get("add_bos_token") is not False)
        else:
            if (size := path.stat().st_size) > LARGEST_TOKENIZER:
                raise CheckpointError(
                    f"{path}: has {size:,} bytes; no tokenizer has more than {LARGEST_TOKENIZER:,}"
                )
            with _quiet_library(f"{path}: not a usable tokenizer file"):
                self._backend = Backend.from_file(str(path))
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_id = self._end_of_text(settings, path)
        """The token that ends an answer, as training teaches it."""
        stop = read_settings(files.get("generation_config.json")).get("eos_token_id")
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if odd := [entry for entry in stops if type(entry) is not int]:
            raise CheckpointError(
                f"{files['generation_config.json']}: eos_token_id {odd[0]!r} is not the number of a token"
            )
        self.stop_ids = frozenset([self.eos_id, *stops])
        """Tokens that end generation."""
        self._path = path
        self._prefix = self._begin_of_text(settings)
        self._limit: int | None = None

    def fit(self, num_rows: int) -> str | None:
        """Check against an embedding of so many rows; what is to be said if some tokens have none.

        Fewer tokens than rows are normal: embeddings are padded. Tokens without a row are an error
        only where a text has one.
        """
        if self.vocab_size <= num_rows:
            return None
        if self.eos_id >= num_rows:
            raise CheckpointError(
                f"{self._path}: the end-of-text token is number {self.eos_id}, the model's embedding has {num_rows} rows"
            )
        self._limit = num_rows
        return f"{self._path}: {self.vocab_size - num_rows} of its {self.vocab_size} tokens have no row in the embedding and cannot be used"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """Token ids of a text; `begin` puts the begin-of-text token in front, if this tokenizer
        uses one."""
        return self.encode_batch([text], begin=begin)[0]

    def encode_batch(self, texts: list[str], *, begin: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        prefix = self._prefix if begin else []
        with _quiet_library(f"{self._path}: cannot encode this text"):
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        batch = [prefix + encoding.ids for encoding in encoded]
        if (
            self._limit is not None
            and (largest := max(map(max, filter(None, batch)), default=-1)) >= self._limit
        ):
            raise UserError(
                f"{self._path}: the text has the token {self.token(largest)!r} (number {largest}), but the model's embedding has "
                f"{self._limit} rows; use the tokenizer that the model was trained with, or leave the token out"
            )
        return batch

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        with _quiet_library(f"{self._path}: cannot decode"):
            return self._backend.decode(ids, skip_special_tokens=True)

    def turn_end(self, ending: str) -> int | None:
        """The token that ends a turn whose text ends like this: the first special one in it."""
        added = self._backend.get_added_tokens_decoder()
        return next((token for token in self.encode(ending) if token in added), None)

    @property
    def begin_text(self) -> str:
        """The begin-of-text token by name; empty if this tokenizer uses none."""
        return "".join(map(self.token, self._prefix))

    def token(self, index: int) -> str:
        """The name of a token."""
        return self._backend.id_to_token(index)

    def _end_of_text(self, settings: dict[str, Any], path: Path) -> int:
        name = token_text(settings.get("eos_token"))
        if name is not None:
            if (found := self._backend.token_to_id(name)) is None:
                raise CheckpointError(
                    f"{path}: lacks the token {name!r} that tokenizer_config.json names as eos_token"
                )
            return found
        special = {
            token.content: id
            for id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        known = [special[name] for name in END_OF_TEXT_NAMES if name in special]
        if len(known) != 1:
            what = "several tokens could be" if known else "no token is known as"
            raise CheckpointError(
                f"{path}: {what} the end of a text; name it as eos_token in a tokenizer_config.json beside it"
            )
        return known[0]

    def _begin_of_text(self, settings: dict[str, Any]) -> list[int]:
        """What the tokenizer itself puts in front of a text; else what its settings ask for."""
        with _quiet_library(f"{self._path}: not a usable tokenizer file"):
            plain = self._backend.encode("a", add_special_tokens=False).ids
            full = self._backend.encode("a", add_special_tokens=True).ids
        starts = (start for start in range(len(full)) if plain and full[start : start + len(plain)] == plain)
        ids = full[: next(starts, 0)]  # what comes behind is not wanted: an end-of-text, mostly
        name = token_text(settings.get("bos_token"))
        if (
            not ids
            and settings.get("add_bos_token")
            and name is not None
            and (found := self._backend.token_to_id(name)) is not None
        ):
            ids = [found]
        return ids


@contextmanager
def _quiet_library(what: str) -> Iterator[None]:
    """Whatever goes wrong in `tokenizers` as a CheckpointError that begins with `what`.

    The library raises bare Exception, or panics: that writes to the process's stderr and raises
    what is no Exception at all.
    """
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split())[:300]}") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class TextStream:
    """Turns a stream of token ids into text, whole characters only: a character may be spread over
    several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = (
            0  # where the context of the decoding begins: some decoders treat the first token specially
        )
        self._shown = 0  # tokens whose text has been returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        before, now = self._texts()
        if (
            now.endswith("\ufffd") and len(self._ids) - self._shown < 16
        ):  # an invalid byte must not hold back text for ever
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left at the end of the stream."""
        before, now = self._texts()
        self._start = self._shown = len(self._ids)
        return now[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._ids[self._start : self._shown]), self._tokenizer.decode(
            self._ids[self._start :]
        )


def read_settings(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    if path is None:
        return {}
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object with the text under "content";
    None if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise CheckpointError(
            f"tokenizer_config.json or special_tokens_map.json: {text!r} is not the text of a token"
        )
    return text
