"""One model in memory, many adapters on it, and many requests at a time.

Requests join and leave the batch between two tokens (continuous batching; Yu et al. 2022, Orca). A
sequence has a cache of its own, so that nothing is padded, and each adapter of a batch is applied to
its own rows. A model that runs through transformers computes its sequences in turn.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.errors import UserError
from litlora.frozen.packed import pack_linears
from litlora.lora import Adapter
from litlora.lora.live import BASE, Switchboard, Way, live_updates, switch_off, switch_on
from litlora.model import GPT, CacheBatch, LanguageModel
from litlora.model.latent_attention import READ
from litlora.ram import free_ram
from litlora.serve.answer import Answer, Finish, Request, Token
from litlora.serve.job import Job, not_finite
from litlora.serve.prefixes import Prefixes
from litlora.serve.sampling import Sampling, are_finite
from litlora.serve.steps import Drawn, Steps, why_no_rows
from litlora.serve.text import AnswerText, add_each
from litlora.tokenizer import Tokenizer

PREFILL = 512
"""Tokens of prompts that are computed between two tokens of running answers, at most."""


class Engine:
    """A model in memory and its tokenizer: requests in, tokens out.

    Any thread may ask for answers; one at a time computes, for all.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 16,
        cache_tokens: int | None = None,
        owns_model: bool = False,
        ahead: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """At most `max_batch` sequences are computed together; all caches hold `cache_tokens` at most,
        by default as many as fit a quarter of the free memory. Without a tokenizer, there is
        `generate` alone. With `owns_model`, the model is laid out for generation, and can no longer be
        trained or stored.

        `ahead`, by default on a CUDA device: sequences have rows of `Steps` where their model can, which
        take as much memory again. `compiled`, and so ahead: a step is compiled; raises UserError for a
        model that has no rows."""
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        if owns_model and isinstance(model, GPT):
            pack_linears(model, leave=READ)
            # A move to where they are lays experts together on a GPU, if nothing of them trains.
            model.requires_grad_(False).to(self.device)
        self.cache_tokens = cache_tokens or self._default_cache()
        self.work = threading.Event()
        """Set while there may be something to compute: what a thread that computes all waits for."""
        self._computing = threading.Lock()
        self._entering = threading.Lock()
        """Held, for a moment, by whoever changes or reads through `_waiting`, or the adapters' names."""
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._prefixes = Prefixes(self.cache_tokens)
        self._board, self._numbers = Switchboard(), itertools.count()
        self._adapters: dict[str, _Loaded] = {}
        self._leaving: list[_Loaded] = []
        self._steps: Steps | None = None
        self._drawn: Drawn | None = None
        """What the device has drawn, and the host has not read yet."""
        hindrance = why_no_rows(model.config)
        if compiled and hindrance:
            raise UserError(f"a token's step cannot be compiled: {hindrance}")
        if (ahead or compiled or (ahead is None and self.device.type == "cuda")) and not hindrance:
            self._steps = Steps(model, max_tokens=self.cache_tokens, compiled=compiled)

    @property
    def context(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.like.device

    @property
    def batches(self) -> bool:
        """Whether sequences are computed together; else in turn."""
        return self.model.packs

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._active)

    def _default_cache(self) -> int:
        if not isinstance(self.model, GPT):  # its caches are transformers'
            return self.max_batch * self.context
        if self.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.device)[0]
        else:
            room = free_ram() or 2**32
        config = self.model.config
        layers = [n for n in range(config.num_hidden_layers) if not config.is_linear(n)]
        values = sum(heads * (key + value) for heads, key, value in map(config.cached, layers))
        fits = room // 4 // max(1, values * self.model.like.element_size())
        return max(self.context, min(self.max_batch * self.context, fits))

    # ---- adapters

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that requests can name."""
        return list(self._adapters)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Make an adapter of this model available by a name. Raises UserError for a name that is
        taken, CheckpointError for an adapter that cannot be live, or does not fit."""
        with self._computing:
            if name in self._adapters:
                raise UserError(f"{name}: there is an adapter of this name already")
            updates = live_updates(self.model, adapter, self.model.like.dtype)
            alone = any(".experts." in layer or layer.endswith(READ) for layer in updates)
            loaded = _Loaded(f"{name} {next(self._numbers)}", alone)
            switch_on(self.model, self._board, loaded.key, updates)
            self._adapters[name] = loaded

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; answers that go through it are finished first. Raises UserError for a
        name that there is not."""
        with self._computing:
            with self._entering:
                self._leaving.append(self._loaded(name))
                del self._adapters[name]
            self._let_go()

    def _loaded(self, name: str) -> "_Loaded":
        if (found := self._adapters.get(name)) is None:
            known = ", ".join(self._adapters) or "none"
            raise UserError(f"{name}: there is no adapter of this name; there is {known}")
        return found

    def _let_go(self) -> None:
        """Take off the adapters that were removed, once nothing goes through them."""
        with self._entering:
            used = {sequence.way.adapter for sequence in (*self._active, *self._waiting)}
        for loaded in [one for one in self._leaving if one.key not in used]:
            switch_off(self.model, loaded.key)
            self._prefixes.forget(loaded.key)
            self._leaving.remove(loaded)

    # ---- requests

    def submit(self, request: Request, listener: Callable[[], None] | None = None) -> Answer:
        """Begin to answer. Raises UserError for a prompt that is empty or leaves no room in the
        context, and for an adapter that there is not."""
        self._check_prompt(request.prompt)
        answer = Answer(request, self, listener)
        length = min(self.context, len(request.prompt) + request.sampling.max_new_tokens)
        generator = request.generator or request.sampling.generator(self.device)
        text = AnswerText(self.tokenizer, request.sampling.stop) if request.text else None
        with self._entering:  # else the adapter could leave between its look-up and the end of the queue
            way = request.way
            if way.adapter is not None:
                way = Way(self._loaded(way.adapter).key, way.strength)
            self._waiting.append(Job(answer, way, [*request.prompt], length, generator, text))
        self.work.set()
        return answer

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise UserError("the prompt is empty; the model needs at least one token to continue")
        if len(prompt) >= self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; the model's context holds {self.context}, the answer "
                "included"
            )

    def generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int] = frozenset(),
        generator: torch.Generator | None = None,
        way: Way = BASE,
    ) -> Iterator[int]:
        """Yield the ids that follow the prompt, until one of stop_ids (not yielded), max_new_tokens or
        the end of the context. Raises as `submit`."""
        request = Request(
            prompt=prompt, sampling=sampling, stop_ids=stop_ids, way=way, generator=generator, text=False
        )
        return (token.id for token in self.submit(request))

    def advance(self, answer: Answer) -> None:
        """Compute until an answer has more, or has ended."""
        while answer.waits:
            with self._computing:
                if answer.waits:
                    self._step()

    def step(self) -> bool:
        """Compute a token for each running answer; returns whether there is more to compute."""
        with self._computing:
            self.work.clear()
            self._step()
            is_more = bool(self._active or self._waiting)
        if is_more:
            self.work.set()
        return is_more

    def sweep(self) -> None:
        """Let answers that were cancelled go: now, or before the next token where a thread
        computes."""
        self.work.set()
        if self._computing.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._computing.release()

    # ---- computing, by one thread at a time

    @torch.inference_mode()
    def _step(self) -> None:
        try:
            self._sweep()
            drawn, self._drawn = self._drawn, None
            if drawn is not None:
                if self._goes_on(drawn):
                    self._drawn = self._draw_next(drawn.tokens)
                self._tell_known(drawn)
            if self._drawn is None:
                self._start_step()
        except Exception as error:  # such as a lack of memory: nobody's answer can go on
            self._drawn = None
            if self._steps is not None:
                self._steps.drop()
            for sequence in [*self._active]:
                self._end(sequence, None, error)
        self._let_go()

    def _start_step(self) -> None:
        """Compute a token of each, or more of prompts, from what the host knows."""
        self._admit()
        ready = [job for job in self._active if len(job.pending) == 1]
        done = [*self._prompts(bool(ready))]
        batches = self._together(ready)
        if self._steps is not None and batches:
            if len(batches) == 1 and self._steps.seat(ready):
                done += self._step_of_rows(ready)
                batches = []
            else:
                self._steps.clear()
        for batch in batches:
            done += zip(batch, self._next_logits(batch), strict=True)
        if done:
            self._take_tokens(*map(list, zip(*done, strict=True)))

    def _step_of_rows(self, ready: list[Job]) -> list[tuple[Job, Tensor]]:
        """The logits after one more token of those that have rows; none if the device draws on."""
        if all(job.is_free for job in ready):
            self._drawn = self._draw_next(self._steps.first_ids())
            return []
        logits = self._row_logits(self._steps.first_ids())
        return [(job, row) for job, row in zip(self._steps.seats, logits, strict=True) if job is not None]

    def _row_logits(self, ids: Tensor) -> Tensor:
        """(B, V) after one more token (B,) of each row."""
        with self._board.set_to(self._steps.ways, self.device):
            logits = self._steps.logits(ids)
        for job in self._steps.seats:
            if job is not None:
                job.computed += 1
        return logits

    def _draw_next(self, ids: Tensor) -> Drawn:
        return Drawn.of(self._steps.seats, self._row_logits(ids))

    def _goes_on(self, drawn: Drawn) -> bool:
        """Whether the next step can be given before what was drawn is known: for the same sequences,
        none of which is at its end."""
        if self._steps.is_full or (self._waiting and len(self._active) < self.max_batch):
            return False
        jobs = drawn.jobs
        return {*jobs} == {*self._active} and all(len(job.ids) + 1 < job.length for job in jobs)

    def _tell_known(self, drawn: Drawn) -> None:
        known = [(job, token) for job, token in drawn.known() if job in self._active]
        self._tell([(job, not_finite() if token is None else Token(token, "")) for job, token in known])

    @torch.inference_mode()
    def _sweep(self) -> None:
        for sequence in [one for one in self._active if one.answer.is_cancelled]:
            self._end(sequence, "cancelled")
        with self._entering:
            gone = [one for one in self._waiting if one.answer.is_cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in gone:
            sequence.answer.end("cancelled")

    def _admit(self) -> None:
        """Begin with those that wait, in their order, while there is room."""
        while self._waiting and len(self._active) < self.max_batch:
            sequence = self._waiting[0]
            promised = sum(one.length for one in self._active)
            if self._active and promised + sequence.length > self.cache_tokens:
                return
            if self._steps is not None:
                self._steps.settle()
            running = [one.computed_part for one in self._active]
            self._active.append(self._waiting.popleft())
            if self._reuses:
                found = self._prefixes.begin(sequence.way, sequence.ids, sequence.length, running)
                if found is not None:
                    sequence.cache, sequence.computed = found, found.length
                    sequence.answer.num_reused = found.length
            self._prefixes.shrink(max(0, self.cache_tokens - promised - sequence.length))
            if sequence.cache is None:
                sequence.cache = self.model.new_cache(sequence.length)

    @property
    def _reuses(self) -> bool:
        """Whether the beginning of one sequence can be another's."""
        return isinstance(self.model, GPT) and self.model.shares_tokens

    def _prompts(self, others_run: bool) -> Iterator[tuple[Job, Tensor]]:
        """Go on with prompts: PREFILL tokens if other answers run, else all. Yields the logits (V,)
        after each that is done."""
        room = PREFILL if others_run else None
        for sequence in [one for one in self._active if len(one.pending) > 1]:
            ids = sequence.pending[:room]
            with self._board.set_to([sequence.way], self.device):
                hidden = self.model.hidden(torch.tensor([ids], device=self.device), sequence.cache)
                sequence.computed += len(ids)
                if not sequence.pending:
                    yield sequence, self.model.logits(hidden[:, -1])[0]  # the head needs the last alone
            room = None if room is None else room - len(ids)
            if room is not None and room <= 0:
                return

    def _together(self, ready: list[Job]) -> list[list[Job]]:
        """Those whose next tokens are computed in one go. An expert gets the tokens of several
        sequences in an order of its own, and a weight that is read is one for all: adapters of these
        go one by one."""
        if not self.model.packs:
            return [[sequence] for sequence in ready]
        if not any(one.is_alone for one in (*self._adapters.values(), *self._leaving)):
            return [ready] if ready else []
        ways = dict.fromkeys(sequence.way for sequence in ready)
        return [[sequence for sequence in ready if sequence.way == way] for way in ways]

    def _next_logits(self, batch: list[Job]) -> Tensor:
        """The logits (B, V) after one more token of each."""
        ids = torch.tensor([sequence.pending for sequence in batch], device=self.device)
        caches = [sequence.cache for sequence in batch]
        cache = caches[0] if len(batch) == 1 else CacheBatch(caches)
        with self._board.set_to([sequence.way for sequence in batch], self.device):
            logits = self.model.logits(self.model.hidden(ids, cache)[:, -1])
        for sequence in batch:
            sequence.computed += 1
        return logits

    def _take_tokens(self, sequences: list[Job], logits: list[Tensor]) -> None:
        """Choose the next token of each sequence, and tell its answer."""
        finite = torch.stack([are_finite(row) for row in logits]).tolist()
        rows = zip(sequences, logits, finite, strict=True)
        self._tell([(job, _chosen(job, row, is_finite)) for job, row, is_finite in rows])

    def _tell(self, tokens: list[tuple[Job, Token | Exception]]) -> None:
        """Tell answers their next tokens, or why there is none."""
        chosen = []
        for sequence, token in tokens:
            if isinstance(token, Exception):
                self._end(sequence, None, token)
            elif token.id in sequence.answer.request.stop_ids:
                self._end(sequence, "stop")
            else:
                sequence.ids.append(token.id)
                chosen.append((sequence, token))
        texts = add_each([(sequence.text, token.id) for sequence, token in chosen])
        for (sequence, token), text in zip(chosen, texts, strict=True):
            sequence.answer.num_tokens += 1
            sequence.answer.put(token._replace(text=text))
            if sequence.is_complete:
                self._end(sequence, "stop")
            elif len(sequence.ids) >= sequence.length:
                self._end(sequence, "length")

    def _end(self, sequence: Job, finish: Finish | None, error: Exception | None = None) -> None:
        if self._steps is not None:
            self._steps.leave(sequence, is_lost=error is not None)
        self._active.remove(sequence)
        if error is None and self._reuses:
            self._prefixes.keep(sequence.computed_part)
        if finish in ("stop", "length") and sequence.text is not None and (rest := sequence.text.finish()):
            sequence.answer.put(Token(None, rest))
        sequence.answer.end(finish, error)


@dataclass(frozen=True)
class _Loaded:
    """An adapter on the model."""

    key: str
    """What the switchboard calls it: another one of the same name has another."""
    is_alone: bool
    """Whether all sequences of a forward must go through it."""


def _chosen(job: Job, logits: Tensor, is_finite: bool) -> Token | Exception:
    """The next token of an answer, or why it has none."""
    try:
        return job.choose(logits, is_finite)
    except Exception as error:  # of this answer's own settings: the others go on
        return error
