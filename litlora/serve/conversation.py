"""A chat: what was said, and how much of it fits the model's context."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from litlora.console import printable
from litlora.data.conversation import Conversation, Message, Place
from litlora.data.encode import Encoder
from litlora.errors import UserError, setting
from litlora.lora.live import BASE, Way
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
        self.engine, self.style = engine, style
        self.way = BASE
        """What answers go through."""
        self.system: str | None = None
        self._tokenizer, self._encoder = engine.tokenizer, Encoder(engine.tokenizer, style)
        self._turns: list[_Turn] = []
        self._stop_ids = self._tokenizer.stop_ids | {*taught_stops(self._tokenizer, style)}
        self.notice: str | None = None
        """What the user must know about the last answer."""
        self.speed: Speed | None = None
        """Of the last answer."""
        self._asked: list[int] = []
        self.sampling = sampling
        if system is not None:
            self.set_system(system)

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn. A new one begins with its seed."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling, self._generator = sampling, sampling.generator(self.engine.device)

    def set_system(self, system: str | None) -> None:
        """Another system message, or none. Raises UserError as the constructor."""
        if system is not None:
            self._check_system(system)
        self.system = system

    def _check_system(self, system: str) -> None:
        _check_text(system, "the system message")
        what = setting("system")
        if not system.strip():
            raise UserError(f"{what}: is empty; leave it out, or say something")
        if self.style.template is None:
            raise UserError(
                f"{what}: the prompt style {self.style.name} has no place for a system message; "
                f"{setting('prompt_style')} chatml, llama3, mistral, gemma and phi have one, as have most "
                "models' own chat templates, but a model answers best in the style that it was trained with"
            )
        prompt = self.style.template.render([_system(system), {"role": "user", "content": "?"}])
        if not shows(prompt, system):
            raise UserError(
                f"{what}: {self.style.template.path}: the chat template leaves out the system message"
            )

    def clear(self) -> None:
        """Forget what was said."""
        self._turns.clear()
        self._asked = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as OpenAI has it, with the system message."""
        said = [] if self.system is None else [_system(self.system)]
        for turn in self._turns:
            said += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer},
            ]
        return said

    def restore(self, messages: Any) -> None:
        """Go on after these messages, in place of what was said. Raises UserError, and changes
        nothing, unless they are a system message, if any, and questions with their answers."""
        ok = isinstance(messages, list) and all(
            isinstance(one, dict) and isinstance(one.get("content"), str) for one in messages
        )
        roles = [one.get("role") for one in messages] if ok else ["?"]
        system = messages[0]["content"] if roles[:1] == ["system"] else None
        turns = [] if not ok else messages[1:] if system is not None else messages
        if not ok or roles[len(roles) - len(turns) :] != ["user", "assistant"] * (len(turns) // 2):
            raise UserError(
                "holds no conversation: an optional system message, and turns of user and assistant"
            )
        for one in turns:
            _check_text(one["content"], "a message")
        self.set_system(system)
        self.clear()
        pairs = zip(turns[::2], turns[1::2], strict=True)
        self._turns = [_Turn(question["content"], answer["content"]) for question, answer in pairs]

    @property
    def last(self) -> tuple[str, str] | None:
        """The last question and its answer."""
        return (self._turns[-1].question, self._turns[-1].answer) if self._turns else None

    @property
    def last_way(self) -> Way | None:
        """What the last answer came through; None if it was loaded."""
        return self._turns[-1].way if self._turns else None

    def move(self, engine: Engine, way: Way) -> None:
        """Go on with another engine of the same model, whose `way` gave the answers so far."""
        for turn in self._turns:
            turn.way = turn.way and way
        self.engine, self.way = engine, way

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer as it comes, in whole characters, and remember it, even if it is stopped
        half-way.

        The oldest turns are dropped when the context is full; `notice` says so. Raises UserError,
        and remembers nothing, if the question alone fills the context or is not text.
        """
        _check_text(question, "the question")
        self._asked = self._fitting_prompt(question)
        yield from self._remembered(question)

    def _remembered(self, question: str, again: bool = False) -> Iterator[str]:
        """The answer; `again`: in place of the last turn."""
        if again:
            self._turns.pop()
        answer: list[int] = []
        way = self.way
        try:
            yield from self._answered(answer, self.engine, way)
        finally:
            self._turns.append(_Turn(question, self._tokenizer.decode(answer), way))

    def retry(self) -> Iterator[str]:
        """Ask the last question again, in place of what was answered. Raises UserError, and forgets
        nothing, if there is none or if it fills the context."""
        question, _ = self._last()
        self._ask_last()
        return self._remembered(question, again=True)

    def compare(self, way: Way) -> Iterator[str]:
        """What the last question's answer would be another way; it is not remembered."""
        self._last()
        self.notice = None
        if not self._asked:  # a conversation that was loaded
            self._ask_last()
        return self._answered([], self.engine, way)

    def _ask_last(self) -> None:
        """The prompt of the last question, once more."""
        turn = self._turns.pop()
        try:
            self._asked = self._fitting_prompt(turn.question)
        finally:
            self._turns.append(turn)

    def _last(self) -> tuple[str, str]:
        if self.last is None:
            raise UserError("there is no question yet")
        return self.last

    def _answered(self, answer: list[int], engine: Engine, way: Way) -> Iterator[str]:
        """The text after `_asked`; its ids are added to `answer`."""
        stream, first = TextStream(self._tokenizer), None
        self.speed = None
        try:
            for token in engine.generate(
                self._asked, self._sampling, stop_ids=self._stop_ids, generator=self._generator, way=way
            ):
                first = first or time.perf_counter()
                answer.append(token)
                if piece := stream.push(token):
                    yield printable(piece)
            if piece := stream.finish():
                yield printable(piece)
        finally:
            if first is not None and len(answer) > 1:
                self.speed = Speed(len(answer), (len(answer) - 1) / (time.perf_counter() - first))

    def _fitting_prompt(self, question: str) -> list[int]:
        """The prompt of the question after as many turns as leave room for an answer; the older
        ones are dropped."""
        self.notice = None
        context, num_alone = self.engine.context, len(self._prompt([], question))
        if num_alone >= context:
            raise UserError(
                f"the question{' with the system message' if self.system else ''} has {num_alone} tokens; "
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
        if self.style.template is None:
            asked = self._tokenizer.encode(self.style.render(question, ""), begin=True)
            return [token for turn in past for token in self._ids(turn)] + asked
        messages = [] if self.system is None else [_system(self.system)]
        for turn in past:
            messages.append(template_message("user", turn.question))
            messages.append(template_message("assistant", turn.answer))
        messages.append(template_message("user", question))
        return self._tokenizer.encode(self.style.template.render(messages))

    def _ids(self, turn: "_Turn") -> list[int]:
        """A turn in token ids, in a style without a chat template."""
        if turn.ids is None:
            messages = Message("user", turn.question), Message("assistant", turn.answer, train=True)
            (encoded,) = self._encoder.encode([Conversation(messages, Place("chat", "this turn"))])
            turn.ids = encoded.drafts[-1].ids
        return turn.ids


class Speed(NamedTuple):
    """How fast an answer came."""

    num_tokens: int
    per_second: float
    """Tokens, from the first one on."""

    @property
    def text(self) -> str:
        """For people."""
        rate = f"{self.per_second:.3g}" if self.per_second < 1000 else f"{self.per_second:,.0f}"
        return f"({self.num_tokens} tokens, {rate} tokens/s)"


@dataclass
class _Turn:
    question: str
    answer: str
    way: Way | None = None
    """What the answer came through, if that is known."""
    ids: list[int] | None = None
    """Its token ids, once they are needed."""


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _check_text(text: str, what: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        # What Python makes of a byte that is not UTF-8; the tokenizer would blame its own file.
        raise UserError(f"{what} is not UTF-8 text; send it as UTF-8")
