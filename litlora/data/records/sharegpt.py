"""Records with a list of conversations, as ShareGPT has them, and LLaMA-Factory and axolotl after it.
Torch-free."""

from typing import Any

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record, quoted, text
from litlora.data.records.form import RecordForm
from litlora.data.records.messages import message_list, read_message
from litlora.data.records.tools import read_tools


class ShareGPTForm(RecordForm):
    """Conversations of from and value, of role and content, or of questions and answers in turn;
    optionally system and tools."""

    name = "sharegpt"
    fields = ("conversations", "system", "tools")
    required = ("conversations",)
    has_messages = True

    def conversation(self, record: Record) -> Conversation:
        """The messages as they are; every answer is learned but those that say otherwise."""
        name = record.named("conversations")
        entries = message_list(record.fields["conversations"], name, record)
        messages = [_message(entry, number, name, record) for number, entry in enumerate(entries)]
        return Conversation((*system_message(record, messages), *messages), record.place, read_tools(record))


def system_message(record: Record, messages: list[Message]) -> list[Message]:
    """The message that the record's own field `system` is; none if that is empty, or the first
    message already."""
    system = record.text("system", optional=True)
    if system and messages[0].role == "system":
        if system == messages[0].content:
            return []
        name = quoted(record.named("system"))
        record.wrong(f"has a system message twice: in {name}, and as its first message; keep one of them")
    return [Message("system", system)] if system else []


def _message(entry: Any, number: int, name: str, record: Record) -> Message:
    at = f"{name}[{number}]"
    if isinstance(entry, str):  # LIMA's conversations are bare texts
        is_answer = number % 2 == 1
        return Message("assistant" if is_answer else "user", text(entry, at, record.place), train=is_answer)
    usual = {}
    if isinstance(entry, dict):
        usual |= {"role": "from"} if "from" in entry else {}
        usual |= {"content": "value"} if "value" in entry or (usual and "content" not in entry) else {}
    return read_message(entry, at, name, record, usual)
