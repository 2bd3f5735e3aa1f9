"""What `--help` shows: the settings that matter most first, one group alone, examples at the end.
Torch-free."""

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence

from litlora.console import say

SECTION = re.compile(r"\n(?=\S[^\n]*:\n)")
"""Between two sections of a help text, each under a heading."""


def arranged(text: str, first: Sequence[str], helps: Mapping[str, str]) -> str:
    """A help text with a short usage, with the settings in `first` before all options, and with the
    running command's examples. `helps` are the texts of the options by their names."""
    if not helps.keys() >= {*first}:  # the parser that jsonargparse makes of a data source alone
        return text
    head, _, options = text.partition("\noptions:\n")
    usage, _, description = head.partition("\n\n")
    program = usage.split()[1]
    parts = [f"usage: {program} [--config FILE.yaml] [OPTIONS]", description.strip("\n")]
    if first:
        parts.append("\n".join(["what matters most:", *_rows([(name, helps[name]) for name in first])]))
    groups = re.findall(r"^  --(\w+)\.\w+", options, re.MULTILINE)
    if named := [name for name in dict.fromkeys(groups) if name != "data"]:
        each = ", ".join(f"--{name}.help" for name in named)
        parts.append(_wrapped(f"one group alone: {each}"))
    parts.append(f"options:\n{options.rstrip()}")
    if examples := examples_of(sys.modules["__main__"].__doc__ or ""):
        parts.append("\n".join(["examples:", *(f"  {line}" for line in examples)]))
    return "\n\n".join(parts) + "\n"


def show_group(text: Callable[[], str], argv: Sequence[str]) -> None:
    """Print the settings of one group, and exit, if `--GROUP.help` asks for it; `text` makes the help
    text of all."""
    for word in argv:
        found = re.fullmatch(r"--(\w+)\.help", word)
        if found and found[1] != "data" and (section := group(text(), found[1])):
            say(*section.splitlines())
            raise SystemExit(0)


def group(text: str, name: str) -> str | None:
    """The section of a help text that has the settings of a group; None if there is none."""
    begins = re.compile(rf"^  --{re.escape(name)}\.\w", re.MULTILINE)
    sections = SECTION.split(text.partition("\noptions:\n")[2])
    return next((section.strip("\n") for section in sections if begins.search(section)), None)


def examples_of(doc: str) -> list[str]:
    """The commands in a file's docstring, with their continued lines."""
    found: list[str] = []
    for line in textwrap.dedent(doc).splitlines():
        continues = bool(found) and found[-1].endswith("\\")
        if continues or line.strip().startswith("python "):
            found.append(("    " if continues else "") + line.strip())
    return found


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
    """Options with the first sentence of their help."""
    width = max(len(name) for name, _ in pairs) + 6
    lines = []
    for name, text in pairs:
        sentence = re.split(r"[.:;] ", f"{' '.join(text.split())} ")[0].rstrip(". ")
        lines.append(_wrapped(sentence, f"  --{name}".ljust(width), " " * width))
    return lines


def _wrapped(text: str, start: str = "", after: str = "  ") -> str:
    columns = max(40, shutil.get_terminal_size().columns - 2)
    return textwrap.fill(text, columns, initial_indent=start, subsequent_indent=after, break_on_hyphens=False)
