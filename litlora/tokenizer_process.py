"""The process in which a tokenizer runs, by `litlora.worker`: a stranger's tokenizer can make a
short text gigabytes long, and the `tokenizers` library ends its process where memory ends.

The first question is {"file": path, "sentencepiece": bool, "begin": bool, "memory": bytes}: the
file to load, whether SentencePiece's begin-of-text token belongs to it, and a limit. Its answer is
what `described` says. The others are [name of a method of `Backend`, argument]. The reply is
{"answer": value}; or {"error": text}, where {"refused": text} is a message of our own.
"""

import json
import os
import resource
import signal
import sys
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from litlora.errors import CheckpointError
from litlora.sentencepiece import read_sentencepiece
from litlora.worker import limit, shared_length

SECONDS = 5
"""Of computing, for any question; long ones get more."""


class _Ids(NamedTuple):
    """A text in token ids."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Where each begins and ends, in characters."""


class Backend:
    """What a tokenizer can be asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._marks = {number for number, token in added.items() if not token.normalized}
        self._longest_mark = max((len(token.content) for token in added.values()), default=0)

    def described(self) -> dict[str, Any]:
        """The number of ids, the added tokens, and the ids of "a" without and with what the
        tokenizer puts around a text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {
            "size": 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1),
            "added": [[number, token.content, token.special] for number, token in added.items()],
            "probes": [
                self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True)
            ],
        }

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_cut(self, asked: list[tuple[str, list[int]]]) -> list[tuple[list[int], list[Any]]]:
        """Texts with places in them: the ids of each text, and for each place the number of ids
        that begin before it, with what `_up_to` says.

        A text that begins as the one before is encoded from where they differ.
        """
        texts = [text for text, _ in asked]
        shared = [shared_length(*pair) for pair in zip(["", *texts], texts, strict=False)]
        anew = [number for number, text in enumerate(texts) if 2 * shared[number] < len(text)]
        batch = self._tokenizer.encode_batch([texts[number] for number in anew], add_special_tokens=False)
        known = {number: _Ids(one.ids, one.offsets) for number, one in zip(anew, batch, strict=True)}
        found = []
        before = _Ids([], [])
        for number, (text, places) in enumerate(asked):
            before = known.pop(number, None) or self._going_on(before, text, shared[number])
            found.append((before.ids, [self._cut(before, text, place) for place in places]))
        return found

    def _going_on(self, before: "_Ids", text: str, shared: int) -> "_Ids":
        """The ids of a text whose first `shared` characters are those of the one before."""
        kept, begin = self._last_mark(before, shared - self._longest_mark)
        rest = self._tokenizer.encode(text[begin:], add_special_tokens=False)
        spans = [(start + begin, stop + begin) for start, stop in rest.offsets]
        return _Ids(before.ids[:kept] + rest.ids, before.spans[:kept] + spans)

    def _cut(self, whole: "_Ids", text: str, place: int) -> tuple[int, int | None, list[int] | None]:
        """How many ids begin before a place in a text; and what the text up to there has by itself
        instead of them: the first so many of them, and others; None if it has these."""
        if place == len(text):
            return len(whole.ids), None, None
        number = bisect_left(whole.spans, place, key=lambda span: span[0])
        kept, begin = self._last_mark(whole, place)
        end = self._tokenizer.encode(text[begin:place], add_special_tokens=False).ids
        return (number, None, None) if end == whole.ids[kept:number] else (number, kept, end)

    def _last_mark(self, whole: "_Ids", place: int) -> tuple[int, int]:
        """The last added token that ends up to a place: which of the ids, and where it begins.

        The library takes a text apart at its added tokens before anything else. So what comes
        before this token and what begins with it can be encoded apart.
        """
        number = bisect_right(whole.spans, place, key=lambda span: span[1])
        while number > 0:
            number -= 1
            if whole.ids[number] in self._marks:
                return number, whole.spans[number][0]
        return 0, 0

    def decode(self, sequences: list[list[int]]) -> list[str]:
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]

    def number(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str | None:
        return self._tokenizer.id_to_token(number)

    def source(self, _: None) -> str:
        return self._tokenizer.to_str()

    def tokens(self, count: int) -> list[str | None]:
        return list(map(self._tokenizer.id_to_token, range(count)))


def load(asked: dict[str, Any]) -> Backend:
    path = Path(asked["file"])
    if asked["sentencepiece"]:
        return Backend(read_sentencepiece(path, add_bos_token=asked["begin"]))
    return Backend(Tokenizer.from_file(str(path)))


def allow(size: int) -> None:
    """Seconds of computing for a question of so many characters, or a file of so many bytes: some
    fifty times what it takes."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + size // 20_000)


def reply(value: Any) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    # Ctrl-C is for the process that asks; this one ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = json.loads(sys.stdin.readline())
    limit(resource.RLIMIT_AS, first["memory"])
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    allow(os.path.getsize(first["file"]))
    backend, question = None, None
    while True:
        try:
            if backend is None:
                backend = load(first)
                answer = {"answer": backend.described()}
            else:
                answer = {"answer": getattr(backend, question[0])(question[1])}
        except CheckpointError as error:
            answer = {"refused": str(error)}
        except MemoryError:
            os._exit(1)
        # The library raises bare Exception, or panics, which raises a BaseException.
        except BaseException as error:
            answer = {"error": " ".join(str(error).split())[:300]}
        reply(answer)
        if backend is None or not (line := sys.stdin.readline()):
            return
        question = json.loads(line)
        allow(len(line))


if __name__ == "__main__":
    main()
