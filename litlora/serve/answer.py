"""What an engine is asked, and what it answers."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from litlora.lora.live import BASE, Way
from litlora.serve.sampling import LogProb, Sampling

if TYPE_CHECKING:
    from litlora.serve.engine import Engine
    from litlora.serve.schema import Shape

Finish = Literal["stop", "length", "cancelled"]
"""Why an answer ended: with a stop token or text, at its longest or the end of the context, or because
it was cancelled."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: list[int]
    """Token ids; at least one."""
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, and are not part of it."""
    way: Way = BASE
    """The adapter that it goes through, if any."""
    generator: torch.Generator | None = None
    """What its tokens are drawn from; None: one of its own, in the state that the seed gives it."""
    text: bool = True
    """Whether tokens come with their text."""
    shape: "Shape | None" = None
    """What the answer must be; it goes along with the answer, so each request has one of its own."""


class Token(NamedTuple):
    """A token of an answer."""

    id: int | None
    """None: text that earlier tokens began and nothing completed."""
    text: str
    """What it adds to the text, in whole characters."""
    logprob: LogProb | None = None
    top: tuple[LogProb, ...] = ()
    """The likeliest tokens in its place, as many as were asked for."""


@dataclass
class Answer:
    """An answer as it comes. Whoever iterates over it lets the engine compute, if no other thread
    does."""

    request: Request
    engine: "Engine"
    listener: Callable[[], None] | None = None
    """Called, on the thread that computes, when there is more, or the end."""
    finish: Finish | None = None
    """Why it ended, once it has."""
    error: Exception | None = None
    """What kept it from being computed."""
    num_tokens: int = 0
    """Tokens so far."""
    num_reused: int = 0
    """Tokens of the prompt that an earlier answer had computed already."""
    is_cancelled: bool = False
    """Whether nobody waits for the rest."""
    ended: Event = field(default_factory=Event)
    _tokens: deque[Token] = field(default_factory=deque)

    def put(self, token: Token) -> None:
        """One more token; the engine calls this."""
        self._tokens.append(token)
        self._tell()

    def end(self, finish: Finish | None, error: Exception | None = None) -> None:
        """There is no more; the engine calls this."""
        self.finish, self.error = finish, error
        self.ended.set()
        self._tell()

    def _tell(self) -> None:
        if (listener := self.listener) is not None:  # whoever listened may leave at any time
            listener()

    def take(self) -> Token | None:
        """The next token that is there already; None if there is none. Raises the error of an answer
        that could not be computed, after its tokens."""
        if self._tokens:
            return self._tokens.popleft()
        if self.ended.is_set() and self.error is not None:
            raise self.error
        return None

    @property
    def waits(self) -> bool:
        """Whether more has to be computed before there is a next token."""
        return not self._tokens and not self.ended.is_set()

    def __iter__(self) -> Iterator[Token]:
        try:
            while True:
                self.engine.advance(self)
                if (token := self.take()) is None:
                    return
                yield token
        finally:
            self.cancel()

    def cancel(self) -> None:
        """No more is wanted; what was computed stays. Nothing happens if it has ended."""
        if not self.ended.is_set():
            self.is_cancelled = True
            self.engine.sweep()
