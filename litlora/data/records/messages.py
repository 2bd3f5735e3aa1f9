"""Records with a list of messages, as OpenAI has them. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record, mapping, quoted, some, text
from litlora.data.records.form import RecordForm
from litlora.data.records.tools import read_call, read_calls, read_tools

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""OpenAI's roles, and what they are here."""
THOUGHTS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class Spelling:
    """How messages are written."""

    roles: Mapping[str, str]
    """Who may speak, and what role that is here."""
    role: str = "role"
    content: str = "content"
    """The two fields of every message."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of a message that are used."""
        calls = ("name", "tool_calls", "function_call", "tool_call_id")
        return (self.role, self.content, *calls, *THOUGHTS, "train", "weight")


OPENAI = Spelling(ROLES)


class MessagesForm(RecordForm):
    """OpenAI's messages, with tools."""

    name = "messages"
    fields = ("messages", "tools", "functions")
    required = ("messages",)

    def conversation(self, record: Record) -> Conversation:
        """The messages as they are; every answer is learned but those that say otherwise."""
        tools, functions = read_tools(record), read_tools(record, "functions")
        if tools and functions:
            record.wrong("has both tools and functions, which are the same; keep one of them")
        messages = read_messages(record.fields["messages"], record.named("messages"), record)
        return Conversation(tuple(messages), record.place, tools or functions)


def read_messages(value: Any, name: str, record: Record) -> list[Message]:
    """The messages in the record's field `name`."""
    return [
        read_message(message, f"{name}[{number}]", name, record, OPENAI)
        for number, message in enumerate(message_list(value, name, record))
    ]


def message_list(value: Any, name: str, record: Record) -> list[Any]:
    """A value that must be a list with something in it."""
    if not isinstance(value, list):
        record.wrong(f"{quoted(name)} must be a list of messages, not {type(value).__name__}")
    if not value:
        record.wrong(f"{quoted(name)} holds no message; there is nothing to learn")
    return value


def read_message(value: Any, at: str, path: str, record: Record, spelling: Spelling) -> Message:
    """One message. `at` is where it stands, and `path` what `ignore` calls that place."""
    fields = record.used(mapping(value, at, record.place), spelling.fields, path)
    if spelling.role not in fields:
        has = some([quoted(name) for name in value]) or "nothing"
        record.wrong(f"{at} has no {spelling.role}; it has {has}")
    role = _role(fields[spelling.role], f"{at}.{spelling.role}", record, spelling.roles)
    more = _more(fields, role, at, record)
    where = f"{at}.{spelling.content}"
    if spelling.content in fields:
        content = read_content(fields[spelling.content], where, f"{path}.{spelling.content}", record)
    elif "tool_calls" in more:
        content = ""  # OpenAI's null
    else:
        missing = "is null" if spelling.content in value else "is missing"
        record.wrong(f"{where} {missing}; only a message with tool_calls may have none")
    return Message(role, content, train=_is_learned(fields, role, at, record), more=more)


def read_content(value: Any, at: str, path: str, record: Record) -> str:
    """Text, or a list of text parts, which follow one another without anything in between."""
    if not isinstance(value, list):
        return text(value, at, record.place)
    texts = []
    for number, part in enumerate(value):
        part = mapping(part, f"{at}[{number}]", record.place)
        kind = part.get("type")
        if kind != "text":
            record.wrong(f"{at}[{number}] is of type {quoted(kind)}; only text can be trained on")
        part = record.used(part, ("type", "text"), path)
        texts.append(text(part.get("text"), f"{at}[{number}].text", record.place))
    return "".join(texts)


def _role(value: Any, at: str, record: Record, roles: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in roles:
        shown = quoted(value) if isinstance(value, str) else type(value).__name__
        record.wrong(f"{at} is {shown}; known are {', '.join(roles)}")
    return roles[value]


def _more(fields: dict[str, Any], role: str, at: str, record: Record) -> dict[str, Any]:
    """What a chat template is given beside role and content."""
    more: dict[str, Any] = {}
    calls = read_calls(fields.get("tool_calls", []), f"{at}.tool_calls", record)
    if "function_call" in fields:
        if calls:
            record.wrong(f"{at} has both tool_calls and function_call; keep one of them")
        calls = [read_call(fields["function_call"], f"{at}.function_call", record)]
    if calls:
        more["tool_calls"] = calls
    for name in ("name", "tool_call_id", *THOUGHTS):
        if name in fields:
            more[name] = text(fields[name], f"{at}.{name}", record.place)
    for name in ("tool_calls", *THOUGHTS):
        if name in more and role != "assistant":
            record.wrong(f"{at} has {name}, which only an assistant's message has; its role is {role}")
    return more


def _is_learned(fields: dict[str, Any], role: str, at: str, record: Record) -> bool:
    train, weight = fields.get("train"), fields.get("weight")
    if train is not None and not isinstance(train, bool):
        record.wrong(f"{at}.train must be true or false, not {type(train).__name__}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        record.wrong(f"{at}.weight must be 0 or 1: a message is learned or not")
    if role != "assistant":
        if train or weight:
            record.wrong(f"{at} is to be learned, but its role is {role}: only the assistant's are")
        return False
    return train is not False and weight != 0
