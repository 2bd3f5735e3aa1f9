"""Records with a list of messages, as OpenAI has them. Torch-free."""

from collections.abc import Mapping
from typing import Any

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import (
    MESSAGE_FIELDS,
    THOUGHTS,
    Record,
    in_yaml,
    mapping,
    parsed,
    quoted,
    some,
    text,
)
from litlora.data.records.form import RecordForm
from litlora.data.records.tools import read_call, read_calls, read_tools
from litlora.errors import setting

CALL = "function_call"
"""Who speaks where the text is a call, as JSON."""
SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    CALL: CALL,
}
"""Who may speak, in capitals too, and what role that is here."""
ROLES = tuple(dict.fromkeys(SPEAKERS.values()))
USUAL = {
    "role": ("role", "from", "speaker", "author", "sender", "participant"),
    "content": ("content", "value", "text", "message", "utterance", "body"),
}
"""What other files call the two fields of every message."""


class MessagesForm(RecordForm):
    """OpenAI's messages, with tools."""

    name = "messages"
    fields = ("messages", "tools", "functions")
    required = ("messages",)
    has_messages = True

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
        read_message(message, f"{name}[{number}]", name, record)
        for number, message in enumerate(message_list(value, name, record))
    ]


def message_list(value: Any, name: str, record: Record) -> list[Any]:
    """A value that must be a list with something in it."""
    if not isinstance(value, list):
        record.wrong(f"{quoted(name)} must be a list of messages, not {type(value).__name__}")
    if not value:
        record.wrong(f"{quoted(name)} holds no message; there is nothing to learn")
    return value


def read_message(
    value: Any, at: str, path: str, record: Record, usual: Mapping[str, str] | None = None
) -> Message:
    """One message. `at` is where it stands, and `path` what `ignore` calls that place; `usual` is what
    the form calls fields of it, where `columns` says nothing else."""
    theirs = {**(usual or {}), **record.columns}
    names = {name: theirs.get(name, name) for name in MESSAGE_FIELDS}
    fields = record.used(mapping(value, at, record.place), tuple(names.values()), path)
    if names["role"] not in fields:
        has = some([quoted(name) for name in value]) or "nothing"
        record.wrong(f"{at} has no {names['role']}; it has {has}{_other_names(value, record)}")
    spoken = _role(fields[names["role"]], f"{at}.{names['role']}", record)
    role = "assistant" if spoken == CALL else spoken
    more = _more(fields, role, at, names, record)
    content, where = "", f"{at}.{names['content']}"
    if names["content"] in fields:
        content = read_content(fields[names["content"]], where, f"{path}.{names['content']}", record)
    elif "tool_calls" not in more:  # with them, content may be null
        missing = "is null" if names["content"] in value else "is missing"
        hint = "" if names["content"] in value else _other_names(value, record)
        record.wrong(f"{where} {missing}; only a message with tool_calls may have none{hint}")
    if spoken == CALL and "tool_calls" not in more:
        calls = parsed(content, where, record.place)
        more["tool_calls"] = read_calls(calls if isinstance(calls, list) else [calls], where, record)
        content = ""
    return Message(role, content, train=_is_learned(fields, role, at, names, record), more=more)


def likely_names(message: Mapping[str, Any]) -> dict[str, str]:
    """What a message that is spelled in another way seems to call its role and its content; NAME
    where its fields do not tell."""
    texts = {name: value for name, value in message.items() if isinstance(value, str)}
    known = next((name for name, value in texts.items() if value.lower() in SPEAKERS), None)
    role = known or next((name for name in USUAL["role"] if name in texts), "NAME")
    others = [name for name in texts if name != role]
    alone = others[0] if len(others) == 1 and role != "NAME" else "NAME"
    return {"role": role, "content": next((name for name in USUAL["content"] if name in others), alone)}


def _other_names(message: Mapping[str, Any], record: Record) -> str:
    """The end of an error: which columns would name the two fields."""
    names = {name: theirs for name, theirs in likely_names(message).items() if theirs != name}
    if not names:
        return ""
    return f"; if these have other names: {setting('columns')} '{in_yaml({**record.columns, **names})}'"


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


def _role(value: Any, at: str, record: Record) -> str:
    if not isinstance(value, str):
        record.wrong(f"{at} is {type(value).__name__}; known are {', '.join(SPEAKERS)}")
    role = record.roles.get(value)
    if role is None:
        known = {**SPEAKERS, **{name.lower(): role for name, role in record.roles.items()}}
        role = known.get(value.lower())
    if role is None:
        record.wrong(
            f"{at} is {quoted(value)}; known are {', '.join({**SPEAKERS, **record.roles})}; if it is one of "
            f"them by another name: {setting('roles')} '{in_yaml({**record.roles, value: 'ROLE'})}'"
        )
    return role


def _more(
    fields: dict[str, Any], role: str, at: str, names: Mapping[str, str], record: Record
) -> dict[str, Any]:
    """What a chat template is given beside role and content."""
    more: dict[str, Any] = {}
    listed, single = names["tool_calls"], names["function_call"]
    calls = read_calls(fields.get(listed, []), f"{at}.{listed}", record)
    if single in fields:
        if calls:
            record.wrong(f"{at} has both {listed} and {single}; keep one of them")
        calls = [read_call(fields[single], f"{at}.{single}", record)]
    if calls:
        more["tool_calls"] = calls
    for name in ("name", "tool_call_id", *THOUGHTS):
        if names[name] in fields:
            more[name] = text(fields[names[name]], f"{at}.{names[name]}", record.place)
    for name in ("tool_calls", *THOUGHTS):
        if name in more and role != "assistant":
            record.wrong(f"{at} has {names[name]}, which only an assistant's message has; its role is {role}")
    return more


def _is_learned(fields: dict[str, Any], role: str, at: str, names: Mapping[str, str], record: Record) -> bool:
    train, weight = fields.get(names["train"]), fields.get(names["weight"])
    if train is not None and not isinstance(train, bool):
        record.wrong(f"{at}.{names['train']} must be true or false, not {type(train).__name__}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        record.wrong(f"{at}.{names['weight']} must be 0 or 1: a message is learned or not")
    if role != "assistant":
        if train or weight:
            record.wrong(f"{at} is to be learned, but its role is {role}: only the assistant's are")
        return False
    return train is not False and weight != 0
