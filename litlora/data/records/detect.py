"""Which form records have. Torch-free."""

from collections.abc import Iterable, Mapping
from itertools import islice

from litlora.data.conversation import Place
from litlora.data.files import Entry
from litlora.data.records.fields import Record, in_yaml, quoted, read_record, some
from litlora.data.records.form import RecordForm
from litlora.data.records.messages import likely_names
from litlora.errors import DataError, setting

FIRST = 100
"""How many records are looked at."""


def detect(
    entries: Iterable[Entry],
    forms: Mapping[str, RecordForm],
    columns: Mapping[str, str],
    ignore: tuple[str, ...],
) -> str | None:
    """The form of the first records, which must be the same for all of them; none if there are no
    records. Raises DataError for records of several forms, and of none."""
    first: Record | None = None
    broken: DataError | None = None
    fitting: dict[str, Place] = {}
    """The forms that every record so far has, and where one was first seen."""
    for place, value in islice(entries, FIRST):
        if isinstance(value, DataError):
            broken = broken or value
            continue
        if not isinstance(value, dict):
            if first is None:
                read_record(value, place, columns, ignore, ())  # says what is wrong with it
            continue
        record = read_record(dict(value), place, columns, ignore, ())
        first = first or record
        fits = fitting_forms(record, forms)
        if not fits:
            continue  # it is refused, or skipped, when it is read
        if fitting and not fitting.keys() & set(fits):
            other, seen = next(iter(fitting.items()))
            raise DataError(
                f"{place}: is of the form {fits[0]}, but {seen} is of the form {other}: mixed forms are not "
                f"guessed; write all records in one form"
            )
        fitting = {name: fitting.get(name, place) for name in fits if not fitting or name in fitting}
    if first is None:
        if broken is not None:
            raise broken
        return None
    if not fitting:
        raise DataError(_unrecognised(first, forms))
    if len(fitting) > 1:
        name, place = next(iter(fitting.items()))
        has = " and ".join(f"those of {form} ({', '.join(forms[form].required)})" for form in fitting)
        raise DataError(
            f"{place}: has the fields of several forms, {has}; choose one: {setting('format')} {name}"
        )
    return next(iter(fitting))


def fitting_forms(record: Record, forms: Mapping[str, RecordForm]) -> list[str]:
    """The forms whose required fields a record has. A null counts only if that leaves no form
    otherwise: tables have a column for each field that any record has."""
    for fields in (
        {name for name, value in record.fields.items() if value is not None},
        record.fields.keys(),
    ):
        if fits := [name for name, form in forms.items() if fields >= set(form.required)]:
            return [name for name in fits if not any(_adds_to(name, other, forms) for other in fits)]
    return []


def _adds_to(name: str, other: str, forms: Mapping[str, RecordForm]) -> bool:
    """Whether the other form needs all that this one needs, and more."""
    return set(forms[name].required) < set(forms[other].required)


def _unrecognised(record: Record, forms: Mapping[str, RecordForm]) -> str:
    has = some([quoted(record.named(name)) for name in record.fields]) or "nothing"
    near = [form for form in forms.values() if set(form.required) & record.fields.keys()]
    # Not a form that needs all that another one needs, and more.
    near = [form for form in near if not any(_adds_to(other.name, form.name, forms) for other in near)]
    if len(near) == 1:
        missing = next(name for name in near[0].required if name not in record.fields)
        if record.named(missing) in record.ignore:
            return without(missing)
        if missing in record.columns:
            return (
                f"{record.place}: has no {quoted(record.named(missing))}, which {setting('columns')} gives "
                f"as the name of {missing}; it has {has}"
            )
        return (
            f'{record.place}: has no "{missing}", which records of the form {near[0].name} have; '
            f"it has {has}; if it has another name: {setting('columns')} '{{{missing}: NAME}}'"
        )
    if hint := _as_messages(record):
        return f"{record.place}: is of no known form; it has {has}; {hint}"
    needs = ", ".join(f"{form.name} ({' and '.join(form.required)})" for form in forms.values())
    return (
        f"{record.place}: is of no known form; it has {has}; known are {needs}; "
        f"if its fields have other names: {setting('columns')} '{{prompt: NAME, completion: NAME}}'"
    )


def _as_messages(record: Record) -> str:
    """How to read a record one of whose fields is a list of messages, or of questions and answers in
    turn; empty if none is."""
    for name, value in record.fields.items():
        if not isinstance(value, list) or not value:
            continue
        if all(isinstance(text, str) for text in value) and len(value) % 2 == 0:
            columns = in_yaml({**record.columns, "conversations": name})
            return f"if {quoted(name)} are questions and answers in turn: {setting('columns')} '{columns}'"
        if all(isinstance(message, dict) for message in value):
            names = {role: theirs for role, theirs in likely_names(value[0]).items() if role != theirs}
            if "NAME" not in names.values():
                columns = {**record.columns, "messages": name, **names}
                return f"if {quoted(name)} are its messages: {setting('columns')} '{in_yaml(columns)}'"
    return ""


def without(name: str) -> str:
    """The message about a required field that is to be ignored."""
    return f"{setting('ignore')} {name}: a record cannot be trained on without it"
