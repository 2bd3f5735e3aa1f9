"""The forms that records have, one a file. Torch-free.

- `detect.py` finds out which form records have;
- `fields.py` checks fields, and says what is wrong with them;
- `tools.py` reads functions and calls of them.

To add one, write a subclass of `RecordForm` and put it in FORMS.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from litlora.data.conversation import Conversation, Message, Place, is_document
from litlora.data.files import Entry
from litlora.data.records.alpaca import AlpacaForm
from litlora.data.records.detect import FIRST, detect, fitting_forms, without
from litlora.data.records.fields import (
    MESSAGE_FIELDS,
    Record,
    Unused,
    in_yaml,
    quoted,
    read_record,
    some,
    unknown_fields,
)
from litlora.data.records.form import RecordForm
from litlora.data.records.labelled import Labelled, LabelledForm
from litlora.data.records.messages import ROLES, MessagesForm
from litlora.data.records.preference import Pair, PreferenceForm
from litlora.data.records.prompt_completion import PromptCompletionForm
from litlora.data.records.sharegpt import ShareGPTForm
from litlora.data.records.text import TextForm
from litlora.data.skipped import Skipped
from litlora.errors import DataError, UserError, setting

FORMS: dict[str, RecordForm] = {
    form.name: form
    for form in (
        *(AlpacaForm(), MessagesForm(), ShareGPTForm(), PromptCompletionForm()),
        *(TextForm(), PreferenceForm(), LabelledForm()),
    )
}
Learned = Conversation | Pair | Labelled
"""What a record becomes."""
Learns = Literal["answers", "pairs", "labels"]
"""What a training learns from: single answers; pairs of them; answers that are good or bad, into
which pairs can be taken apart."""
TOGETHER = 1000
"""Of how many records the unknown fields are told together; of a later one they are told at once."""


@dataclass(frozen=True)
class RecordReader:
    """Turns the records of one form into conversations. It can be sent to another process."""

    form: str
    """One of FORMS."""
    ignore: tuple[str, ...] = ()
    """Fields that are left out; those of messages as "messages.id"."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the records call a field of the form, or of its messages, where that is another name."""
    on_bad: Literal["error", "skip"] = "error"
    """What becomes of a record that cannot be used."""
    learn: Literal["all", "last"] = "all"
    """Which of the assistant's messages are learned."""
    system: str | None = None
    """The system message of records that have none."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Which of ROLES those have who speak in messages, where their names are not known."""

    def __post_init__(self) -> None:
        """Raises UserError for settings that do not fit the form."""
        form = FORMS[self.form]
        in_messages = MESSAGE_FIELDS if form.has_messages else ()
        for name in self.columns:
            if name not in form.fields and name not in in_messages:
                known = ", ".join(form.fields)
                raise UserError(f"{setting('columns')} {name}: records of the form {self.form} have {known}")
        self._check_roles()
        needed = {name: self.columns.get(name, name) for name in form.required}
        for name in needed.values():
            if name in self.ignore:
                raise UserError(without(name))
        for name, is_set in (("system", self.system is not None), ("learn", self.learn != "all")):
            if is_set and not form.is_chat:
                raise UserError(f"{setting(name)}: records of the form {self.form} are not conversations")

    def _check_roles(self) -> None:
        if self.roles and not FORMS[self.form].has_messages:
            raise UserError(f"{setting('roles')}: records of the form {self.form} have no messages")
        for name, role in self.roles.items():
            if role not in ROLES:
                raise UserError(
                    f"{setting('roles')} '{in_yaml({name: role})}': {role} is no role; those are "
                    f"{', '.join(ROLES)}, and stand behind the records' own names: '{{BOT: assistant}}'"
                )

    def read(self, entries: Iterable[Entry], skipped: Skipped | None = None) -> Iterator[Learned]:
        """One conversation a record, or two of a form of pairs, or one with its label. Raises
        DataError for a record that cannot be used, or, where bad ones are skipped, adds it to
        `skipped` and goes on; and for fields that are neither used nor in `ignore`, those of the
        first records all together."""
        unknown: dict[str, Unused] = {}
        for number, (place, value) in enumerate(entries):
            if unknown and number == TOGETHER:
                break
            try:
                record, conversation = self._read(place, value)
                if record.unused and (number >= TOGETHER or self.on_bad == "skip"):
                    raise DataError(unknown_fields(record.unused))
            except DataError as error:
                if self.on_bad == "error":
                    raise
                if skipped is not None:
                    skipped.append(error)
                continue
            for name, unused in record.unused.items():
                unknown.setdefault(name, unused)
            yield conversation
        if unknown:
            raise DataError(unknown_fields(unknown))

    def _read(self, place: Place, value: Any) -> tuple[Record, Learned]:
        form = FORMS[self.form]
        try:
            record = read_record(value, place, self.columns, self.ignore, form.required, self.roles)
            for name in form.required:
                if name not in record.fields:
                    record.wrong(self._misses(record, name))
            used = record.used(record.fields, form.fields)
            # A null is told apart from a field that is missing.
            record.fields = {name: used.get(name) for name in form.fields if name in record.fields}
            if form.is_pairs:
                return record, Pair(*map(self._settled, form.pair(record)))
            if form.is_labelled:
                found = form.labelled(record)
                return record, found._replace(conversation=self._settled(found.conversation))
            return record, self._settled(form.conversation(record))
        except RecursionError:
            raise DataError(f"{place}: is nested too deeply") from None

    def _misses(self, record: Record, name: str) -> str:
        others = [other for other in fitting_forms(record, FORMS) if other != self.form]
        if others:
            return f"is of the form {others[0]}, and the data of the form {self.form}; write all in one form"
        has = some([quoted(name) for name in record.fields]) or "nothing"
        return f'has no "{record.named(name)}"; it has {has}'

    def _settled(self, conversation: Conversation) -> Conversation:
        """The conversation with the system message, and with nothing learned but what is to be."""
        messages = conversation.messages
        if not FORMS[self.form].is_chat or is_document(conversation):
            return conversation
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise DataError(f"{conversation.place}: has no assistant's message; there is nothing to learn")
        if self.learn == "last":
            messages = tuple(
                replace(message, train=message.train and number == answers[-1])
                for number, message in enumerate(messages)
            )
        if not any(message.train for message in messages):
            raise DataError(
                f"{conversation.place}: has no message that is learned: all of them say otherwise"
            )
        if self.system is not None and not any(message.role == "system" for message in messages):
            messages = (Message("system", self.system), *messages)
        return conversation if messages is conversation.messages else replace(conversation, messages=messages)


def choose_form(
    entries: Iterable[Entry], form: str | None, columns: Mapping[str, str], ignore: tuple[str, ...]
) -> str | None:
    """The form to read records in: the given one, or that of the first records; none if there are no
    records. Raises DataError for records that do not tell, and UserError for a name in `columns` that
    no form has."""
    fields = {*MESSAGE_FIELDS, *(name for each in FORMS.values() for name in each.fields)}
    for name, theirs in columns.items():
        if name not in fields:
            turned = f"; the form's name stands first: '{{{theirs}: {name}}}'" if theirs in fields else ""
            raise UserError(f"{setting('columns')} {name}: no form has a field of this name{turned}")
    return form or detect(islice(entries, FIRST), FORMS, columns, ignore)


def check_form(reader: RecordReader, first: Entry, learns: Learns) -> None:
    """Raise DataError for records that are not what is learned; `first` is one of them."""
    form, (place, value) = FORMS[reader.form], first
    if learns == "answers" and (form.is_pairs or form.is_labelled):
        form.conversation(read_record(value, place, reader.columns, reader.ignore, form.required))
    if learns == "pairs" and form.is_labelled:
        raise DataError(
            f"{place}: is of the form {reader.form}, answers that are good or bad: "
            f"choose {setting('loss')} kto"
        )
    if learns == "pairs" and not form.is_pairs:
        raise DataError(
            f"{place}: is of the form {reader.form}, one answer to a prompt; a preference is learned from "
            f"two, chosen and rejected: {setting('format')} preference"
        )
    if learns == "labels" and not (form.is_pairs or form.is_labelled):
        raise DataError(
            f"{place}: is of the form {reader.form}, answers without a label; {setting('loss')} kto learns "
            f"from answers with one, true or false: {setting('format')} labelled"
        )


__all__ = [
    "FORMS",
    "Labelled",
    "Learns",
    "Pair",
    "RecordForm",
    "RecordReader",
    "check_form",
    "choose_form",
]
