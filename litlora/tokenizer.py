"""Text to token ids and back, with the `tokenizers` library in a process of its own; special ids;
decoding a stream piece by piece. Torch-free."""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from litlora.errors import CheckpointError, UserError
from litlora.gguf_vocabulary import tokenizer_files
from litlora.storage.untrusted import has_file, own_file, read_json_object
from litlora.worker import Worker

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
GENERATION_FILE = "generation_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""How a multimodal model reads images and videos; not used here."""
SIDECAR_FILES = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    GENERATION_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    SENTENCEPIECE_FILE,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    *PROCESSOR_FILES,
)
"""The files that travel with a model's weights; every command copies those that the base has."""
LARGEST_TOKENIZER = 256 * 2**20
"""Bytes. Gemma's, one of the largest, has 33 MB."""
TOKENIZER_NAMES = (TOKENIZER_FILE, SENTENCEPIECE_FILE)
END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Special tokens known to end a text, for tokenizers that come without settings. The end of a turn
is not one of them."""

MEMORY = 4 * 2**30
"""Bytes that a tokenizer may take, with the text that it works on. Gemma's takes 0.5 GB."""
CHUNK = 2**20
"""Characters that are encoded at a time, if no single text has more."""


def find_sidecars(directories: list[Path]) -> list[Path]:
    """The files that travel with a model, each from the first directory that has it.

    Those of the tokenizer all come from the first directory that has a tokenizer: an adapter's
    folder may bring its own. Without any, they are those of the tokenizer inside a GGUF file.
    Raises CheckpointError for what bears such a name and is not a file.
    """
    home = next(
        (place for place in directories if any(has_file(place / name) for name in TOKENIZER_NAMES)), None
    )
    if home is None:  # a tokenizer that is not known is an error only where it is needed
        with suppress(CheckpointError):
            home = next(filter(None, map(tokenizer_files, directories)), None)
        directories = directories if home is None else [*directories, home]
    found = []
    for name in SIDECAR_FILES:
        anywhere = (GENERATION_FILE, "config.json", *PROCESSOR_FILES)
        places = directories if name in anywhere else [home] if home else []
        found += [own_file(place / name) for place in places if has_file(place / name)][:1]
    return found


class Tokenizer:
    """The tokenizer of a checkpoint directory."""

    def __init__(self, directories: Path | list[Path]) -> None:
        """Reads `tokenizer.json`, else a SentencePiece `tokenizer.model`, else what a GGUF file holds;
        and, where present, `tokenizer_config.json`, `special_tokens_map.json` and `generation_config.json`.

        Of several directories, those of a chain, each file comes from the first that has it
        (`find_sidecars`). Raises CheckpointError for a missing or broken file, and if no
        end-of-text token can be found.
        """
        directories = [directories] if isinstance(directories, Path) else directories
        files = {file.name: file for file in find_sidecars(directories)}
        settings = read_settings(files.get("tokenizer_config.json"))
        path = files.get(TOKENIZER_FILE) or files.get(SENTENCEPIECE_FILE) or directories[0] / TOKENIZER_FILE
        if not path.is_file():
            for directory in directories:
                tokenizer_files(directory)  # may raise, with the reason
            raise CheckpointError(f"{path}: no such file; a checkpoint directory needs its tokenizer")
        self._path = path
        if (size := path.stat().st_size) > LARGEST_TOKENIZER:
            raise CheckpointError(
                f"{path}: has {size:,} bytes; no tokenizer has more than {LARGEST_TOKENIZER:,}"
            )
        first = {
            "file": str(path.absolute()),
            "sentencepiece": path.name == SENTENCEPIECE_FILE,
            "begin": settings.get("add_bos_token") is not False,
            "memory": MEMORY,
        }
        program = Path(__file__).with_name("tokenizer_process.py")
        # Each arena of glibc's reserves 64 MiB of address space, and every thread wants one.
        self._worker, self._lock = Worker(program, first, MALLOC_ARENA_MAX="2"), threading.Lock()
        found = self._answer(self._worker.start(), "not a usable tokenizer file", [])
        self.vocab_size: int = found["size"]
        """One more than the largest id, added tokens included."""
        self._added = {number: (text, special) for number, text, special in found["added"]}
        special = self._special_tokens(files.get("special_tokens_map.json"))
        settings = special | {name: value for name, value in settings.items() if value is not None}
        self.settings = settings
        """What its files say beside tokenizer.json, such as the names of special tokens."""
        self.eos_id = self._end_of_text(settings, path)
        """The token that ends an answer, as training teaches it."""
        stops = [self._number(special["eos_token"])] if "eos_token" in special else []
        self.stop_ids = frozenset([self.eos_id, *stops, *self._named_stops(files)])
        """Tokens that end generation."""
        self._prefix = self._begin_of_text(settings, *found["probes"])
        self._limit: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """In another Python process, the same tokenizer with a process of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def fingerprint(self) -> str:
        """A hash of all that the ids of a text depend on."""
        facts = (self.vocab_size, sorted(self._added.items()), self.eos_id, self._prefix, self._limit)
        return hashlib.sha256(self._path.read_bytes() + repr(facts).encode()).hexdigest()

    def fit(self, num_rows: int) -> str | None:
        """Check against an embedding of `num_rows`. Returns a notice if some tokens have no row in
        it.

        Fewer tokens than rows are normal, as embeddings are padded. A token without a row is an
        error only in a text that has it.
        """
        if self.vocab_size <= num_rows:
            return None
        if self.eos_id >= num_rows:
            raise CheckpointError(
                f"{self._path}: the end-of-text token is number {self.eos_id}, but the model's embedding "
                f"has {num_rows} rows"
            )
        self._limit = num_rows
        return (
            f"{self._path}: {self.vocab_size - num_rows} of its {self.vocab_size} tokens have no row "
            "in the embedding and cannot be used"
        )

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """The token ids of a text; `begin` puts the begin-of-text token first, if this tokenizer
        uses one."""
        return self.encode_batch([text], begin=begin)[0]

    def encode_batch(self, texts: list[str], *, begin: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        prefix = self._prefix if begin else []
        batch = [
            prefix + ids
            for chunk in _chunks(texts)
            for ids in self._ask("encode", chunk, "cannot encode this text")
        ]
        self._check(batch)
        return batch

    def encode_cut(self, texts: list[tuple[str, list[int]]]) -> list[tuple[list[int], list["Cut"]]]:
        """The ids of texts, and where some places of each, in order, are in them."""
        entries = iter(texts)
        batch = [
            (ids, [Cut(*cut) for cut in cuts])
            for chunk in _chunks([text for text, _ in texts])
            for ids, cuts in self._ask(
                "encode_cut", [*islice(entries, len(chunk))], "cannot encode this text"
            )
        ]
        self._check(ids for ids, _ in batch)
        return batch

    def _check(self, batch: Iterable[list[int]]) -> None:
        """Raises UserError for an id that has no row in the embedding."""
        if self._limit is None:
            return
        largest = max(map(max, filter(None, batch)), default=-1)
        if largest >= self._limit:
            raise UserError(
                f"{self._path}: the text has the token {self.token(largest)!r} (number {largest}), but "
                f"the model's embedding has {self._limit} rows; use the tokenizer that the model was "
                "trained with, or leave the token out"
            )

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, sequences: list[list[int]]) -> list[str]:
        """`decode` for several sequences."""
        return self._ask("decode", sequences, "cannot decode")

    def pieces(self, ids: list[int]) -> list[str]:
        """The text that each token adds; of special and other added tokens their names. A character
        that is spread over several tokens is the last one's."""
        pieces: list[str] = []
        stream = TextStream(self)
        for token in ids:
            if token in self._added:
                if pieces:
                    pieces[-1] += stream.finish()  # of a character that never ends
                pieces.append(self._added[token][0])
                stream = TextStream(self)
            else:
                pieces.append(stream.push(token))
        if pieces:
            pieces[-1] += stream.finish()
        return pieces

    def turn_end(self, ending: str) -> int | None:
        """The token that ends a turn: the first special token in `ending`, the text after an
        answer."""
        return next(iter(self.added_tokens(ending)), None)

    def added_tokens(self, text: str) -> list[int]:
        """The added tokens, special ones among them, that a text has, in order."""
        return [token for token in self.encode(text) if token in self._added]

    def leading_added(self, text: str) -> list[int]:
        """The added tokens with which a text begins, up to the first other one."""
        return [*takewhile(self._added.__contains__, self.encode(text))]

    @property
    def begin_ids(self) -> list[int]:
        """What comes before a text; empty if this tokenizer puts nothing there."""
        return [*self._prefix]

    @property
    def begin_text(self) -> str:
        """The name of the begin-of-text token; empty if this tokenizer uses none."""
        return "".join(map(self.token, self._prefix))

    def token(self, index: int) -> str:
        """The name of a token."""
        return self._ask("token", index, "cannot name a token")

    def tokens(self) -> list[str | None]:
        """The names of all token ids, from 0 on; None for one that stands for nothing."""
        return self._ask("tokens", self.vocab_size, "cannot name its tokens")

    def source(self) -> dict[str, Any]:
        """What it does, as a tokenizer.json says it, whatever its file."""
        return json.loads(self._ask("source", None, "cannot describe itself"))

    @property
    def added(self) -> dict[int, tuple[str, bool]]:
        """The added tokens: the text of each, and whether it is special."""
        return dict(self._added)

    def cut_up(self, texts: list[str]) -> list[str]:
        """Those of the texts that are not one token each: this tokenizer cuts them into pieces."""
        return [text for text, ids in zip(texts, self.encode_batch(texts), strict=True) if len(ids) != 1]

    def _number(self, token: str) -> int | None:
        return self._ask("number", token, "cannot look up a token")

    def _ask(self, method: str, argument: Any, failure: str) -> Any:
        """The answer of the tokenizer's process. Raises CheckpointError, with `failure`, if it
        fails."""
        with self._lock:
            reply = self._worker.ask([method, argument])
        texts = [text for text, _ in argument] if method == "encode_cut" else argument
        return self._answer(reply, failure, texts if method.startswith("encode") else [])

    def _answer(self, reply: dict[str, Any] | None, failure: str, texts: list[str]) -> Any:
        if reply is None:
            longest = f" for a text of {max(map(len, texts)):,} characters" if texts else ""
            raise CheckpointError(
                f"{self._path}: {failure}: it takes too much time or memory{longest} (more than there is, "
                f"or than {MEMORY / 2**30:.0f} GiB)"
            )
        if "refused" in reply:
            raise CheckpointError(reply["refused"])
        if "error" in reply:
            raise CheckpointError(f"{self._path}: {failure}: {reply['error']}")
        return reply["answer"]

    def _special_tokens(self, path: Path | None) -> dict[str, str]:
        """The begin and the end of a text that special_tokens_map.json names, if the tokenizer has
        them."""
        values = read_settings(path)
        named = {name: token_text(values.get(name)) for name in ("bos_token", "eos_token")}
        return {
            name: text for name, text in named.items() if text is not None and self._number(text) is not None
        }

    def _named_stops(self, files: dict[str, Path]) -> list[int]:
        """The tokens that end generation by generation_config.json; without it by config.json, as in
        transformers. Of the latter's only special tokens, as it may hold a family's default."""
        if GENERATION_FILE in files:
            return _stop_ids(files[GENERATION_FILE])
        stop = read_settings(files.get("config.json")).get("eos_token_id")
        stops = stop if isinstance(stop, list) else [stop]
        return [token for token in stops if type(token) is int and token in self._added]

    def _end_of_text(self, settings: dict[str, Any], path: Path) -> int:
        name = token_text(settings.get("eos_token"))
        if name is not None:
            if (found := self._number(name)) is None:
                raise CheckpointError(
                    f"{path}: lacks the token {name!r} that tokenizer_config.json names as eos_token"
                )
            return found
        special = {text: number for number, (text, is_special) in self._added.items() if is_special}
        known = [special[name] for name in END_OF_TEXT_NAMES if name in special]
        if len(known) != 1:
            what = "several tokens could be" if known else "no known token is"
            raise CheckpointError(
                f"{path}: {what} the end of a text; name it as eos_token in a tokenizer_config.json beside it"
            )
        return known[0]

    def _begin_of_text(self, settings: dict[str, Any], plain: list[int], full: list[int]) -> list[int]:
        """The tokens that the tokenizer itself puts before a text, else those that its settings ask
        for. `plain` and `full` are the same text without and with what it puts around it."""
        starts = (start for start in range(len(full)) if plain and full[start : start + len(plain)] == plain)
        # What comes after the text, mostly an end-of-text token, is not used.
        if ids := full[: next(starts, 0)]:
            return ids
        name = token_text(settings.get("bos_token"))
        if not settings.get("add_bos_token") or name is None:
            return []
        found = self._number(name)
        return [] if found is None else [found]


class Cut(NamedTuple):
    """A place in a text, in its ids."""

    number: int
    """How many of the ids begin before the place."""
    kept: int | None
    """None: these ids are what the text up to the place has by itself. Else its ids are the first
    `kept` of them,"""
    others: list[int] | None
    """and these."""


class TextStream:
    """A stream of token ids as text, in whole characters only: a character may be spread over
    several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Where the context of the decoding begins: some decoders treat the first token specially.
        self._start = 0
        self._shown = 0  # tokens whose text has been returned

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        (text,) = push_each([self], [token])
        return text

    def finish(self) -> str:
        """The rest at the end of the stream."""
        before, now = self._tokenizer.decode_batch(self._parts())
        self._start = self._shown = len(self._ids)
        return now[len(before) :]

    def _parts(self) -> list[list[int]]:
        """The tokens whose text has been returned, and the same with those since; both from `_start`
        on."""
        return [self._ids[self._start : self._shown], self._ids[self._start :]]

    def _completed(self, before: str, now: str) -> str:
        """What is new, given the texts of `_parts`."""
        waiting = len(self._ids) - self._shown
        if now.endswith("\ufffd") and waiting < 16:  # an invalid byte must not hold back text for ever
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


def push_each(streams: list[TextStream], tokens: list[int]) -> list[str]:
    """`push` of the next token of each stream, all of one tokenizer, which is asked once."""
    for stream, token in zip(streams, tokens, strict=True):
        stream._ids.append(token)
    texts = streams[0]._tokenizer.decode_batch([part for s in streams for part in s._parts()])
    pairs = zip(streams, texts[::2], texts[1::2], strict=True)
    return [stream._completed(before, now) for stream, before, now in pairs]


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, about CHUNK characters at a time."""
    chunk, size = [], 0
    for text in texts:
        if chunk and size + len(text) > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk


def _stop_ids(path: Path) -> list[int]:
    """The tokens that a generation_config.json names as eos_token_id."""
    stop = read_settings(path).get("eos_token_id")
    stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if odd := [entry for entry in stops if type(entry) is not int]:
        raise CheckpointError(f"{path}: eos_token_id {odd[0]!r} is not the number of a token")
    return stops


def read_settings(path: Path | None) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json_object(path) if path is not None and has_file(path) else {}


def token_text(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is the text itself or an object with the
    text as "content"; None if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise CheckpointError(
            f"tokenizer_config.json or special_tokens_map.json: {text!r} is not the text of a token"
        )
    return text
