"""The edge of every command: arguments in, one line on a mistake, exit status out. Torch-free.

A command is a function of one settings dataclass; `run` parses the dataclass with jsonargparse and
calls the function. Heavy imports belong inside the function, so that `--help` and a typo answer at
once.
"""

import dataclasses
import difflib
import gc
import json
import os
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from litlora.console import one_line
from litlora.errors import UserError
from litlora.settings import Alpaca, DataSource, stored_values
from litlora.storage.untrusted import read_yaml

Settings = TypeVar("Settings")
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$|-nan$", re.IGNORECASE)
"""What is a value although it begins like an option: argparse by itself does not know -1e-3."""


def run(command: Callable[[Settings], None], settings_class: type[Settings]) -> None:
    """Parse `sys.argv` into `settings_class` and call the command; a UserError becomes one line and
    exit status 2.

    With LITLORA_DEBUG=1 in the environment a mistake shows its traceback as well.
    """
    # Importing torch makes a million objects; to look for garbage among them every 700 took a fifth
    # of the time.
    gc.set_threshold(500_000)
    try:
        command(parse(settings_class, sys.argv[1:]))
    except UserError as error:
        _fail(error.with_options(lambda name: option_for(settings_class, name)))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def option_for(settings_class: type, name: str) -> str:
    """The option of a command that sets what a library calls `name`: rank -> --lora.rank; a name
    that no option has stays as it is."""
    found = [path for path in _setting_paths(settings_class) if path.rpartition(".")[2] == name]
    return f"--{min(found, key=lambda path: path.count('.'))}" if found else name


def _setting_paths(settings_class: type, prefix: str = "") -> list[str]:
    """The names of all settings of a command, those of nested dataclasses and data sources too."""
    paths = []
    for field in dataclasses.fields(settings_class):
        paths.append(prefix + field.name)
        nested = _data_sources().values() if field.type is DataSource else (field.type,)
        for inner in filter(dataclasses.is_dataclass, nested):
            paths += _setting_paths(inner, f"{prefix}{field.name}.")
    return paths


def _fail(message: str) -> NoReturn:
    if os.environ.get("LITLORA_DEBUG") == "1":
        traceback.print_exc()
    if os.environ.get("LOCAL_RANK", "0") == "0":  # with several devices, one process speaks for all
        print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2) from None


def parse(settings_class: type[Settings], argv: list[str]) -> Settings:
    """The settings that a command line asks for. Raises UserError in one line; `--help` and
    `--print_config` exit."""
    for number, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == "--config":
            _check_config(value if equals else "".join(argv[number + 1 : number + 2]))
    parser = _make_parser(settings_class, argv)
    words = [_spelled(settings_class, word) for word in argv]
    argv = _name_positional(settings_class, _join_lists(settings_class, words))
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # ArgumentError, and whatever else jsonargparse meets in a strange --config file
        raise UserError(_explain(error, parser, argv)) from error
    return settings_class(
        **{field.name: getattr(values, field.name) for field in dataclasses.fields(settings_class)}
    )


def _check_config(file: str) -> None:
    """Raise UserError unless it is a file of settings: a run's hyperparameters.yaml may be somebody
    else's."""
    if not file or file.startswith("--"):
        raise UserError("--config: needs a file of settings, such as a run's hyperparameters.yaml")
    if Path(file).is_file():  # else jsonargparse says so
        content = read_yaml(Path(file))
        if not isinstance(content, dict):
            raise UserError(f"--config {file}: holds no settings; a mapping of names to values is needed")
        if "\\u0000" in json.dumps(content, default=str):
            raise UserError(f"--config {file}: holds a zero character, which no path or name has")


def dump(settings: Any) -> str:
    """Settings as YAML that `--config` of the same command takes back."""
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def _make_parser(settings_class: type, argv: list[str]) -> ArgumentParser:
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        subclasses_enabled=[DataSource],
        import_path_allowlist=[DataSource.__module__],
    )
    parser = ArgumentParser(exit_on_error=False, description=settings_class.__doc__)
    parser.add_argument(
        "--config", action="config", help="A YAML file of settings, such as a run's hyperparameters.yaml."
    )
    parser.add_class_arguments(settings_class, as_group=False)
    if "--data" in argv or "--data=Alpaca" in argv:
        # A source that is asked for has its own defaults; jsonargparse would keep those of a
        # default of the same class.
        parser.set_defaults(data=Alpaca())
    parser._negative_number_matcher = NEGATIVE_NUMBER
    flags = _flags(settings_class)
    for action in parser._actions:
        if action.dest in flags:
            action.nargs, action.const = "?", True  # `--overwrite` alone means true
    return parser


def _name_positional(settings_class: type, argv: list[str]) -> list[str]:
    """`X --flag` as `--path=X --flag`, for a command whose settings say that `path` is what may
    stand alone."""
    name = getattr(settings_class, "positional", None)
    flags = {f"--{field.name}" for field in dataclasses.fields(settings_class) if field.type is bool}
    named = []
    for before, word in zip(["", *argv], argv, strict=False):
        # Behind a flag stands its value only if it says so: `--json X` names X.
        is_value = (
            before.startswith("--")
            and "=" not in before
            and (before not in flags or word.lower() in ("true", "false"))
        )
        stands_alone = name and not word.startswith("-") and not is_value
        if stands_alone and any(other.startswith(f"--{name}=") for other in named):
            raise UserError(f"{word}: one {name} at a time")
        named.append(f"--{name}={word}" if stands_alone else word)
    return named


def _spelled(settings_class: type, word: str) -> str:
    """`--source-model` as `--source_model`; and, of the settings that a class says are SHORTENED,
    any beginning that is of one only."""
    option, equals, value = word.partition("=")
    name = option[2:].replace("-", "_")
    names = {field.name for field in dataclasses.fields(settings_class)}
    if not option.startswith("--") or not name:
        return word
    if name not in names:
        meant = [known for known in getattr(settings_class, "SHORTENED", ()) if known.startswith(name)]
        name = meant[0] if len(meant) == 1 else name
    return f"--{name}{equals}{value}" if name in names else word


def _join_lists(settings_class: type, argv: list[str]) -> list[str]:
    """`--paths a b` as jsonargparse takes a list: `--paths=["a", "b"]`; said twice, the option
    takes both."""
    lists = {
        f"--{field.name}": field.type
        for field in dataclasses.fields(settings_class)
        if field.type in (list[str], list[float])
    }
    found: dict[str, list[str]] = {}
    rest, current = [], None
    for word in argv:
        option, _, value = word.partition("=")
        if option in lists:
            current = found.setdefault(option, [])
            current += [value] if value else []
        elif current is not None and not word.startswith("--"):
            current.append(word)
        else:
            current = None
            rest.append(word)
    for option, words in found.items():
        if not any(words):
            raise UserError(f"{option}: needs a value")
        if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
            rest.append(f"{option}={words[0]}")
        else:
            rest.append(
                f"{option}=[{', '.join(json.dumps(word) if lists[option] == list[str] else word for word in words)}]"
            )
    return rest


def _flags(settings_class: type, prefix: str = "") -> list[str]:
    """The names of all settings that are on or off, those of nested dataclasses too."""
    names = []
    for field in dataclasses.fields(settings_class):
        if field.type is bool:
            names.append(prefix + field.name)
        elif dataclasses.is_dataclass(field.type):
            names += _flags(field.type, f"{prefix}{field.name}.")
    return names


def _explain(error: Exception, parser: ArgumentParser, argv: list[str]) -> str:
    """jsonargparse's message, of several lines, as one that names the option or the file."""
    text = " ".join(str(error).split())
    if "--config" in argv[:-1] and (
        not isinstance(error, ArgumentError) or re.search("config|Group|Option", text)
    ):
        return f"--config {argv[argv.index('--config') + 1]}: {text}"
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return f"{found[1]}: no such option{_did_you_mean(found[1].split('=')[0], parser)}; see --help"
    if found := re.search(r'"data": Expected a dot import path string: (.+)', text):
        return f"--data {found[1]}: no such data source; there are {', '.join(sorted(_data_sources()))}"
    text = re.sub(r"Option '(\S+)' is not accepted", r"no such setting as \1", text)
    text = re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)': ", r"\1: ", text)
    text = re.sub(r'Parser key "([\w.]+)": ?', r"--\1: ", text)
    text = re.sub(
        r"--(\w+): (\w+): --(\w+): ", r"--\1.\3: ", text
    )  # --data: Alpaca: --source: -> --data.source:
    text = re.sub(r"^argument (--[\w.]+): ", r"\1: ", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.+?)\]", lambda literal: literal[1].replace("'", ""), text).replace(
        ", NoneType", ""
    )
    text = re.sub(
        r"Does not validate against .*? Subtypes: \[(.+?)\] Errors: .*? Given value: ",
        r"expected \1, got ",
        text,
    )
    text = re.sub(r"Expected an? (?:typing\.)?(.+?)\. Got value: ", r"expected \1, got ", text)
    return f"{text}; see --help"


def _did_you_mean(option: str, parser: ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    known += [
        f"--data.{field.name}" for source in _data_sources().values() for field in dataclasses.fields(source)
    ]
    close = difflib.get_close_matches(option, known, n=1)
    return f", did you mean {close[0]}" if close else ""


def _data_sources() -> dict[str, type[DataSource]]:
    return {source.__name__: source for source in DataSource.__subclasses__()}


def _plain(value: Any) -> Any:
    """Dataclasses to mappings; a data source also says which one it is."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = {name: _plain(entry) for name, entry in stored_values(value).items()}
    return (
        {"class_path": type(value).__name__, "init_args": fields} if isinstance(value, DataSource) else fields
    )
