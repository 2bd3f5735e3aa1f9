"""A file of prompts or conversations that are to be answered. Torch-free."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.files import entries, find_files
from litlora.data.records.fields import read_record
from litlora.data.records.messages import read_messages
from litlora.data.records.tools import read_tools
from litlora.errors import DataError

ANSWER = ("answer", "finish", "tokens")
"""What is added to a record."""


@dataclass(frozen=True)
class Prompt:
    """A record, and what is asked by it."""

    record: dict[str, Any]
    conversation: Conversation


def read_prompts(path: str) -> list[Prompt]:
    """The records of a file. Raises DataError, naming the place, for one that asks nothing."""
    prompts = [_prompt(value, place) for file in find_files(path).files for place, value in entries(file)]
    if not prompts:
        raise DataError(f"{path}: holds no record; there is nothing to answer")
    return prompts


def _prompt(value: Any, place: Place) -> Prompt:
    if isinstance(value, str):
        value = {"prompt": value}
    record = read_record(value, place, {}, (), ("messages or prompt",))
    if taken := [name for name in ANSWER if name in record.fields]:
        record.wrong(f"has {taken[0]!r} already, where the answer's would be; rename it")
    for name, kept in value.items():  # else the answers would be lost when they are written beside it
        try:
            json.dumps({name: kept}, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            record.wrong(f"{name!r} cannot be written as JSON: {error}")
    fields = record.fields
    asked = [name for name in ("messages", "prompt", "instruction") if fields.get(name) is not None]
    if len(asked) != 1:
        has = ", ".join(map(repr, fields)) or "nothing"
        record.wrong(f"must have one of messages, prompt and instruction; it has {has}")
    messages = _messages(asked[0], record)
    if messages[-1].role == "assistant":
        record.wrong("ends with the assistant's message; what is to be answered comes last")
    system = record.text("system", optional=True)
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Prompt(value, Conversation(tuple(messages), place, read_tools(record)))


def _messages(name: str, record: Any) -> list[Message]:
    if name == "instruction":
        return [Message("user", record.text(name), input=record.text("input", optional=True))]
    if isinstance(record.fields[name], list):
        return read_messages(record.fields[name], name, record)
    said = record.text(name)
    if not said.strip():
        record.wrong(f"its {name} is empty")
    return [Message("user", said)]


def fingerprint(prompts: list[Prompt], facts: dict[str, Any]) -> str:
    """Identifies what is asked, and by what: records, and facts such as settings."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for prompt in prompts:
        digest.update(json.dumps(prompt.record, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
