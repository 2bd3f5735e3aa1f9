"""Records of plain text, for continued pre-training. Torch-free."""

from litlora.data.conversation import Conversation, Message
from litlora.data.records.fields import Record, quoted
from litlora.data.records.form import RecordForm


class TextForm(RecordForm):
    """A text that stands alone."""

    name = "text"
    fields = ("text",)
    required = ("text",)
    is_chat = False

    def conversation(self, record: Record) -> Conversation:
        """The text, all of which is learned."""
        content = record.text("text")
        if not content:
            record.wrong(f"{quoted(record.named('text'))} is empty; there is nothing to learn")
        return Conversation((Message("text", content, train=True),), record.place)
