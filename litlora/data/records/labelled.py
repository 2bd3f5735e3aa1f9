"""Records of an answer that is labelled good or bad. Torch-free."""

from typing import NamedTuple, NoReturn

from litlora.data.conversation import Conversation
from litlora.data.records.fields import Record, quoted
from litlora.data.records.form import RecordForm
from litlora.data.records.prompt_completion import completed
from litlora.errors import setting


class Labelled(NamedTuple):
    """An answer to a prompt, and whether it is a good one."""

    conversation: Conversation
    is_desirable: bool


class LabelledForm(RecordForm):
    """A prompt, an answer to it, and whether that is a good one: true or false."""

    name = "labelled"
    fields = ("prompt", "completion", "label", "system", "tools")
    required = ("prompt", "completion", "label")
    has_messages = True
    is_labelled = True

    def conversation(self, record: Record) -> NoReturn:
        """Refuse the record, and say how to learn all answers."""
        record.wrong(
            "is of the form labelled, a good or a bad answer, and this training learns every answer; "
            "finetune/dpo.py with preference.loss kto learns from labels, and scripts/show_data.py with it "
            "shows them; to learn all answers alike: "
            f"{setting('format')} prompt_completion {setting('ignore')} '[{record.named('label')}]'"
        )

    def labelled(self, record: Record) -> Labelled:
        """The conversation and its label. Raises DataError for a field that is not what it should
        be."""
        value = record.fields["label"]
        known = {"true": True, "false": False, "1": True, "0": False}  # tables have text and numbers
        if not isinstance(value, bool | int | str) or str(value).lower() not in known:
            name = quoted(record.named("label"))
            record.wrong(f"{name} must be true, a good answer, or false, a bad one, not {str(value)[:40]!r}")
        return Labelled(completed(record, "completion"), known[str(value).lower()])
