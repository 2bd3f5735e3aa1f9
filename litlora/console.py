"""What a command says to people: text that may come from a stranger's file, shown without harm. Torch-free."""

import unicodedata
from typing import TextIO


def one_line(text: str) -> str:
    """A message as one line that a terminal shows as it is: what is not printable is escaped, the
    middle of a long one left out."""
    line = " ".join(text.split())
    if len(line) > 2000:
        line = f"{line[:1500]} ... {line[-400:]}"
    return shown(line)


def shown(text: str) -> str:
    """Text as a terminal shows it: what is not printable is escaped, line breaks too."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, on stdout unless `file` is another stream: all that a command tells goes through
    here, as names in it may be a file's. A line stays one line, whatever it holds."""
    print("\n".join(map(shown, lines)), file=file, flush=True)


def printable(text: str) -> str:
    """A model's answer without what could steer a terminal: control characters but newline and tab,
    and overrides of the direction of writing, which show words in another order than they have."""
    return "".join(
        c for c in text if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTIONS)
    )


_DIRECTIONS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
