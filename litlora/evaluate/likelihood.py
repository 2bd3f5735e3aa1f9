"""The probability that a model gives to known tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.data.batches import Batch, num_supervised, pack
from litlora.data.examples import Example
from litlora.kernels.buckets import bucketed
from litlora.kernels.cross_entropy import chunk_rows, exact_dtype
from litlora.model import LanguageModel

PACKED_TOGETHER = 512
"""Examples among which packs are made: more would fill them hardly better."""


@dataclass(frozen=True)
class Likelihood:
    """Of the learned tokens of one example."""

    log_prob: float
    """Summed, in nats."""
    num_tokens: int
    is_greedy: bool
    """Whether each of them is the likeliest, so that greedy decoding writes them."""


def likelihoods(model: LanguageModel, examples: Sequence[Example], batch_tokens: int) -> list[Likelihood]:
    """How likely the learned tokens of each example are after those before them. At most
    `batch_tokens` tokens are computed at a time, or one longer example."""
    found = [Likelihood(0.0, 0, True)] * len(examples)
    lengths = [len(example.ids) for example in examples]
    learning = [index for index, example in enumerate(examples) if num_supervised(example, True)]
    for start in range(0, len(learning), PACKED_TOGETHER):
        for micro in pack(learning[start : start + PACKED_TOGETHER], lengths, batch_tokens):
            log_probs, greedy = token_scores(model, _batch([examples[index] for index in micro]))
            counts = [num_supervised(examples[index], True) for index in micro]
            sums = [float(of_one.double().sum()) for of_one in log_probs.cpu().split(counts)]
            all_greedy = [bool(of_one.all()) for of_one in greedy.cpu().split(counts)]
            for index, *scores in zip(micro, sums, counts, all_greedy, strict=True):
                found[index] = Likelihood(*scores)
    return found


def _batch(examples: Sequence[Example]) -> Batch:
    """A pack. The last token of an example is only predicted, so it is not computed: with it, an example
    may be one token longer than the context."""
    ids, positions, targets = [], [], []
    start = 0
    for example in examples:
        tokens = torch.frombuffer(example.ids, dtype=torch.int32).long()
        for first, stop in example.learned_spans():
            positions.append(torch.arange(start + first - 1, start + stop - 1))
            targets.append(tokens[first:stop])
        ids.append(tokens[:-1])
        start += len(tokens) - 1
    lengths = [len(each) for each in ids]
    return Batch(torch.cat(ids)[None], torch.cat(positions), torch.cat(targets), lengths)


@torch.inference_mode()
def token_scores(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each learned token of a pack, log p in nats, in fp32 or better, and whether it is the
    likeliest: both (M,)."""
    like = model.like
    ids, lengths, places = batch.input_ids, batch.lengths, batch.positions
    if model.packs:
        ids, lengths, places = bucketed(ids, lengths, places, like)
    hidden = model.hidden(ids.to(like.device), lengths=lengths, positions=places.to(like.device))
    hidden, targets = hidden[0, : len(batch.positions)], batch.targets.to(like.device)
    rows = chunk_rows(model.config.vocab_size, like.device)
    log_probs, greedy = [], []
    for piece, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.logits(piece)
        logits = logits.to(exact_dtype(logits))
        log_probs.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(log_probs), torch.cat(greedy)
