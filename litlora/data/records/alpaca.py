"""Records of Alpaca's form: instruction, input and output, and LLaMA-Factory's system and history.
Torch-free."""

from collections.abc import Iterator
from typing import Any

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.records.fields import text
from litlora.data.records.form import RecordForm
from litlora.errors import DataError


class AlpacaForm(RecordForm):
    """Instruction and output; optionally input, system and history."""

    name = "alpaca"
    fields = ("instruction", "input", "output", "system", "history")
    required = ("instruction", "output")

    def conversation(self, fields: dict[str, Any], place: Place) -> Conversation:
        """System message, earlier turns, and the instruction with its output; every answer is
        learned."""

        def content(name: str) -> str:
            value = fields.get(name)
            return "" if value is None and name not in self.required else text(value, f'"{name}"', place)

        messages = [Message("system", system)] if (system := content("system")) else []
        for question, answer in _history(fields.get("history"), place):
            messages += [Message("user", question), Message("assistant", answer, train=True)]
        messages.append(Message("user", content("instruction"), input=content("input")))
        messages.append(Message("assistant", content("output"), train=True))
        return Conversation(tuple(messages), place)


def _history(value: Any, place: Place) -> Iterator[tuple[str, str]]:
    """The pairs of an earlier question and its answer."""
    if value is None:
        return
    if not isinstance(value, list):
        raise DataError(
            f'{place}: "history" must be a list of [question, answer] pairs, not {type(value).__name__}'
        )
    for number, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            what = f"a list of {len(pair)}" if isinstance(pair, list) else type(pair).__name__
            raise DataError(
                f'{place}: "history" must be a list of [question, answer] pairs; its entry {number} is {what}'
            )
        question, answer = (text(part, f'"history", entry {number}', place) for part in pair)
        yield question, answer
