"""Records of a prompt and its completion. Torch-free."""

from dataclasses import replace

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record, quoted
from litlora.data.records.form import RecordForm
from litlora.data.records.messages import read_messages
from litlora.data.records.sharegpt import system_message
from litlora.data.records.tools import read_tools


class PromptCompletionForm(RecordForm):
    """A prompt and its completion, each as text or as messages; optionally system and tools."""

    name = "prompt_completion"
    fields = ("prompt", "completion", "system", "tools")
    required = ("prompt", "completion")
    has_messages = True

    def conversation(self, record: Record) -> Conversation:
        """The prompt, of which nothing is learned, and the completion."""
        return completed(record, "completion")


def completed(record: Record, name: str) -> Conversation:
    """The record's prompt, and the answer to it in the field `name`."""
    prompt, completion = prompt_messages(record), answer_messages(record, name)
    messages = [*system_message(record, prompt or completion), *prompt, *completion]
    return Conversation(tuple(messages), record.place, read_tools(record))


def prompt_messages(record: Record) -> list[Message]:
    """The prompt as messages that are not learned. Text is what the user says."""
    value = record.fields["prompt"]
    if not isinstance(value, list):
        return [Message("user", record.text("prompt"))]
    return [replace(message, train=False) for message in read_messages(value, record.named("prompt"), record)]


def answer_messages(record: Record, name: str) -> list[Message]:
    """An answer as messages. Text is what the assistant says."""
    value = record.fields[name]
    if not isinstance(value, list):
        return [Message("assistant", record.text(name), train=True)]
    messages = read_messages(value, record.named(name), record)
    if messages[0].role != "assistant":
        named = quoted(record.named(name))
        record.wrong(f"{named} must begin with the assistant's message, not the {messages[0].role}'s")
    return messages
