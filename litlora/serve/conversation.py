"""A chat: what was said, and how much of it fits the model's context."""

from collections.abc import Iterator
from dataclasses import dataclass

from litlora.console import printable
from litlora.errors import UserError
from litlora.prompts import PromptStyle
from litlora.prompts.template import template_message
from litlora.serve.engine import Engine, Sampling
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import TextStream


class ChatSession:
    """Questions and answers. An answer ends as in training: with the end-of-text token, or with the
    chat template's end of a turn."""

    def __init__(self, engine: Engine, style: PromptStyle, sampling: Sampling) -> None:
        self._engine, self._style, self._sampling = engine, style, sampling
        self._tokenizer = engine.tokenizer
        self._turns: list[_Turn] = []
        self._stop_ids = self._tokenizer.stop_ids | {*taught_stops(self._tokenizer, style)}
        self._generator = sampling.generator(engine.device)
        self.notice: str | None = None
        """What the user must know about the last answer."""

    def clear(self) -> None:
        """Forget what was said."""
        self._turns.clear()

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer as it comes, in whole characters, and remember it, even if it is stopped
        half-way.

        The oldest turns are dropped when the context is full; `notice` says so. Raises UserError,
        and remembers nothing, if the question alone fills the context or is not text.
        """
        if any("\ud800" <= character <= "\udfff" for character in question):
            # What Python makes of a byte that is not UTF-8; the tokenizer would blame its own file.
            raise UserError("the question is not UTF-8 text; send it as UTF-8")
        alone = self._prompt([], question)
        prompt = self._fitting_prompt(question, len(alone))
        answer: list[int] = []
        stream = TextStream(self._tokenizer)
        try:
            for token in self._engine.generate(
                prompt, self._sampling, stop_ids=self._stop_ids, generator=self._generator
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

    def _fitting_prompt(self, question: str, num_alone: int) -> list[int]:
        """The prompt of the question after as many turns as leave room for an answer; the older
        ones are dropped."""
        self.notice = None
        context = self._engine.context
        if num_alone >= context:
            raise UserError(
                f"the question has {num_alone} tokens; the model's context holds {context}, the answer "
                f"included"
            )
        # The answer may take up to a quarter of the context before earlier turns do.
        room = min(self._sampling.max_new_tokens, context - num_alone, max(1, context // 4))
        dropped = 0
        prompt = self._prompt(self._turns, question)
        while self._turns and len(prompt) + room > context:
            self._turns.pop(0)
            dropped += 1
            prompt = self._prompt(self._turns, question)
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self.notice = f"the context is full: the oldest {turns} forgotten"
        return prompt

    def _prompt(self, past: list["_Turn"], question: str) -> list[int]:
        """The token ids of earlier turns and the question."""
        if self._style.template is None:
            asked = self._tokenizer.encode(self._style.render(question, ""), begin=True)
            return [token for turn in past for token in turn.ids] + asked
        messages = []
        for turn in past:
            messages.append(template_message("user", turn.question))
            messages.append(template_message("assistant", turn.answer))
        messages.append(template_message("user", question))
        return self._tokenizer.encode(self._style.template.render(messages))


@dataclass(frozen=True)
class _Turn:
    question: str
    answer: str
    ids: list[int]
    """The question's prompt and the answer, for styles without a chat template."""
