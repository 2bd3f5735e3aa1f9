"""RecordForm: one form that records have. Torch-free."""

from abc import ABC, abstractmethod
from typing import ClassVar

from litlora.data.conversation import Conversation
from litlora.data.records.fields import Record


class RecordForm(ABC):
    """One form that records have: which fields, and what conversation they are."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """All that is used."""
    required: ClassVar[tuple[str, ...]]
    """Those that a record must have. They also tell a form from the others."""
    is_chat: ClassVar[bool] = True
    """Whether its records are conversations, to which a system message can be added, and of which
    the last answer alone can be learned; else plain text."""
    has_messages: ClassVar[bool] = False
    """Whether its records may hold lists of messages."""
    is_pairs: ClassVar[bool] = False
    """Whether a record has two answers, a better and a worse one, and so is not one conversation."""
    is_labelled: ClassVar[bool] = False
    """Whether a record says of its answer whether it is a good one."""

    @abstractmethod
    def conversation(self, record: Record) -> Conversation:
        """A record, which has the required fields, as a conversation. Raises DataError for a field
        that is not what it should be."""
