"""The forms that records have, one a file. Torch-free.

To add one, write a subclass of `RecordForm` and put it in FORMS.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from litlora.data.conversation import Conversation, Place
from litlora.data.files import Entry
from litlora.data.records.alpaca import AlpacaForm
from litlora.data.records.fields import record_fields, unknown_fields
from litlora.data.records.form import RecordForm
from litlora.errors import DataError

FORMS: dict[str, RecordForm] = {form.name: form for form in (AlpacaForm(),)}


@dataclass(frozen=True)
class RecordReader:
    """Turns the records of one form into conversations. It can be sent to another process."""

    form: str
    """One of FORMS."""
    ignore: tuple[str, ...] = ()
    """Fields that are left out."""

    def read(
        self, entries: Iterable[Entry], skipped: list[DataError] | None = None
    ) -> Iterator[Conversation]:
        """One conversation a record. Raises DataError at the end for fields that are neither used
        nor in `ignore`, all of them together. The errors of records that are left out are added to
        `skipped`."""
        form = FORMS[self.form]
        unknown: dict[str, Place] = {}
        for place, value in entries:
            fields = record_fields(value, place, form.required)
            fields = {name: content for name, content in fields.items() if name not in self.ignore}
            for name, content in fields.items():
                if name not in form.fields and content is not None:  # null says nothing
                    unknown.setdefault(name, place)
            yield form.conversation(fields, place)
        if unknown:
            raise DataError(unknown_fields(unknown, form.fields))


__all__ = ["FORMS", "RecordForm", "RecordReader"]
