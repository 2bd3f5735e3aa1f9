"""Text generation with a key/value cache: one token after another, as they come."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from litlora.errors import UserError
from litlora.model import LanguageModel
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen, and how many there may be."""

    max_new_tokens: int
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher is more random."""
    top_k: int | None = None
    """Sample only among the k likeliest tokens."""
    top_p: float = 1.0
    """Sample only among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Seed of `generator`; None for a different one each time."""

    def generator(self, device: torch.device) -> torch.Generator:
        """A random generator to draw tokens from, in the state that `seed` gives it."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


class Engine:
    """A model in memory and its tokenizer: prompts and sampling settings in, tokens out."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def context(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.like.device

    def generate(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """As the function `generate`."""
        return generate(self.model, prompt_ids, sampling, stop_ids=stop_ids, generator=generator)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    stop_ids: frozenset[int] = frozenset(),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the ids that follow the prompt, until one of stop_ids (not yielded), max_new_tokens or
    the end of the context. Tokens are drawn from `generator`, by default torch's own.

    Raises UserError for an empty prompt or one that leaves no room in the context.
    """
    if not prompt_ids:
        raise UserError("the prompt is empty; the model needs at least one token to continue")
    context = model.config.max_position_embeddings
    if len(prompt_ids) >= context:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens; the model's context holds {context}, the answer "
            f"included"
        )
    like = model.like
    length = min(context, len(prompt_ids) + sampling.max_new_tokens)
    cache = model.new_cache(length)
    new_ids = torch.tensor([prompt_ids], device=like.device)
    for _ in range(length - len(prompt_ids)):
        is_single = new_ids.numel() == 1 and like.device.type == "cpu"
        computing = _one_dnn.off() if is_single else nullcontext()
        with computing:
            hidden = model.hidden(new_ids, cache)[:, -1]  # (1, C): the head needs the last position only
            logits = model.logits(hidden)[0]
        if not torch.isfinite(logits).all():
            raise UserError(
                "the model's logits are not finite: its weights or configuration are broken, or its dtype "
                "is too narrow"
            )
        token = sample(logits, sampling, generator)
        if (found := int(token)) in stop_ids:
            return
        yield found
        new_ids = token.view(1, 1)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """A token id from logits (V,): the likeliest at temperature 0, else drawn after top-k and then
    top-p (Holtzman et al. 2020)."""
    if sampling.temperature == 0:
        return logits.argmax()
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # Keep a token while those before it sum to less than top_p: at least one always stays.
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[0]


class _OneDNN:
    """The only owner of torch's switch for oneDNN, off while a thread computes a single token.

    A single token reads every weight once. In bf16, oneDNN reads them at half the speed of torch's
    own kernel, and torch can choose between the two for the whole process only. So threads are
    counted: the first that decodes turns oneDNN off, and the last restores what it found. What
    other threads compute in between is slower at worst, never wrong.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_decoding = 0
        self._enabled = True

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if self._num_decoding == 0:
                self._enabled = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            self._num_decoding += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_decoding -= 1
                if self._num_decoding == 0:
                    torch.backends.mkldnn.enabled = self._enabled


_one_dnn = _OneDNN()
