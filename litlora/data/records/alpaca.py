"""Records of Alpaca's form: instruction, input and output, and LLaMA-Factory's system and history.
Torch-free."""

from collections.abc import Iterator

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record, quoted, text
from litlora.data.records.form import RecordForm


class AlpacaForm(RecordForm):
    """Instruction and output; optionally input, system and history."""

    name = "alpaca"
    fields = ("instruction", "input", "output", "system", "history")
    required = ("instruction", "output")

    def conversation(self, record: Record) -> Conversation:
        """System message, earlier turns, and the instruction with its output; every answer is
        learned."""
        system = record.text("system", optional=True)
        messages = [Message("system", system)] if system else []
        for question, answer in _history(record):
            messages += [Message("user", question), Message("assistant", answer, train=True)]
        messages.append(
            Message("user", record.text("instruction"), input=record.text("input", optional=True))
        )
        messages.append(Message("assistant", record.text("output"), train=True))
        return Conversation(tuple(messages), record.place)


def _history(record: Record) -> Iterator[tuple[str, str]]:
    """The pairs of an earlier question and its answer."""
    value, name = record.fields.get("history"), quoted(record.named("history"))
    if value is None:
        return
    if not isinstance(value, list):
        record.wrong(f"{name} must be a list of [question, answer] pairs, not {type(value).__name__}")
    for number, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            what = f"a list of {len(pair)}" if isinstance(pair, list) else type(pair).__name__
            record.wrong(f"{name} must be a list of [question, answer] pairs; its entry {number} is {what}")
        question, answer = (text(part, f"{name}, entry {number}", record.place) for part in pair)
        yield question, answer
