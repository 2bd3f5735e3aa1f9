"""What is wrong with a command line: jsonargparse's messages as ours. Torch-free."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from litlora.cli.help import examples_of
from litlora.settings.other_names import OTHER_NAMES

NO_SOURCE = "no such data source"
EXPLANATIONS: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    # `--out_dir -x`: argparse takes -x for an option, so that --out_dir has no value
    (
        r"^argument (--[\w.]+): expected one argument",
        r"\1: needs a value; one that begins with - as \1=VALUE",
    ),
    # settings without a default
    (
        r"the following arguments are required: (.+)",
        lambda found: f"{_options(found[1])}: required{_example()}",
    ),
    # `--source`, the beginning of several options
    (r"^ambiguous option: (\S+) could match (.+)", r"\1: could match \2"),
    (r'^Invalid option "(.*)" for --print_config', r"--print_config=\1: no such flag"),
    # what most messages begin with: the full name of a setting
    (r'Parser key "([\w.]+)": ?', r"--\1: "),
    (r"^--config: (?:File does not exist|Path is not a file): '(.*)'", r"--config \1: no such file"),
    # `--lora '{rank: x}'`, whose message goes on with lora.rank; and `--lora 5`
    (r"^--(\w+): Unable to load config '.*' - (?=--\1\.)", ""),
    (r"^--(\w+): Unable to load config '(.*)' - .*", r"--\1 \2: must be a mapping of settings to values"),
    # a name in a file or in a mapping that no setting has
    (r"^Option '(\S+)' is not accepted", r"no such setting as \1"),
    (r"^Group '(\S+)' does not accept option '(\S+)'", r"no such setting as \1.\2"),
    # a data source, its name first: `--data litlora.settings.JSON: ...`
    (r"^--data: Problem with given class_path '(\S+)': ", r"--data \1: "),
    (r"^(--data\S*): Expected a dot import path string: ?(.*)", rf"\1 \2: {NO_SOURCE}"),
    # a module that must not or cannot be imported, or does not have the name
    (r"^--data.help: Importing '(\S+)' is not allowed.*", rf"--data.help \1: {NO_SOURCE}"),
    (r"^(--data \S+): (?:Importing|No module|module) .*", rf"\1: {NO_SOURCE}"),
    # another class, or another value
    (r"^(--data\S*): Import path (\S+) does not correspond to a subclass of .*", rf"\1 \2: {NO_SOURCE}"),
    (r"^--data: Not a valid subclass .*? Got value: (.*) Subclass types .*", rf"--data \1: {NO_SOURCE}"),
    # a setting of a data source: `--data litlora.settings.JSON: --path: ...`
    (r"^--data \S+: --(\w+): ", r"--data.\1: "),
    (r"^--data (?:\w+\.)*(\w+): Option '(\S+)' is not accepted", r"--data.\2: \1 has no such setting"),
    # an entry of --data.sources
    (r"^--data.sources: Problem with given class_path '\S+': (?:--)?", "--data.sources: "),
    # the names of types
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[(.+?)\]", lambda found: found[1].replace("'", "")),
    (r", NoneType", ""),
    # what is typed for a list, and for a mapping
    (r"Expected an? tuple\. Got value: (.*)", r"expected a list, '[\1]', got \1"),
    (r"Expected an? dict\. Got value: ", "expected a mapping, '{NAME: VALUE}', got "),
    # a value of another type than the several, or the one, that a setting takes
    (r"Does not validate against .*? Subtypes: \[(.+?)\] Errors: .*? Given value: ", r"expected \1, got "),
    (r"Expected an? (.+?)\. Got value: ", r"expected \1, got "),
)
"""From the messages of jsonargparse, on one line, to ours: patterns and what replaces them, in this
order."""


def explain(error: Exception, types: Mapping[str, Any], config: str, sources: Iterable[str]) -> str:
    """jsonargparse's message, of several lines, as one that names the option or the file. `types` are
    those of the command's settings, `sources` the names of the data sources."""
    text = " ".join(str(error).split())
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        return f"{found[1]}: no such option{did_you_mean(found[1].split('=')[0], types)}; see --help"
    for pattern, replacement in EXPLANATIONS:
        text = re.sub(pattern, replacement, text)
    if found := re.search(r"no such setting as ([\w.]+)", text):
        text += did_you_mean(f"--{found[1]}", types)
    if found := re.match(r"(--data\.\w+): (\w+) has no such setting", text):
        source = "Files" if found[2] == "JSON" else found[2]  # a file's name alone stands for JSON
        meant = did_you_mean(found[1], types)
        return f"{found[1]}: {source} has no such setting{meant}; see --data.help {source}"
    if NO_SOURCE in text:
        return f"{text}; there are {', '.join(sorted(sources))}"
    in_file = config and not text.startswith("--")  # a message that names no option is about a file's content
    return f"--config {config}: {text}; see --help" if in_file else f"{text}; see --help"


def _options(names: str) -> str:
    """`rank, alpha` as the options that they are."""
    return ", ".join(f"--{name}" for name in names.split(", "))


def _example() -> str:
    """`, as in: python scripts/download.py ...`: the first command in the running script's docstring."""
    lines = examples_of(sys.modules["__main__"].__doc__ or "")
    commands = re.split(r" (?=python )", " ".join(" ".join(lines).replace("\\", " ").split()))
    return f", as in: {commands[0]}" if commands[0] else ""


def did_you_mean(option: str, types: Mapping[str, Any]) -> str:
    """`, did you mean --train.learning_rate?` for --lr, --train.lr and --train.learnin_rate."""
    typed = option.removeprefix("--").replace("-", "_")
    last = typed.rpartition(".")[2]
    known = [name for name, kind in types.items() if not dataclasses.is_dataclass(kind) or name == "data"]
    for meant in (last, OTHER_NAMES.get(last)):
        if found := [name for name in known if name.rpartition(".")[2] == meant]:
            nearest = min(found, key=lambda name: name.count("."))
            return f", did you mean --{nearest}?" if nearest != typed else ""
    close = difflib.get_close_matches(typed, [*known, "config", "print_config", "help"], n=1)
    return f", did you mean --{close[0]}?" if close else ""
