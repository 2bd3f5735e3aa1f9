"""The console command `litlora`: runs the files in finetune/, chat/ and scripts/ by short names.

    litlora finetune lora ...     finetune/lora.py
    litlora chat ...              chat/base.py
    litlora merge ...             scripts/merge_lora.py

Torch-free, as is everything before the file itself runs.
"""

import ast
import difflib
import re
import runpy
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import litlora
from litlora.cli import fail
from litlora.console import say
from litlora.settings import REPOSITORY

SHORT = {
    "chat": "chat/base.py",
    "merge": "scripts/merge_lora.py",
    "combine": "scripts/combine_lora.py",
    "resize": "scripts/resize_lora.py",
    "extract": "scripts/lora_extractor.py",
    "merge-files": "scripts/lora_merger.py",
    "inspect": "scripts/inspect_checkpoint.py",
    "compare": "scripts/compare_runs.py",
    "models": "scripts/list_models.py",
}
"""Short names of files; others are called as the file is, with dashes."""
NOT_LISTED = ("build_quickstart", "quickstart_facts")
"""What makes the quickstart base; it belongs to the repository."""
COMPLETION = "completion"
SHELLS = ("bash", "zsh")


@dataclass(frozen=True)
class Command:
    """A file that can be run."""

    words: tuple[str, ...]
    """By which it is called: ("finetune", "lora")."""
    file: Path

    @property
    def summary(self) -> str:
        """The first sentence of the file's docstring."""
        text = " ".join((ast.get_docstring(self._tree) or "").split("\n\n")[0].split())
        return textwrap.shorten(re.split("[;:.] ", text)[0].rstrip("."), 110, placeholder=" ...")

    @property
    def settings(self) -> list[str]:
        """The names of the settings classes that the file hands to `cli.run`."""
        calls = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        call = next(call for call in calls if ast.unparse(call.func) in ("run", "cli.run"))
        return [ast.unparse(argument) for argument in call.args[1:]]

    @property
    def _tree(self) -> ast.Module:
        return ast.parse(self.file.read_text(encoding="utf-8"))


def commands() -> list[Command]:
    """Every file with its words: those of finetune/ under the folder's name, others by their own."""
    short = {file: name for name, file in SHORT.items()}
    found = []
    for folder in ("finetune", "chat", "scripts"):
        for file in sorted((REPOSITORY / folder).glob("*.py")):
            name = short.get(f"{folder}/{file.name}", file.stem.replace("_", "-"))
            in_group = folder == "finetune"
            if file.stem not in NOT_LISTED:
                found.append(Command((folder, name) if in_group else (name,), file))
    return found


def main() -> None:
    """Run the command that `sys.argv` names; list all commands where it names none."""
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h", "help"):
        say(*listing())
        return
    if words[0] in ("--version", "-V"):
        say(f"litlora {litlora.__version__}")
        return
    if words[0] == COMPLETION:
        from litlora.cli.completion import script

        script(words[1:])
        return
    command = named(words)
    sys.argv = [str(command.file), *words[len(command.words) :]]
    runpy.run_path(str(command.file), run_name="__main__")


def named(words: list[str]) -> Command:
    """The command that a command line begins with, by its words or by its file's name; the longest
    that fits. Exits with one line if there is none."""
    known = commands()
    wanted = tuple(word.replace("_", "-") for word in words[:2])
    fitting = [each for each in known if each.words == wanted[: len(each.words)]]
    fitting += [each for each in known if each.file.stem == words[0].replace("-", "_")]
    if fitting:
        return max(fitting, key=lambda each: len(each.words))
    names = [" ".join(each.words) for each in known]
    if group := [name for name in names if name.startswith(f"{words[0]} ")]:
        fail(f"litlora {words[0]}: needs one of {', '.join(name.split()[1] for name in group)}")
    close = difflib.get_close_matches(" ".join(wanted), names, n=1) or difflib.get_close_matches(
        wanted[0], names, n=1
    )
    meant = f"; did you mean litlora {close[0]}?" if close else ""
    fail(f"litlora {words[0]}: no such command{meant}; litlora --help lists them")


def listing() -> list[str]:
    """All commands, one line each."""
    rows = [(" ".join(each.words), each.summary) for each in commands()]
    rows.append((f"{COMPLETION} {'|'.join(SHELLS)}", "Print what completes these words in a shell"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in rows]
    return ["usage: litlora COMMAND [--help] [OPTIONS]", "", *lines]
