"""Conversations: what every data source is read into. Torch-free."""

from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """Where a conversation was read, for messages."""

    file: str
    record: str
    """Which one in the file: "record 7", "line 8"."""

    def __str__(self) -> str:
        return f"{self.file}, {self.record}"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str
    input: str = ""
    """Alpaca's second field, the text that an instruction is about. It is not part of the content,
    as the style `alpaca` shows it under its own heading."""
    train: bool = False
    """Whether training learns to write this message."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order, and where they were read."""

    messages: tuple[Message, ...]
    place: Place
