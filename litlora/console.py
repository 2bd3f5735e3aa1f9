"""What a command tells people. Text from a file of somebody else is shown without harm. Torch-free."""

import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import TextIO


def one_line(text: str) -> str:
    """A message as one line, as a terminal shows it; the middle of a long message is left out."""
    line = " ".join(text.split())
    if len(line) > 2000:
        line = f"{line[:1500]} ... {line[-400:]}"
    return shown(line)


def shown(text: str) -> str:
    """Text with everything that is not printable escaped, line breaks too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, on stdout unless `file` is another stream. Everything that a command says goes
    through here, because a name in it may come from a file. Each line stays one line."""
    print("\n".join(map(shown, lines)), file=file, flush=True)


def say_marked(spans: Iterable[tuple[str, bool]]) -> None:
    """Print text on stdout, of which the spans with True stand out: in green at a terminal (unless
    NO_COLOR is set), in [[double brackets]] elsewhere."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    print(
        "".join(f"{begin}{printable(t)}{end}" if marked else printable(t) for t, marked in spans), flush=True
    )


def printable(text: str) -> str:
    """A model's answer without the characters that could steer a terminal: control characters other
    than newline and tab, and overrides of the writing direction, which show words in a false
    order."""
    return "".join(
        c for c in text if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTIONS)
    )


_DIRECTIONS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
