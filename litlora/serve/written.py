"""Answers in OpenAI's form, whole or in chunks. Torch-free."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from litlora.serve.answer import Answer, Token
from litlora.serve.asked import Asked
from litlora.serve.calls import Form, openai_calls
from litlora.tokenizer import Tokenizer

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", None: "stop"}


class Written(ABC):
    """The answers to one request, and how they are written."""

    kind: str
    """Of the object, and of a chunk of it, """
    chunk_kind: str
    prefix: str
    """and what its id begins with."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.tokenizer: Tokenizer | None = None
        self.tokens: dict[int, list[Token]] = {}
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}

    def add(self, number: int, token: Token | None) -> None:
        """One more token of an answer; None at its end."""
        if token is not None:
            self.tokens.setdefault(number, []).append(token)

    def text(self, number: int) -> str:
        """An answer's text so far."""
        return "".join(token.text for token in self.tokens.get(number, ()))

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """All of it."""
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        head = {**self._head, "object": self.kind, "model": self.asked.model}
        return {**head, "choices": choices, "usage": usage(answers, self.asked.n)}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A part of a stream."""
        head = {**self._head, "object": self.chunk_kind, "model": self.asked.model}
        return {**head, "choices": choices, **more}

    def usage_chunk(self, answers: list[Answer]) -> dict[str, Any]:
        """The last part, if it is asked for."""
        return self.chunk([], usage=usage(answers, self.asked.n))

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        """What comes before the first token."""
        return iter(())

    @abstractmethod
    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        """An answer."""

    @abstractmethod
    def chunks(self, number: int, token: Token | None, answer: Answer) -> Iterator[dict[str, Any]]:
        """What to send for a token, or for the end of an answer."""

    def names(self, tokens: list[Token]) -> dict[int, str]:
        """The text of each token that a list of log probabilities names."""
        ids = {entry.id for token in tokens if token.logprob for entry in (token.logprob, *token.top)}
        ordered = sorted(ids)
        return dict(zip(ordered, self.tokenizer.decode_batch([[one] for one in ordered]), strict=True))


class Chat(Written):
    """/v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: Asked, calls: Form | None) -> None:
        """`calls`: how the model writes calls of tools, if it has some and that is known."""
        super().__init__(asked)
        self.calls = calls

    def _said(self, number: int) -> tuple[str, list[dict[str, Any]]]:
        text = self.text(number)
        said, calls = self.calls.read(text) if self.calls else (text, [])
        return said, openai_calls(calls)

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        said, calls = self._said(number)
        message = {"role": "assistant", "content": said or None if calls else said, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        finish = "tool_calls" if calls else FINISH[answer.finish]
        logprobs = self._logprobs(self.tokens.get(number, []))
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, count: int) -> Iterator[dict[str, Any]]:
        for number in range(count):
            yield self._delta(number, {"role": "assistant", "content": ""})

    def _delta(
        self, number: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self.chunk([choice])

    def chunks(self, number: int, token: Token | None, answer: Answer) -> Iterator[dict[str, Any]]:
        if token is not None:
            logprobs = self._logprobs([token])
            if self.calls is None and (token.text or logprobs):
                yield self._delta(number, {"content": token.text}, logprobs=logprobs)
            return
        if self.calls is None:
            yield self._delta(number, {}, FINISH[answer.finish])
            return
        # Whether it calls a tool is known at the end.
        said, calls = self._said(number)
        if said:
            yield self._delta(number, {"content": said})
        if calls:
            indexed = [{"index": index, **call} for index, call in enumerate(calls)]
            yield self._delta(number, {"tool_calls": indexed})
        yield self._delta(number, {}, "tool_calls" if calls else FINISH[answer.finish])

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.asked.sampling.logprobs is None:
            return None
        names = self.names(tokens)

        def entry(found: Any) -> dict[str, Any]:
            name = names[found.id]
            is_whole = "\ufffd" not in name  # else it is a part of a character
            return {
                "token": name,
                "logprob": found.value,
                "bytes": [*name.encode()] if is_whole else None,
            }

        return {
            "content": [
                {**entry(token.logprob), "top_logprobs": [entry(one) for one in token.top]}
                for token in tokens
                if token.logprob is not None
            ],
            "refusal": None,
        }


class Completion(Written):
    """/v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        tokens = self.tokens.get(number, [])
        return self._choice(number, self.text(number), FINISH[answer.finish], tokens)

    def chunks(self, number: int, token: Token | None, answer: Answer) -> Iterator[dict[str, Any]]:
        if token is None:
            yield self.chunk([self._choice(number, "", FINISH[answer.finish], [])])
        elif token.text or self.asked.sampling.logprobs is not None:
            yield self.chunk([self._choice(number, token.text, None, [token])])

    def _choice(self, number: int, text: str, finish: str | None, tokens: list[Token]) -> dict[str, Any]:
        logprobs = None
        if self.asked.sampling.logprobs is not None:
            names, kept = self.names(tokens), [token for token in tokens if token.logprob is not None]
            logprobs = {
                "tokens": [names[token.logprob.id] for token in kept],
                "token_logprobs": [token.logprob.value for token in kept],
                "top_logprobs": [{names[one.id]: one.value for one in token.top} for token in kept],
            }
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


def usage(answers: list[Answer], n: int) -> dict[str, Any]:
    """What was computed. A prompt with n answers counts once."""
    prompt = sum(len(answer.request.prompt) for answer in answers[::n])
    written = sum(answer.num_tokens for answer in answers)
    reused = sum(answer.num_reused for answer in answers[::n])
    total = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return {**total, "prompt_tokens_details": {"cached_tokens": reused}}
