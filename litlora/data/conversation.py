"""Conversations: what every data source is read into. Torch-free."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a conversation was read, for messages."""

    file: str
    record: str
    """Which one in the file: "record 7", "line 8", "row 9"."""

    def __str__(self) -> str:
        return f"{self.file}, {self.record}"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """"system", "user", "assistant" or "tool"; or "text", a document that stands alone."""
    content: str
    input: str = ""
    """Alpaca's second field, the text that an instruction is about. It is not part of the content,
    as the style `alpaca` shows it under its own heading."""
    train: bool = False
    """Whether training learns to write this message."""
    more: dict[str, Any] = field(default_factory=dict)
    """What else a chat template is given of the message, as in OpenAI's form: tool_calls,
    tool_call_id, name, reasoning_content."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order, and where they were read."""

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[dict[str, Any], ...] = ()
    """The functions that the assistant may call, as JSON schemas in OpenAI's form."""


def is_document(conversation: Conversation) -> bool:
    """Whether it is a text that stands alone, and not a conversation."""
    return [message.role for message in conversation.messages] == ["text"]
