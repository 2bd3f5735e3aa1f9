"""What passes between a run and the processes that encode its data. Torch-free."""

import sys
import zlib
from dataclasses import dataclass, replace

from litlora.prompts import STYLES, ChatTemplate, PromptStyle
from litlora.tokenizer import Tokenizer


def checksum(content: bytes) -> bytes:
    """Four bytes that tell whether the content was damaged."""
    return zlib.crc32(content).to_bytes(4, sys.byteorder)


@dataclass(frozen=True)
class Setup:
    """How conversations become examples. It can be sent to another process."""

    tokenizer: Tokenizer
    style_name: str
    template: ChatTemplate | None
    """Of the style, if it is one."""
    max_seq_length: int

    @property
    def style(self) -> PromptStyle:
        if self.template is None:
            return STYLES[self.style_name]
        return replace(self.template.style, name=self.style_name)


@dataclass(frozen=True)
class Part:
    """The examples of some consecutive conversations, as the bytes of a store's files: see
    `data/store.py`."""

    num_conversations: int
    examples: bytes
    sizes: bytes
    """Of each example in `examples`."""
    lengths: bytes
    conversations: bytes
    """Counted from the first one of the part; so are those of the events."""
    events: bytes
    first: str
    """The place of the first conversation; empty if there is none."""
    num_skipped: int
    """Records that were left out."""
    skipped: list[str]
    """Messages about the first of them."""
    source: int | None
    """Which of the records' parts was read there, not by the run itself."""
    hashes: bytes
    """Of those records, as a `Survey` has them."""
