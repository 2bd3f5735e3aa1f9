"""Caches of answers that are done, for requests that begin as they do: the next turn of a chat, or
another one with the same system message."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from litlora.lora.live import Way
from litlora.model import KVCache

LEAST = 16
"""Tokens for which it is worth to copy a cache."""


class Computed(NamedTuple):
    """Tokens, and the cache that holds them."""

    way: Way
    ids: list[int]
    cache: KVCache


@dataclass
class Prefixes:
    """The newest caches, which take memory for so many tokens at most."""

    max_tokens: int

    def __post_init__(self) -> None:
        self._kept: list[Computed] = []

    @property
    def num_tokens(self) -> int:
        """Those that they take memory for."""
        return sum(one.cache.room for one in self._kept)

    def keep(self, done: Computed) -> None:
        """Keep one more, in place of those that it continues; the oldest go."""
        if len(done.ids) < LEAST:
            return
        done.cache.length = len(done.ids)
        self._kept = [one for one in self._kept if not _continues(done, one)]
        self._kept.append(done)
        self.shrink(self.max_tokens)

    def shrink(self, max_tokens: int) -> None:
        """Let the oldest go until there are at most so many tokens."""
        while self._kept and self.num_tokens > max_tokens:
            self._kept.pop(0)

    def forget(self, adapter: str) -> None:
        """Let those go that were computed with an adapter."""
        self._kept = [one for one in self._kept if one.way.adapter != adapter]

    def begin(
        self, way: Way, prompt: Sequence[int], max_length: int, running: Iterable[Computed]
    ) -> KVCache | None:
        """A cache of up to max_length that holds the beginning of a prompt, taken or copied from those
        kept or running; None if none begins alike. The last token is always left to compute."""
        best, most = None, LEAST - 1
        for one in (*self._kept, *running):
            if one.way == way and (common := _in_common(one.ids, prompt[:-1])) > most:
                best, most = one, common
        if best is None:
            return None
        if most == len(best.ids) and any(one is best for one in self._kept):
            self._kept = [one for one in self._kept if one is not best]
            best.cache.max_length = max_length
            return best.cache
        return best.cache.beginning(most, max_length)


def _continues(later: Computed, earlier: Computed) -> bool:
    return later.way == earlier.way and later.ids[: len(earlier.ids)] == earlier.ids


def _in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(number for number in range(length) if first[number] != second[number])
