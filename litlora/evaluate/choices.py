"""Records of multiple choice: {"prompt": ..., "choices": [...], "answer": ...}. Torch-free."""

from collections.abc import Iterator
from dataclasses import dataclass

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.files import entries, find_files
from litlora.data.records.fields import Record, quoted, read_record, text, unknown_fields
from litlora.data.records.prompt_completion import prompt_messages
from litlora.data.records.sharegpt import system_message
from litlora.errors import DataError, setting
from litlora.settings import DataSource, Files

FIELDS = ("prompt", "choices", "answer", "system")
REQUIRED = FIELDS[:3]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """A question with the answers to choose from."""

    place: Place
    texts: tuple[str, ...]
    right: int
    """The index of the right one."""
    conversations: tuple[Conversation, ...]
    """The question with each answer."""


def read_choices(source: DataSource) -> list[Choices]:
    """The records of the files that a source names. Raises DataError, naming the file and the record,
    for what is no question with choices."""
    if not isinstance(source, Files):
        raise DataError(f"{setting('data')} {source.name}: multiple choice is read from files; name one")
    found = []
    for place, value in _entries(source):
        if source.max_examples is not None and len(found) == source.max_examples:
            break
        record = read_record(value, place, source.columns, source.ignore, REQUIRED)
        for name in REQUIRED:
            if name not in record.fields:
                has = ", ".join(map(quoted, record.fields)) or "nothing"
                record.wrong(
                    f"has no {quoted(record.named(name))}, which a multiple choice needs; it has {has}; "
                    f"if it has another name: {setting('columns')} '{{{name}: NAME}}'"
                )
        record.fields = record.used(record.fields, FIELDS)
        if record.unused:
            raise DataError(unknown_fields(record.unused))
        found.append(_choices(record))
    if not found:
        raise DataError(f"{source.path}: holds no records; there is nothing to measure")
    return found


def _entries(source: Files) -> Iterator:
    for file in find_files(source.path).files:
        yield from entries(file, source.ignore)


def _choices(record: Record) -> Choices:
    value, name = record.fields.get("choices"), quoted(record.named("choices"))
    if not isinstance(value, list) or len(value) < 2:
        record.wrong(f"{name} must be a list of at least two texts")
    texts = tuple(text(each, f"{name}[{number}]", record.place) for number, each in enumerate(value))
    prompt = prompt_messages(record)
    before = [*system_message(record, prompt), *prompt]
    conversations = (
        Conversation((*before, Message("assistant", each, train=True)), record.place) for each in texts
    )
    return Choices(record.place, texts, _right(record, texts), tuple(conversations))


def _right(record: Record, texts: tuple[str, ...]) -> int:
    """Which choice the answer names: by its text, its letter, or its number from 0."""
    value = record.fields.get("answer")
    if isinstance(value, str) and value in texts:
        return texts.index(value)
    letters = LETTERS[: len(texts)]
    if isinstance(value, str) and len(value) == 1 and value.upper() in letters:
        return letters.index(value.upper())
    if type(value) is int and 0 <= value < len(texts):
        return value
    record.wrong(
        f"{quoted(record.named('answer'))} must be one of the choices, its letter from A to {letters[-1]}, "
        f"or its number from 0 to {len(texts) - 1}, not {str(value)[:40]!r}"
    )
