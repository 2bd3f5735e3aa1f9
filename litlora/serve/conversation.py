"""A chat: what was said, and how much of it fits the model's context."""

from collections.abc import Iterator
from dataclasses import dataclass

from litlora.console import printable
from litlora.data.conversation import Conversation, Message, Place
from litlora.data.encode import Encoder
from litlora.errors import UserError, setting
from litlora.prompts import PromptStyle
from litlora.prompts.template import shows, template_message
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.stop_tokens import taught_stops
from litlora.tokenizer import TextStream


class ChatSession:
    """Questions and answers, after a system message if there is one. An answer ends as in training:
    with the end-of-text token, or with the chat template's end of a turn. The token ids of what was
    said are those that training has of it."""

    def __init__(
        self, engine: Engine, style: PromptStyle, sampling: Sampling, system: str | None = None
    ) -> None:
        """Raises UserError if the style has no place for a system message."""
        self._engine, self._style, self._sampling = engine, style, sampling
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._tokenizer, self._encoder = engine.tokenizer, Encoder(engine.tokenizer, style)
        self._turns: list[_Turn] = []
        self._stop_ids = self._tokenizer.stop_ids | {*taught_stops(self._tokenizer, style)}
        self._generator = sampling.generator(engine.device)
        self.notice: str | None = None
        """What the user must know about the last answer."""
        if system is not None:
            self._check_system(system)

    def _check_system(self, system: str) -> None:
        _check_text(system, "the system message")
        what = setting("system")
        if not system.strip():
            raise UserError(f"{what}: is empty; leave it out, or say something")
        if self._style.template is None:
            raise UserError(
                f"{what}: the prompt style {self._style.name} has no place for a system message; "
                f"{setting('prompt_style')} chatml, llama3, mistral, gemma and phi have one, as have most "
                "models' own chat templates, but a model answers best in the style that it was trained with"
            )
        prompt = self._style.template.render([*self._system, {"role": "user", "content": "?"}])
        if not shows(prompt, system):
            raise UserError(
                f"{what}: {self._style.template.path}: the chat template leaves out the system message"
            )

    def clear(self) -> None:
        """Forget what was said."""
        self._turns.clear()

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer as it comes, in whole characters, and remember it, even if it is stopped
        half-way.

        The oldest turns are dropped when the context is full; `notice` says so. Raises UserError,
        and remembers nothing, if the question alone fills the context or is not text.
        """
        _check_text(question, "the question")
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
            self._turns.append(_Turn(question, self._tokenizer.decode(answer)))

    def _fitting_prompt(self, question: str, num_alone: int) -> list[int]:
        """The prompt of the question after as many turns as leave room for an answer; the older
        ones are dropped."""
        self.notice = None
        context = self._engine.context
        if num_alone >= context:
            raise UserError(
                f"the question{' with the system message' if self._system else ''} has {num_alone} tokens; "
                f"the model's context holds {context}, the answer included"
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
            return [token for turn in past for token in self._ids(turn)] + asked
        messages = list(self._system)
        for turn in past:
            messages.append(template_message("user", turn.question))
            messages.append(template_message("assistant", turn.answer))
        messages.append(template_message("user", question))
        return self._tokenizer.encode(self._style.template.render(messages))

    def _ids(self, turn: "_Turn") -> list[int]:
        """A turn in token ids, in a style without a chat template."""
        if turn.ids is None:
            messages = Message("user", turn.question), Message("assistant", turn.answer, train=True)
            (encoded,) = self._encoder.encode([Conversation(messages, Place("chat", "this turn"))])
            turn.ids = encoded.drafts[-1].ids
        return turn.ids


@dataclass
class _Turn:
    question: str
    answer: str
    ids: list[int] | None = None
    """Its token ids, once they are needed."""


def _check_text(text: str, what: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        # What Python makes of a byte that is not UTF-8; the tokenizer would blame its own file.
        raise UserError(f"{what} is not UTF-8 text; send it as UTF-8")
