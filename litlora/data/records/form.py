"""RecordForm: one form that records have. Torch-free."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from litlora.data.conversation import Conversation, Place


class RecordForm(ABC):
    """One form that records have: which fields, and what conversation they are."""

    name: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    """All that is used."""
    required: ClassVar[tuple[str, ...]]
    """Those that a record must have."""

    @abstractmethod
    def conversation(self, fields: dict[str, Any], place: Place) -> Conversation:
        """A record, which has the required fields, as a conversation. Raises DataError for a field
        that is not what it should be."""
