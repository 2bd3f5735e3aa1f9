"""The edge of every command: arguments in, one line on a mistake, exit status out. Torch-free.

A command is a function of one settings dataclass; `run` parses the dataclass with jsonargparse and
calls the function. Heavy imports belong inside the function, so that `--help` and a typo answer at
once.
"""

import sys


def _interrupted_early(kind, *error) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, *error)


# Before all other imports, which take most of the time until `run` can catch Ctrl-C.
sys.excepthook = _interrupted_early

import dataclasses
import gc
import itertools
import json
import os
import re
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

from litlora.cli.explain import did_you_mean, explain
from litlora.cli.help import arranged, show_group
from litlora.console import one_line, say
from litlora.errors import UserError
from litlora.ram import is_lack_of_memory
from litlora.settings import REPOSITORY, Alpaca, DataSource, all_sources
from litlora.settings.finetune import quickstart
from litlora.settings.launch import is_first_here
from litlora.storage.untrusted import read_yaml_mapping, require_file

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")


def run(command: Callable[[Settings], None], *settings_classes: type[Settings]) -> None:
    """Parse `sys.argv` into the settings class and call the command; a UserError becomes one line and
    exit status 2. Of several classes it is the one that `meant` finds.

    With LITLORA_DEBUG=1 in the environment a mistake shows its traceback as well.
    """
    # Importing torch creates a million objects, and looking for garbage among them every 700 took a
    # fifth of the time. The threshold is the whole process's, which is ours: it starts here.
    gc.set_threshold(500_000)
    _open_closed_streams()
    settings_class = settings_classes[0]
    try:
        settings_class = meant(settings_classes, sys.argv[1:])
        command(parse(settings_class, sys.argv[1:]))
    except UserError as error:
        fail(error.with_options(lambda name: option_for(settings_class, name)))
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (OSError, RuntimeError, MemoryError, SystemError) as error:
        if is_lack_of_memory(error):
            if os.environ.get("LITLORA_DEBUG") != "1":
                # What failed holds on to all of its memory, and none may be left for the message.
                error.__traceback__ = error.__context__ = None
            reason = one_line(str(error))[:200] or "MemoryError"
            fail(
                f"out of memory ({reason}): end other programs, or raise the limit that this process has "
                "(ulimit -v, a control group)"
            )
        if not isinstance(error, OSError):
            raise
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        if is_first_here():
            print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _open_closed_streams() -> None:
    """Open stdin, stdout and stderr where whoever started us closed them: the next file to be opened
    would become the stream, and get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def fail(message: str) -> NoReturn:
    """Print a user's mistake in one line, and exit with status 2."""
    if os.environ.get("LITLORA_DEBUG") == "1":
        traceback.print_exc()
    if is_first_here():  # with several devices, one process speaks for all
        say(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2) from None


def call(script: str, *arguments: object) -> str:
    """`python chat/base.py` as it is called from the current directory, where the running command
    was called by a path of its own; `litlora chat` where it was called by `litlora`."""
    after = tuple(map(str, arguments))
    if by_program():
        from litlora.cli.program import commands

        words = {each.file.relative_to(REPOSITORY).as_posix(): each.words for each in commands()}
        return shlex.join(("litlora", *words[script], *after))
    beside = os.path.normpath(os.path.join(os.path.dirname(sys.argv[0]), "..", script))
    here = os.path.isfile(script) or not os.path.isfile(beside)
    return shlex.join(("python", script if here else beside, *after))


def by_program() -> bool:
    """Whether the running command was called by `litlora`, not as a file."""
    return len(sys.orig_argv) > 1 and Path(sys.orig_argv[1]).name in ("litlora", "litlora.exe")


def this_command() -> str:
    """The running command without its options, as it was called."""
    if by_program():
        return call(os.path.relpath(sys.argv[0], REPOSITORY))
    return f"python {shlex.quote(sys.argv[0])}"


RESUME = "{command} --config {config} --resume auto"
"""What resumes a run, with {command} in place of `this_command`, and {config} of the file's path."""
REPEAT = "{command} --config {config} --out_dir NEW"
"""The command that does the same in another directory, likewise."""


def chat_with_result() -> str:
    """The command that chats with the result of a run, with {result} in place of its path."""
    return f"{call('chat/base.py')} --checkpoint_dir {{result}}"


def meant(settings_classes: Sequence[type[Settings]], argv: list[str]) -> type[Settings]:
    """The class that has the most of the settings that a command line and its `--config` file name;
    the first of several."""
    if len(settings_classes) == 1:
        return settings_classes[0]
    words = [re.split("[.=]", word.removeprefix("--"), maxsplit=1)[0] for word in argv if word[:2] == "--"]
    named = {word.replace("-", "_") for word in words} | _checked_config(argv)[1].keys()
    return max(
        settings_classes, key=lambda each: len(named & {field.name for field in dataclasses.fields(each)})
    )


def parse(settings_class: type[Settings], argv: list[str]) -> Settings:
    """The settings that a command line asks for. Raises UserError in one line; `--help` and
    `--print_config` exit."""
    config, stored = _checked_config(argv)
    types = setting_types(settings_class)
    words = _spelled_out(settings_class, argv, stored)
    # A source that is asked for has its own defaults; jsonargparse would keep those of a default of
    # the same class.
    parser = make_parser(settings_class, quickstart(), "--data" in words or "--data=Alpaca" in words)
    show_group(parser.format_help, argv)
    try:
        values = parser.parse_args(words)
        _check_nulls(types, values, config)
        values = parser.instantiate(values)
        _check_source_nulls(values.get("data"), config)
        return settings_class(**{name: values[name] for name in types if "." not in name})
    except UserError:
        raise
    except Exception as error:  # ArgumentError, and whatever else a strange --config file leads to
        raise UserError(explain(error, types, config, _data_sources())) from error


# ---- what a command can be told


def setting_types(settings_class: type, prefix: str = "") -> dict[str, Any]:
    """The types of all settings of a command by their full names, such as lora.rank; a data source
    has the settings of all sources."""
    types: dict[str, Any] = {}
    for field in dataclasses.fields(settings_class):
        types[prefix + field.name] = field.type
        nested = _data_sources().values() if field.type is DataSource else (field.type,)
        for inner in filter(dataclasses.is_dataclass, nested):
            types |= setting_types(inner, f"{prefix}{field.name}.")
    return types


def option_for(settings_class: type, name: str) -> str:
    """The option of a command that sets what a library calls `name`: rank -> --lora.rank. Of several
    the outermost; a name that no option has stays as it is."""
    types = setting_types(settings_class)
    if name == BASE and ADAPTER in types:
        return f"--{BASE}"  # every command takes it, see `_renamed`
    found = [path for path in types if path.rpartition(".")[2] == name]
    return f"--{min(found, key=lambda path: path.count('.'))}" if found else name


def _data_sources() -> dict[str, type[DataSource]]:
    return {source.__name__: source for source in all_sources()}


@cache
def make_parser(settings_class: type, base: str, names_source: bool) -> "ArgumentParser":
    """The parser of a command, with or without a data source on its command line. It is made once
    for each default `base`, which depends on the current directory: making it takes longer than
    using it."""
    # Late: most of the time until a command starts, in which Ctrl-C must not show a traceback.
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        subclasses_enabled=[DataSource],
        # Turns jsonargparse's list of modules that no class_path may import from a warning into an
        # error.
        import_path_allowlist=["litlora.settings"],
    )

    class Parser(ArgumentParser):
        def format_help(self) -> str:
            helps = {action.dest: action.help or "" for action in self._actions}
            return arranged(super().format_help(), getattr(settings_class, "MATTERS", ()), helps)

    parser = Parser(exit_on_error=False, description=settings_class.__doc__)
    parser.add_argument(
        "--config", action="config", help="A YAML file of settings, such as a run's hyperparameters.yaml."
    )
    parser.add_class_arguments(settings_class, as_group=False)
    if any(field.default_factory is quickstart for field in dataclasses.fields(settings_class)):
        parser.set_defaults({CHECKPOINT: base})
    if names_source:
        parser.set_defaults(data=Alpaca())
    flags = {name for name, kind in setting_types(settings_class).items() if kind is bool}
    for action in parser._actions:  # no public way leads to an argument that a class has made
        if action.dest in flags:
            action.nargs, action.const = "?", True  # `--overwrite` alone means true
        if action.dest == "data":
            # jsonargparse would add all settings of the default, and the full names of the classes.
            action._jsonargparse_preexpanded_help = True
            action.help += f" Sources: {', '.join(_data_sources())}."
    return parser


# ---- from what people type to what jsonargparse takes

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$|-nan$", re.IGNORECASE)
"""What is a value although it begins like an option: argparse does not recognise -1e-3."""
LISTS = (list[str], list[float])
CHECKPOINT, ADAPTER, BASE = "checkpoint_dir", "lora_path", "base_checkpoint_dir"


def _spelled_out(settings_class: type, argv: list[str], stored: Mapping[str, Any]) -> list[str]:
    """The command line with options by their full names, lists in brackets, negative numbers
    attached to their options, a file of data with its source, and the value that may stand alone
    with its option. `stored` is what the file of `--config` holds."""
    types = setting_types(settings_class)
    lists: dict[str, list[str]] = {}
    words: list[str] = []
    named_by_data = False
    split = [
        (word, _full_name(settings_class, word.removeprefix("--").partition("=")[0]), following)
        for word, following in _by_option(argv)
    ]
    renamed = _renamed(types, {name for _, name, _ in split}, stored)
    for word, name, following in split:
        typed, equals, value = word.removeprefix("--").partition("=")
        name = renamed.get(name, name)
        kind = types.get(name)
        if kind in LISTS and "." not in name:
            lists.setdefault(name, []).extend([value] * bool(value) + following)
            continue
        if kind not in (None, bool) and not equals and not following:
            raise UserError(f"--{name}: needs a value")
        if kind is None and word.startswith(f"{OPTION_DATA}.") and not equals and not following:
            if not name.endswith(".help"):
                raise UserError(f"{word}: no such option{did_you_mean(word, types)}; see {HELP_OF_FILES}")
        word = word.replace(typed, name, 1)
        if kind is DataSource and _is_path(value if equals else following[0]):
            path = value if equals else following.pop(0)
            named_by_data = True
            words.append(_source_of(path))
            word = f"{DATA_PATH}={path}"
            if following and all(map(os.path.exists, following)):
                raise UserError(
                    f"{OPTION_DATA} {path} {following[0]}: takes one path; put a pattern in quotes: "
                    f"{OPTION_DATA} '*{Path(path).suffix}'"
                )
        if kind is bool and "." in name and not equals and not following:
            word = f"{word}=true"  # the parser of a source's settings is not ours to teach
        if kind is not None and not equals and following and NEGATIVE_NUMBER.match(following[0]):
            word = f"{word}={following.pop(0)}"
        stray = kind is bool and following and following[0].lower() not in ("true", "false")
        own = 1 if word and "=" not in word and not stray else 0  # of `--json X`, X is not the flag's
        words += [word] * bool(word) + following[:own]
        strays, alone = following[own:], getattr(settings_class, "positional", None)
        if strays and types.get(alone) in LISTS:
            lists.setdefault(alone, []).extend(strays)
        else:
            words += _named(settings_class, strays, words)
    given = [word.partition("=")[0] for word in words]
    if named_by_data and given.count(DATA_PATH) > 1:
        raise UserError(f"{DATA_PATH}: {OPTION_DATA} names the data already; use only one")
    if "data" in types and "data" not in stored and OPTION_DATA not in given:
        words = _with_source(words, given)
    return words + [f"--{name}={_as_list(name, values, types[name])}" for name, values in lists.items()]


def _renamed(types: Mapping[str, Any], given: set[str], stored: Mapping[str, Any]) -> dict[str, str]:
    """What the options for an adapter and its base set in this command: an adapter alone may be
    called by either name, beside one the base may. So one command line fits all commands."""
    if ADAPTER in types:
        alone = ADAPTER not in given and ADAPTER not in stored
        return {BASE: CHECKPOINT} | ({CHECKPOINT: ADAPTER} if alone else {})
    if ADAPTER in given and BASE in types and "train" not in types:  # training may not replace its base
        return {ADAPTER: CHECKPOINT, CHECKPOINT: BASE}
    return {}


def _with_source(words: list[str], given: list[str]) -> list[str]:
    """The words with the data source that `--data.path` or `--data.sources` alone stands for, before
    its first setting."""
    source = None
    if DATA_PATH in given:
        at = given.index(DATA_PATH)
        path = words[at].partition("=")[2] or "".join(words[at + 1 : at + 2])
        source = _source_of(path)
    elif DATA_SOURCES in given:
        source = f"{OPTION_DATA}=Mix"
    if source is None:
        return words
    first = [word.startswith(OPTION_DATA) for word in words].index(True)
    return [*words[:first], source, *words[first:]]


OPTION_DATA, DATA_PATH, DATA_SOURCES = "--data", "--data.path", "--data.sources"
HELP_OF_FILES = "--data.help Files"
FILES_SUFFIXES = (
    *(".csv", ".tsv", ".parquet", ".pq", ".arrow", ".feather"),
    *(".ndjson", ".gz", ".zst", ".zstd", ".txt", ".xlsx"),
)
DATA_SUFFIXES = (".json", ".jsonl", *FILES_SUFFIXES)
"""How the names of data files end. The reader refuses those that it cannot read."""


def _source_of(path: str) -> str:
    """The option for a path's data source. Where earlier versions read JSON only, it keeps their
    name for it, so that runs are found again and repeated."""
    is_new = path.startswith("hf://") or Path(path).suffix.lower() in FILES_SUFFIXES or "*" in path
    return f"{OPTION_DATA}={'Files' if is_new else 'JSON'}"


def _is_path(value: str) -> bool:
    """Whether the value of `--data` is a file or directory, not the name of a source."""
    if value in _data_sources() or value.startswith(("{", "[")):
        return False
    return Path(value).suffix.lower() in DATA_SUFFIXES or "/" in value or os.path.exists(value)


def _by_option(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words that follow it; first, with "", those that stand before any."""
    starts = [number for number, word in enumerate(argv) if word.startswith("--")] + [len(argv)]
    yield "", argv[: starts[0]]
    for start, end in itertools.pairwise(starts):
        yield argv[start], argv[start + 1 : end]


def _full_name(settings_class: type, typed: str) -> str:
    """`source-model` as source_model; and, of the settings that a class says are SHORTENED, any
    beginning that only one of them has."""
    name = typed.replace("-", "_")
    names = {field.name for field in dataclasses.fields(settings_class)}
    if name in names or not name:
        return name
    meant = [known for known in getattr(settings_class, "SHORTENED", ()) if known.startswith(name)]
    return meant[0] if len(meant) == 1 else typed


def _named(settings_class: type, strays: list[str], before: list[str]) -> list[str]:
    """`X` as `--path=X`, for a command whose settings say that `path` is what may stand alone."""
    name = getattr(settings_class, "positional", None)
    named = [word if word.startswith("-") or not name else f"--{name}={word}" for word in strays]
    given = [word for word in [*before, *named] if word.startswith(f"--{name}")]
    if name and strays and len(given) > 1:
        raise UserError(f"{strays[-1]}: one {name} at a time")
    return named


def _as_list(name: str, values: list[str], kind: Any) -> str:
    """`a b` as jsonargparse takes a list, `["a", "b"]`; what is in brackets already stays."""
    if not any(values):
        raise UserError(f"--{name}: needs a value")
    if len(values) == 1 and values[0].startswith("[") and values[0].endswith("]"):
        return values[0]
    return f"[{', '.join(map(json.dumps, values) if kind == list[str] else values)}]"


# ---- what may be wrong


def _checked_config(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """The file that `--config` names, or "", and what it holds. Raises UserError unless that is
    settings: a run's hyperparameters.yaml may be somebody else's."""
    file, content = "", {}
    for number, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option != "--config":
            continue
        file = value if equals else "".join(argv[number + 1 : number + 2])
        if not file or file.startswith("--"):
            raise UserError("--config: needs a file of settings, such as a run's hyperparameters.yaml")
        if Path(file).exists():  # else jsonargparse says so
            require_file(Path(file))
        if Path(file).is_file():
            content = read_yaml_mapping(Path(file))
            if "\\u0000" in json.dumps(content, default=str):
                raise UserError(f"--config {file}: holds a zero character, which no path or name has")
    return file, content


def _check_nulls(types: dict[str, Any], values: Any, config: str) -> None:
    """Raise UserError for a null that a setting does not take, and for a value where a group of
    settings is needed: jsonargparse lets both pass in a file."""
    from jsonargparse import Namespace

    for name, kind in types.items():
        if name.startswith("data."):  # where a source's own settings stand depends on the source
            continue
        value = values.get(name)
        if value is None and type(None) not in get_args(kind):
            raise UserError(f"--config {config}: {name} must not be null; leave it out for its default")
        if dataclasses.is_dataclass(kind) and not isinstance(value, Namespace):
            raise UserError(f"--config {config}: {name} {value}: must be a mapping of settings to values")


def _check_source_nulls(source: Any, config: str) -> None:
    """The same for the settings of the data source that was chosen."""
    for field in dataclasses.fields(source) if dataclasses.is_dataclass(source) else ():
        if getattr(source, field.name) is None and type(None) not in get_args(field.type):
            raise UserError(
                f"--config {config}: data.{field.name} must not be null; leave it out for its default"
            )
