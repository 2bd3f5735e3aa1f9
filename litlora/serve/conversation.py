"""A conversation with a model: what was said, and what of it fits the context."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from litlora.console import printable
from litlora.errors import UserError
from litlora.model import GPT
from litlora.prompts import PromptStyle
from litlora.serve.engine import generate
from litlora.settings import Chat
from litlora.tokenizer import TextStream, Tokenizer


class Conversation:
    """Questions and answers, each answer ended as in training: by the end-of-text token, or as the
    chat template does."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, style: PromptStyle, settings: Chat) -> None:
        self._model, self._tokenizer, self._style, self._settings = model, tokenizer, style, settings
        self._turns: list[_Turn] = []
        end = tokenizer.turn_end(style.template.ending) if style.template is not None else None
        self._stop_ids = tokenizer.stop_ids | ({end} if end is not None else set())
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
        """Yield the answer as it comes, in whole characters, and remember it, also when it is
        stopped half-way.

        The oldest turns are dropped when the context is full; `notice` says so. Raises UserError,
        and remembers nothing, if the question alone fills the context.
        """
        self.notice = None
        alone = self._prompt([], question)
        context = self._model.config.max_position_embeddings
        if len(alone) >= context:
            raise UserError(
                f"the question has {len(alone)} tokens; the model's context holds {context}, the answer included"
            )
        room = min(
            self._settings.max_new_tokens, context - len(alone), max(1, context // 4)
        )  # for the answer, before the past
        dropped = 0
        prompt = self._prompt(self._turns, question)
        while self._turns and len(prompt) + room > context:
            self._turns.pop(0)
            dropped += 1
            prompt = self._prompt(self._turns, question)
        if dropped:
            self.notice = f"the context is full: the oldest {dropped} turn(s) were forgotten"
        answer: list[int] = []
        stream = TextStream(self._tokenizer)
        try:
            for token in generate(
                self._model,
                prompt,
                max_new_tokens=self._settings.max_new_tokens,
                stop_ids=self._stop_ids,
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
            self._turns.append(
                _Turn(question, self._tokenizer.decode(answer), [*alone, *answer, self._tokenizer.eos_id])
            )

    def _prompt(self, past: list["_Turn"], question: str) -> list[int]:
        """Token ids of what was said and the question."""
        if self._style.template is None:
            return [token for turn in past for token in turn.ids] + self._tokenizer.encode(
                self._style.render(question, ""), begin=True
            )
        said = [
            (role, text)
            for turn in past
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        messages = [{"role": role, "content": text} for role, text in (*said, ("user", question))]
        return self._tokenizer.encode(self._style.template.render(messages))


@dataclass(frozen=True)
class _Turn:
    question: str
    answer: str
    ids: list[int]
    """The prompt of the question and the answer, as they stand without a chat template."""
