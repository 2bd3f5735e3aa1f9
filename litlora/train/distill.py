"""Distill: an objective over the predictions of another model, the teacher, for the same tokens.

The teacher is asked once, before training: of each learned token its top-k log-probabilities are
kept, and it is in memory no longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litlora.checkpoint import Chain, resolve
from litlora.data.batches import Batch, num_supervised
from litlora.data.examples import Example
from litlora.errors import UserError, setting
from litlora.kernels.cross_entropy import chunk_rows, exact_dtype
from litlora.load import load_chain, load_text
from litlora.ram import free_ram
from litlora.settings import DistillConfig
from litlora.streaming import gib
from litlora.tokenizer import Tokenizer
from litlora.train.objective import SFT
from litlora.train.parallel import Parallel
from litlora.train.plan import evaluation_plan
from litlora.train.precision import cast


class Predictions(NamedTuple):
    """What a teacher says of M tokens, each by its k likeliest candidates."""

    ids: Tensor
    """(M, k), int32."""
    log_probs: Tensor
    """(M, k), in nats."""
    rest: Tensor
    """(M,): the log-probability of all other tokens together; -inf if there are none."""


@dataclass(frozen=True, slots=True)
class TaughtExample(Example):
    """An example, and what the teacher says of its learned tokens."""

    predictions: Predictions


class TaughtBatch(NamedTuple):
    """A micro-batch."""

    batch: Batch
    predictions: Predictions
    """Of its M learned positions."""


@dataclass(frozen=True)
class Teacher:
    """A model that is learned from, as its files hold it."""

    chain: Chain
    quantize: str | None = None
    """The name of one of QUANTIZERS, or None."""


def find_teacher(directory: Path, student: Chain, quantize: str | None = None) -> Teacher:
    """The teacher in this directory. Raises UserError if its token ids mean other tokens than the
    student's; no weights are loaded."""
    chain = resolve(directory)
    ours, theirs = (load_text(each).tokenizer for each in (student, chain))
    check_same_tokens(ours, theirs, directory)
    return Teacher(chain, quantize)


def check_same_tokens(student: Tokenizer, teacher: Tokenizer, directory: Path) -> None:
    """Raise UserError, with the first difference, unless all ids of both mean the same tokens."""
    if student.fingerprint == teacher.fingerprint:
        return
    ours, theirs = student.tokens(), teacher.tokens()
    if ours == theirs:
        return
    longest = max(len(ours), len(theirs))
    ours, theirs = (names + [None] * (longest - len(names)) for names in (ours, theirs))
    first = next(number for number in range(longest) if ours[number] != theirs[number])
    raise UserError(
        f"{setting('teacher')} {directory}: its token {first} is {_named(theirs[first])}, and the student's "
        f"is {_named(ours[first])}: a teacher must have the same tokens; take one of the same family"
    )


def _named(token: str | None) -> str:
    return "none" if token is None else repr(token)


class Distill(SFT):
    """weight · KL(teacher || student) + (1 - weight) · cross-entropy, summed over the learned tokens
    (Hinton et al. 2015, arXiv:1503.02531, without their factor T²: as generalized knowledge
    distillation has it, Agarwal et al. 2023, arXiv:2306.13649, with β = 0).

    KL = Σ p log(p / q) + p_R log(p_R / q_R) over the teacher's k likeliest tokens and R, all other
    tokens as one: a lower bound of the full KL, and equal to it where k is the vocabulary.
    """

    figures = ("kl", "cross_entropy")

    def __init__(
        self, *arguments: Any, teacher: Teacher | None = None, distill: DistillConfig | None = None
    ) -> None:
        super().__init__(*arguments)
        self.distill = distill or DistillConfig()
        self.top_k = min(self.distill.top_k, self.model.config.vocab_size)
        self.teacher, self._asked = teacher, None
        if teacher is not None:
            self.top_k = min(self.top_k, teacher.chain.config.vocab_size)
            self.facts["teacher"] = teacher.chain.top.fingerprint
            top, size = teacher.chain.top.directory, gib(teacher.chain.base.num_bytes)
            held = f", held in {teacher.quantize}" if teacher.quantize else ""
            self.ahead = (
                f"teacher: asking {top} ({size} in its file{held}) once for its {self.top_k:,} likeliest "
                "tokens, which takes as long as a validation on all examples; it is freed before training"
            )

    # ---- before training

    def prepared(self, examples: Sequence[Example], parallel: Parallel) -> list[TaughtExample]:
        """The examples with what the teacher says of them. All ranks call this together, ask a
        share each, and get the same."""
        if not examples:
            return []
        self._check_fits(examples)
        if self._asked is None:
            self._asked = self._load(parallel.device)
        found: dict[int, Predictions] = {}
        micro_batches = evaluation_plan(self.lengths(examples), self.config)
        for micro, _ in parallel.shared(micro_batches):
            chosen = [examples[index] for index in micro]
            said = self._ask(self._asked, super().batch(chosen, parallel.device))
            counts = [self.weight(example) for example in chosen]
            split = zip(*(tensor.cpu().split(counts) for tensor in said), strict=True)
            # Copies: a view would keep its whole micro-batch.
            found |= {
                index: Predictions(*(t.clone() for t in each))
                for index, each in zip(micro, split, strict=True)
            }
        for others in parallel.gather(found) if parallel.world_size > 1 else ():
            found |= others
        return [
            TaughtExample(example.ids, example.learned, found[index])
            for index, example in enumerate(examples)
        ]

    def ready(self) -> None:
        self._asked = None

    def _check_fits(self, examples: Sequence[Example]) -> None:
        """Raise UserError for examples that the teacher, or the memory, cannot take."""
        config, longest = self.teacher.chain.config, max(self.lengths(examples))
        if longest > config.max_position_embeddings:
            raise UserError(
                f"{setting('teacher')} {self.teacher.chain.top.directory}: takes "
                f"{config.max_position_embeddings:,} tokens, and the longest example has {longest:,}; "
                f"set {setting('max_seq_length')} to {config.max_position_embeddings}"
            )
        num_tokens = sum(num_supervised(example, self.config.mask_prompt) for example in examples)
        needed, free = num_tokens * (8 * self.top_k + 4), free_ram()
        if free is not None and needed > free:
            raise UserError(
                f"{setting('top_k')} {self.top_k}: the teacher's predictions of {num_tokens:,} tokens take "
                f"{gib(needed)} of memory, and {gib(free)} are free; take fewer, or less data"
            )

    def _load(self, device: torch.device) -> SFT:
        """The teacher, in the number format of the student."""
        model = load_chain(self.teacher.chain, quantize=self.teacher.quantize, device=device).model
        cast(model, self.model.like.dtype)
        return SFT(model.requires_grad_(False), self.config, self.contexts).eval()

    @torch.no_grad()
    def _ask(self, teacher: SFT, batch: Batch) -> Predictions:
        def ask(batch: Batch) -> Predictions:
            hidden = teacher.hidden(batch)
            rows = chunk_rows(teacher.model.config.vocab_size, hidden.device)
            # Rows of an embedding that are padding stand for no token of the student.
            known = self.model.config.vocab_size
            said = [
                predictions(teacher.model.logits(piece)[:, :known] / self.distill.temperature, self.top_k)
                for piece in hidden.split(rows)
            ]
            return Predictions(*map(torch.cat, zip(*said, strict=True)))

        return teacher(batch, ask)

    # ---- training

    def batch(self, examples: Sequence[Example], device: torch.device) -> TaughtBatch:
        """Of examples that were not prepared, as for a measurement of memory, nothing is known."""
        batch = super().batch(examples, device)
        said = [
            example.predictions if isinstance(example, TaughtExample) else self._unknown(self.weight(example))
            for example in examples
        ]
        return TaughtBatch(
            batch, Predictions(*(torch.cat(each).to(device) for each in zip(*said, strict=True)))
        )

    def _unknown(self, count: int) -> Predictions:
        ids = torch.arange(self.top_k, dtype=torch.int32).expand(count, -1)
        even = -torch.tensor(self.top_k + 1.0).log()
        return Predictions(ids, even.expand(count, self.top_k), even.expand(count))

    def loss(self, batch: TaughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum in nats, in fp32 or better."""
        hidden = self.hidden(batch.batch)
        rows = chunk_rows(self.model.config.vocab_size, hidden.device)
        inputs = (hidden, batch.batch.targets, *batch.predictions)
        if len(hidden) <= rows:
            kl, cross_entropy = self._chunk(*inputs)
        else:  # the backward computes each chunk's logits once more instead of keeping them
            pieces = zip(*(tensor.split(rows) for tensor in inputs), strict=True)
            sums = [checkpoint(self._chunk, *piece, use_reentrant=False) for piece in pieces]
            kl, cross_entropy = (torch.stack(each).sum() for each in zip(*sums, strict=True))
        weight = self.distill.weight
        loss = kl if weight == 1 else weight * kl + (1 - weight) * cross_entropy
        return loss, {"kl": kl.detach(), "cross_entropy": cross_entropy.detach()}

    def _chunk(self, hidden: Tensor, targets: Tensor, *said: Tensor) -> tuple[Tensor, Tensor]:
        """The summed KL and cross-entropy of some tokens."""
        logits = self.model.logits(hidden)
        logits = logits.to(exact_dtype(logits))
        picked = logits.gather(1, targets[:, None])[:, 0]
        cross_entropy = (logits.logsumexp(1) - picked).sum()
        return divergence(logits / self.distill.temperature, Predictions(*said)), cross_entropy

    def text(self, batch: TaughtBatch) -> Batch:
        return batch.batch

    def idle(self, batch: TaughtBatch) -> TaughtBatch:
        return TaughtBatch(super().idle(batch.batch), Predictions(*(each[:0] for each in batch.predictions)))

    def piece(self, batch: TaughtBatch, length: int) -> TaughtBatch:
        piece = super().piece(batch.batch, length)
        count = len(piece.targets)
        return TaughtBatch(piece, Predictions(*(each[:count] for each in batch.predictions)))


def predictions(logits: Tensor, top_k: int) -> Predictions:
    """What these logits (M, V) say, in fp32 or better."""
    logits = logits.to(exact_dtype(logits))
    whole = logits.logsumexp(1)
    top, ids = logits.topk(top_k, dim=1)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(1) - whole
    return Predictions(ids.to(torch.int32), top - whole[:, None], rest)


def divergence(logits: Tensor, teacher: Predictions) -> Tensor:
    """Σ KL(teacher || student) in nats for the student's logits (M, V) in fp32 or better: see
    `Distill`."""
    whole, ids = logits.logsumexp(1), teacher.ids.long()
    kl = teacher.log_probs.exp() * (teacher.log_probs - (logits.gather(1, ids) - whole[:, None]))
    total = kl.sum()
    if ids.size(1) < logits.size(1):
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(1) - whole
        has_rest = teacher.rest > -torch.inf
        ratio = torch.where(has_rest, teacher.rest, 0) - rest
        total = total + torch.where(has_rest, teacher.rest.exp() * ratio, 0).sum()
    return total
