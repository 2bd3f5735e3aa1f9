"""Records of two answers to one prompt, of which one was preferred. Torch-free."""

from dataclasses import replace
from typing import NamedTuple, NoReturn

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record
from litlora.data.records.form import RecordForm
from litlora.data.records.messages import read_messages
from litlora.data.records.prompt_completion import completed
from litlora.data.records.tools import read_tools
from litlora.errors import setting


class Pair(NamedTuple):
    """The same prompt with either answer. Only what the two do not share is learned."""

    chosen: Conversation
    rejected: Conversation


class PreferenceForm(RecordForm):
    """A better answer, chosen, and a worse one, rejected, each as text or as messages; the prompt
    as a field of its own, or as the messages that both begin with."""

    name = "preference"
    fields = ("prompt", "chosen", "rejected", "system", "tools")
    required = ("chosen", "rejected")
    has_messages = True
    is_pairs = True

    def conversation(self, record: Record) -> NoReturn:
        """Refuse the record, and say how to learn what was chosen alone."""
        chosen, fields = record.fields.get("chosen"), record.fields
        ignored = [record.named("rejected")]
        if isinstance(chosen, str):
            ways = {"prompt": "completion", "instruction": "output"}
            way = next((ways[name] for name in ways if name in fields), "text")
        elif isinstance(chosen, list) and chosen and isinstance(chosen[0], dict):
            way = "completion" if chosen[0].get("role") == "assistant" and "prompt" in fields else "messages"
            ignored += [record.named("prompt")] if "prompt" in fields and way == "messages" else []
        else:
            way = ""
        to_learn = (
            f"{setting('columns')} '{{{way}: {record.named('chosen')}}}' "
            f"{setting('ignore')} '[{', '.join(ignored)}]'"
            if way
            else "write each as a record of messages"
        )
        record.wrong(
            "is of the form preference, a pair of answers, and this training learns single ones; "
            "finetune/dpo.py learns from pairs, and scripts/show_data.py with preference.loss dpo "
            f"shows them; to learn the chosen answers alone: {to_learn}"
        )

    def pair(self, record: Record) -> Pair:
        """The two conversations. Raises DataError for a field that is not what it should be."""
        if "prompt" in record.fields:
            return Pair(completed(record, "chosen"), completed(record, "rejected"))
        sides = [self._whole(record, name) for name in ("chosen", "rejected")]
        shared = 0
        for one, other in zip(*sides, strict=False):
            if one != other:
                break
            shared += 1
        tools = read_tools(record)
        chosen, rejected = (
            Conversation(tuple(_learned_after(messages, shared)), record.place, tools) for messages in sides
        )
        return Pair(chosen, rejected)

    def _whole(self, record: Record, name: str) -> list[Message]:
        """A side that has its prompt in it."""
        if isinstance(record.fields[name], list):
            return read_messages(record.fields[name], record.named(name), record)
        return [Message("text", record.text(name), train=True)]


def _learned_after(messages: list[Message], shared: int) -> list[Message]:
    return [
        replace(message, train=message.train and number >= shared) for number, message in enumerate(messages)
    ]
