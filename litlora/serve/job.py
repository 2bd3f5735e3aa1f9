"""What an engine keeps of a request that waits or runs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litlora.errors import UserError
from litlora.lora.live import Way
from litlora.serve.answer import Answer, Token
from litlora.serve.prefixes import Computed
from litlora.serve.sampling import log_probabilities, penalised, sample
from litlora.serve.text import AnswerText


@dataclass(eq=False)
class Job:
    """A request that waits or runs."""

    answer: Answer
    way: Way
    ids: list[int]
    """Of the prompt, and of the answer so far."""
    length: int
    """Most ids that there may be."""
    generator: torch.Generator
    text: AnswerText | None
    cache: Any = None
    computed: int = 0
    """How many ids the cache holds, or a row of the device does."""
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)

    @property
    def pending(self) -> list[int]:
        """The ids that have to be computed."""
        return self.ids[self.computed :]

    @property
    def computed_part(self) -> Computed:
        return Computed(self.way, self.ids[: self.computed], self.cache)

    @property
    def is_free(self) -> bool:
        """Whether a token can be chosen without knowing those before it, and one too many without
        changing what others draw."""
        request, sampling = self.answer.request, self.answer.request.sampling
        if request.shape is not None or sampling.has_penalties or sampling.logprobs is not None:
            return False
        return sampling.temperature == 0 or request.generator is None

    @property
    def is_complete(self) -> bool:
        """Whether a stop text has come, or the answer is all that it may be."""
        shape = self.answer.request.shape
        if shape is not None and shape.is_complete:
            return True
        return self.text is not None and self.text.stopped

    def draw(self, logits: Tensor) -> Tensor:
        """The id of the next token, from logits (V,), if it `is_free`."""
        return sample(logits, self.answer.request.sampling, self.generator)

    def choose(self, logits: Tensor, is_finite: bool) -> Token:
        """The next token, from logits (V,), without its text. Raises UserError if there can be none."""
        if not is_finite:
            raise not_finite()
        request = self.answer.request
        shape, sampling = request.shape, request.sampling
        allowed = logits if shape is None else shape.masked(logits)
        if sampling.is_plain:
            chosen = int(allowed.argmax())
        else:
            prompt, answer = self.ids[: self.num_prompt], self.ids[self.num_prompt :]
            chosen = int(sample(penalised(allowed, sampling, prompt, answer), sampling, self.generator))
        if shape is not None and chosen not in request.stop_ids:
            shape.add(chosen)
        if sampling.logprobs is None:
            return Token(chosen, "")
        own, top = log_probabilities(logits, chosen, sampling.logprobs)
        return Token(chosen, "", own, tuple(top))


def not_finite() -> UserError:
    what = "its weights or configuration are broken, or its dtype is too narrow"
    return UserError(f"the model's logits are not finite: {what}")
