"""Text generation with a key/value cache: one token after another, as they come."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from litlora.errors import UserError
from litlora.model import GPT, KVCache


@torch.inference_mode()
def generate(
    model: GPT,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids that follow the prompt, until one of stop_ids (not yielded), max_new_tokens or
    the end of the context.

    Raises UserError for an empty prompt or one that leaves no room in the context.
    """
    if not prompt_ids:
        raise UserError("the prompt is empty: there is nothing to go on from")
    context = model.config.max_position_embeddings
    if len(prompt_ids) >= context:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens; the model's context holds {context}, the answer included"
        )
    weight = model.model.embed_tokens.weight
    length = min(context, len(prompt_ids) + max_new_tokens)
    cache = KVCache(model.config, 1, length, dtype=weight.dtype, device=weight.device)
    new_ids = torch.tensor([prompt_ids], device=weight.device)
    for _ in range(length - len(prompt_ids)):
        with _one_token() if new_ids.numel() == 1 else nullcontext():
            hidden = model.model(new_ids, cache)[
                :, -1
            ]  # (1, C): the head is needed at the last position only
            logits = model.logits(hidden)[0]
        if not torch.isfinite(logits).all():
            raise UserError(
                "the model computes numbers that are not finite: its weights or configuration are broken, or its dtype too narrow"
            )
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if (found := int(token)) in stop_ids:
            return
        yield found
        new_ids = token.view(1, 1)


@contextmanager
def _one_token() -> Iterator[None]:
    """Multiplications without oneDNN: for one token they but read the weights: in bf16 torch at the
    memory's speed, oneDNN at half."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token id from logits (V,): the likeliest at temperature 0, else drawn after top-k and then
    top-p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax()
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # keep a token while those before it have less than top_p together: at least one always
        # stays
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[0]
