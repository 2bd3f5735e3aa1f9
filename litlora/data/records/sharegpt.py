"""Records with a list of conversations, as ShareGPT has them, and LLaMA-Factory and axolotl after it.
Torch-free."""

from dataclasses import replace
from typing import Any

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record, parsed, quoted
from litlora.data.records.form import RecordForm
from litlora.data.records.messages import ROLES, Spelling, message_list, read_message
from litlora.data.records.tools import read_calls, read_tools

CALL = "function_call"
"""Who speaks where the text is a call, as JSON."""
SPEAKERS = {
    **ROLES,
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", CALL), "assistant"),
    "observation": "tool",
}


FROM_VALUE = Spelling(SPEAKERS, "from", "value")
ROLE_CONTENT = Spelling(SPEAKERS)


class ShareGPTForm(RecordForm):
    """Conversations of from and value, of role and content, or of questions and answers in turn;
    optionally system and tools."""

    name = "sharegpt"
    fields = ("conversations", "system", "tools")
    required = ("conversations",)

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
        entry = {"role": "assistant" if number % 2 else "user", "content": entry}
    spelling = FROM_VALUE if isinstance(entry, dict) and "from" in entry else ROLE_CONTENT
    message = read_message(entry, at, name, record, spelling)
    if entry[spelling.role] != CALL or "tool_calls" in message.more:
        return message
    calls = parsed(message.content, f"{at}.{spelling.content}", record.place)
    calls = read_calls(calls if isinstance(calls, list) else [calls], f"{at}.{spelling.content}", record)
    return replace(message, content="", more={**message.more, "tool_calls": calls})
