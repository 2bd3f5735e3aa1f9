"""Markdown on a terminal, while it comes: bold text, code and headings get their looks. Torch-free.

A library that renders whole documents would have to write the screen anew with every token; this
writes each character once.
"""

import re

BOLD, CODE, HEADING, DIM, END = "\x1b[1m", "\x1b[36m", "\x1b[1;4m", "\x1b[2m", "\x1b[0m"
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)|\*\*(\S(?:[^*\n]*\S)?)\*\*")
MARK = re.compile(r"`|\*\*|\*$")
FENCE = "```"


class Markdown:
    """A text in pieces. What may be the beginning of a mark waits for its end, at most to the end of
    the line; headings and lines of code are shown line by line."""

    def __init__(self) -> None:
        self._line = ""
        self._shown = 0  # how much of the line is on the screen
        self._in_code = False

    def push(self, piece: str) -> str:
        """What to write for one more piece."""
        found = []
        for part in piece.splitlines(keepends=True):
            self._line += part
            is_whole = self._line.endswith("\n")
            found.append(self._advance(is_whole))
            if is_whole:
                self._in_code ^= self._line.startswith(FENCE)
                self._line, self._shown = "", 0
        return "".join(found)

    def finish(self) -> str:
        """The rest, at the end of the text."""
        return self._advance(True)

    def _advance(self, is_whole: bool) -> str:
        """What can be written of the current line."""
        line = self._line
        is_fence, is_heading = line.startswith(FENCE), bool(re.match("#{1,6} ", line))
        if not is_whole and (self._in_code or is_fence or line[0] == "#" or re.fullmatch("`{1,3}", line)):
            return ""
        if self._in_code or is_fence or is_heading:
            style = DIM if is_fence else CODE if self._in_code else HEADING
            body = line.rstrip("\n")
            return f"{style}{body}{END}{line[len(body) :]}" if body else line
        upto = len(line) if is_whole else self._settled(line)
        text, self._shown = line[self._shown : upto], max(upto, self._shown)
        return SPAN.sub(lambda m: f"{CODE}{m[1]}{END}" if m[1] else f"{BOLD}{m[2]}{END}", text)

    def _settled(self, line: str) -> int:
        """Up to where a line looks the same however it goes on."""
        place = self._shown
        while (mark := MARK.search(line, place)) is not None:
            if (whole := SPAN.match(line, mark.start())) is None or whole.end() == len(line):
                return mark.start()
            place = whole.end()
        return len(line)
