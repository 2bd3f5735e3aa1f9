"""Tokens of a batch on a device that does not wait for the host.

The sequences have rows of one `StaticCache`. A step computes a token of each and draws the next one
on the device, so that the step after it can be given before the host has read what was drawn: a
sequence that a token ended gets one step too many, which is dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.lora.live import BASE, Way
from litlora.model import GPT, StaticCache, kind_of
from litlora.model.cache import LEAST_ROOM
from litlora.serve.job import Job
from litlora.transformers_config import Architecture


def why_no_rows(config: Architecture) -> str | None:
    """Why the sequences of such a model cannot have rows of one cache; None if they can."""
    if kind_of(config) is not GPT:
        return "the model runs through transformers, which has caches of its own"
    if config.linear_attention_layers:
        return "its layers with linear attention keep a state, and no tokens"
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type in ("dynamic", "longrope"):
        return f"its {scaling.rope_type} rotations depend on the length of a sequence"
    return None


class Steps:
    """The rows, and who has them."""

    def __init__(self, model: GPT, *, max_tokens: int, compiled: bool = False) -> None:
        """All rows hold `max_tokens` at most. `compiled`: by one compiled step, which a CUDA device
        records once and repeats (CUDA graphs); the model must be in inference mode."""
        self.model, self.max_tokens = model, max_tokens
        self.seats: list[Job | None] = []
        """Who has each row."""
        self._held: list[int] = []
        self._cache: StaticCache | None = None
        self._compute: Callable[[Tensor, StaticCache], Tensor] = self._logits
        self._compiled = compiled
        if compiled:
            self._compute = torch.compile(self._logits, mode="reduce-overhead")

    def _logits(self, ids: Tensor, cache: StaticCache) -> Tensor:
        return self.model.logits(self.model.hidden(ids, cache)[:, -1])

    @property
    def ways(self) -> list[Way]:
        """Of each row; nobody's goes where the others do."""
        some = next((job.way for job in self.seats if job), BASE)
        return [job.way if job else some for job in self.seats]

    @property
    def is_full(self) -> bool:
        """Whether a row has no room for another token."""
        return any(job and held >= self._cache.room for job, held in zip(self.seats, self._held, strict=True))

    def seat(self, jobs: Sequence[Job]) -> bool:
        """Give each of these a row, and nobody else; False, with all rows given up, if they would
        take too much memory."""
        for job in self.seats:
            if job is not None and job not in jobs:
                self.leave(job)
        rows, room = 1 << (len(jobs) - 1).bit_length(), self._room_for(jobs)
        if not rows <= len(self.seats) <= 2 * rows or room > self._cache.room:
            self.clear()
            if rows * room > self.max_tokens:
                return False
            self._make(rows, room)
        for job in jobs:
            if job not in self.seats:
                row = self.seats.index(None)
                self._cache.take(row, job.cache)
                self.seats[row], self._held[row] = job, job.cache.length
        return True

    @staticmethod
    def _room_for(jobs: Sequence[Job]) -> int:
        return max(LEAST_ROOM, *(1 << job.computed.bit_length() for job in jobs))

    def _make(self, rows: int, room: int) -> None:
        self._cache = self.model.new_static_cache(rows, room)
        self.seats, self._held = [None] * rows, [0] * rows
        if self._compiled:
            for tensor in self._cache.tensors():
                torch._dynamo.mark_static_address(tensor)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, V) after one more token (B,) of each row."""
        self._held = [held + (job is not None) for job, held in zip(self.seats, self._held, strict=True)]
        return self._compute(ids[:, None], self._cache)

    def first_ids(self) -> Tensor:
        """(B,): the one token of each row that is to be computed, as the host knows it."""
        ids = [job.pending[0] if job else 0 for job in self.seats]
        return torch.tensor(ids, device=self.model.like.device)

    def settle(self) -> None:
        """Let the caches of all jobs hold what their rows do."""
        for row, job in enumerate(self.seats):
            if job is not None:
                self._cache.give(row, job.cache, self._held[row])

    def leave(self, job: Job, *, is_lost: bool = False) -> None:
        """Take a row, if it has one, from a job, whose cache then holds the same unless it `is_lost`."""
        if job in self.seats:
            row = self.seats.index(job)
            if not is_lost:
                self._cache.give(row, job.cache, self._held[row])
            self._cache.free(row)
            self.seats[row] = None

    def clear(self) -> None:
        """Take all rows; the caches of all jobs then hold the same."""
        self.settle()
        self.drop()

    def drop(self) -> None:
        """Forget all rows, and what they hold, without asking anything of the device."""
        self.seats, self._held, self._cache = [], [], None


@dataclass(frozen=True)
class Drawn:
    """What was drawn of each row, on the device and on its way to the host."""

    seats: list[Job | None]
    tokens: Tensor
    """(B,), on the device."""
    _read: Tensor
    """(2, B), on the host: the tokens, and whether the logits were finite."""
    _arrived: "torch.cuda.Event | None"

    @classmethod
    def of(cls, seats: Sequence[Job | None], logits: Tensor) -> "Drawn":
        """From logits (B, V) of rows, all of whose jobs are free."""
        if all(job is None or job.answer.request.sampling.is_plain for job in seats):
            tokens = logits.argmax(-1)
        else:
            drawn = (
                row.argmax() if job is None else job.draw(row) for job, row in zip(seats, logits, strict=True)
            )
            tokens = torch.stack([*drawn])
        finite = torch.stack(logits.aminmax(dim=-1)).isfinite().all(0)
        both = torch.stack([tokens, finite.to(tokens.dtype)])
        if both.device.type != "cuda":
            return cls([*seats], tokens, both, None)
        read = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
        read.copy_(both, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(both.device))
        return cls([*seats], tokens, read, arrived)

    @property
    def jobs(self) -> list[Job]:
        return [job for job in self.seats if job is not None]

    def known(self) -> list[tuple[Job, int | None]]:
        """Each job and its token, as soon as the host has them; None: the logits were not finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, finite = self._read.tolist()
        rows = zip(self.seats, tokens, finite, strict=True)
        return [(job, token if is_finite else None) for job, token, is_finite in rows if job is not None]
