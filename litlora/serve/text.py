"""The text of an answer, token by token, up to a text that ends it. Torch-free."""

from collections.abc import Sequence

from litlora.tokenizer import TextStream, Tokenizer, push_each


class AnswerText:
    """The text of one answer. What may be the beginning of a stop text is held back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stream = TextStream(tokenizer)
        self.stopped = False
        """Whether one of the stop texts has come."""
        self._stops, self._held = stops, ""

    def add(self, text: str) -> str:
        """What can be shown after more text has come."""
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        kept = max(_begun(self._held, stop) for stop in self._stops)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        if self.stopped:
            return ""
        shown = self.add(self.stream.finish())
        return shown if self.stopped else shown + self._held


def add_each(added: list[tuple[AnswerText | None, int]]) -> list[str]:
    """What can be shown of each text after one more token; nothing of an answer without one."""
    texts = [(text, token) for text, token in added if text is not None]
    if not texts:
        return [""] * len(added)
    pieces = push_each([text.stream for text, _ in texts], [token for _, token in texts])
    shown = iter([text.add(piece) for (text, _), piece in zip(texts, pieces, strict=True)])
    return ["" if text is None else next(shown) for text, _ in added]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
