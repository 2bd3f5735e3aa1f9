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
from bisect import bisect_left
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from litlora.errors import CheckpointError
from litlora.sentencepiece import read_sentencepiece
from litlora.worker import limit

SECONDS = 5
"""Of computing, for any question; long ones get more."""


class Backend:
    """What a tokenizer can be asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._marks = {number for number, token in added.items() if not token.normalized}

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
        """Texts with places in them, in order: the ids of each text, and for each place the number
        of ids that begin before it, with what `_up_to` says."""
        texts = [text for text, _ in asked]
        found = []
        for (text, places), encoding in zip(
            asked, self._tokenizer.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            ids, begins = encoding.ids, [begin for begin, _ in encoding.offsets]
            marks = [number for number, token in enumerate(ids) if token in self._marks]
            numbers = [bisect_left(begins, place) for place in places]
            cuts = [
                (number, *self._up_to(text[:place], ids, number, begins, marks))
                if place < len(text)
                else (len(ids), None, None)
                for place, number in zip(places, numbers, strict=True)
            ]
            found.append((ids, cuts))
        return found

    def _up_to(
        self, text: str, ids: list[int], number: int, begins: list[int], marks: list[int]
    ) -> tuple[int, list[int]] | tuple[None, None]:
        """What a text, which is the begin of a longer one, has as ids instead of the first `number`
        of that one: so many of these, and others; (None, None) if it has these.

        The library takes a text apart at its added tokens before anything else. So only what
        follows the last one depends on where the text ends.
        """
        last = bisect_left(marks, number) - 1
        kept = marks[last] if last >= 0 else 0
        alone = text[begins[kept] :] if last >= 0 else text
        end = self._tokenizer.encode(alone, add_special_tokens=False).ids
        return (None, None) if end == ids[kept:number] else (kept, end)

    def decode(self, sequences: list[list[int]]) -> list[str]:
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]

    def number(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str | None:
        return self._tokenizer.id_to_token(number)


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
