"""A conversation with a model: what was said, and what of it fits the context."""

from collections.abc import Iterator

import torch

from litlora.errors import UserError
from litlora.generate import generate
from litlora.model import GPT
from litlora.prompts import PromptStyle
from litlora.settings import Chat
from litlora.tokenizer import TextStream, Tokenizer


class Conversation:
    """Questions and answers, each answer ended by the end-of-text token, as in training."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, style: PromptStyle, settings: Chat) -> None:
        self._model, self._tokenizer, self._style, self._settings = model, tokenizer, style, settings
        self._turns: list[list[int]] = []
        """Token ids of each past question with its answer."""
        self._generator = torch.Generator(model.model.embed_tokens.weight.device)
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)
        self.notice: str | None = None
        """What there is to say about the last answer."""

    def clear(self) -> None:
        """Forget what was said."""
        self._turns.clear()

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer as it comes, in whole characters, and remember it, also when it is stopped half-way.

        The oldest turns are dropped when the context is full; `notice` says so. Raises UserError, and remembers nothing, if
        the question alone fills the context.
        """
        self.notice = None
        prompt = self._tokenizer.encode(self._style.render(question, ""), begin=True)
        context = self._model.config.max_position_embeddings
        if len(prompt) >= context:
            raise UserError(f"the question has {len(prompt)} tokens; the model's context holds {context}, the answer included")
        room = min(self._settings.max_new_tokens, context - len(prompt), max(1, context // 4))  # for the answer, before the past
        dropped = 0
        while self._turns and sum(map(len, self._turns)) + len(prompt) + room > context:
            self._turns.pop(0)
            dropped += 1
        if dropped:
            self.notice = f"the context is full: the oldest {dropped} turn(s) were forgotten"
        answer: list[int] = []
        stream = TextStream(self._tokenizer)
        try:
            for token in generate(
                self._model,
                [token for turn in self._turns for token in turn] + prompt,
                max_new_tokens=self._settings.max_new_tokens,
                stop_ids=self._tokenizer.stop_ids,
                temperature=self._settings.temperature,
                top_k=self._settings.top_k,
                top_p=self._settings.top_p,
                generator=self._generator,
            ):
                answer.append(token)
                if piece := stream.push(token):
                    yield printable(piece)
            if piece := stream.finish():
                yield printable(piece)
        finally:
            self._turns.append([*prompt, *answer, self._tokenizer.eos_id])


def printable(text: str) -> str:
    """Text without control characters but newline and tab: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
