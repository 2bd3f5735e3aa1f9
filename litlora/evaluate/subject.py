"""The model that is measured, and how it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from litlora.data.encode import Encoder
from litlora.model import LanguageModel
from litlora.prompts import PromptStyle
from litlora.serve.answer import Request, Token
from litlora.serve.engine import Engine, Sampling
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, its tokenizer and its prompt style."""

    model: LanguageModel
    tokenizer: Tokenizer
    style: PromptStyle
    batch_tokens: int = 4096
    """Tokens that are computed at a time."""

    @property
    def context(self) -> int:
        return self.model.config.max_position_embeddings

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.style)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Where an answer ends, as in chat."""
        return self.tokenizer.stop_ids | {*taught_stops(self.tokenizer, self.style)}

    def answers(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        """What the model says after each prompt, in token ids: the likeliest token each time."""
        sampling = Sampling(max_new_tokens=max_new_tokens)
        found = self.asked(
            [
                Request(prompt=prompt, sampling=sampling, stop_ids=self.stop_ids, text=False)
                for prompt in prompts
            ]
        )
        return [self.tokenizer.decode([token.id for token in tokens]) for tokens in found]

    def asked(self, requests: Sequence[Request]) -> list[list[Token]]:
        """The answers to requests, which are computed in batches."""
        engine = Engine(self.model, self.tokenizer)
        answers = [engine.submit(request) for request in requests]
        while engine.step():
            pass
        return [[*iter(answer.take, None)] for answer in answers]
