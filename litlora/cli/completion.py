"""Completion of `litlora` in bash and zsh, through shtab. Torch-free; needs the extra `completion`."""

import argparse
from typing import Any, Literal, get_args, get_origin

from litlora import settings
from litlora.cli import fail, setting_types
from litlora.cli.program import COMPLETION, SHELLS, Command, commands

DIRECTORIES = ("_dir", "lora_path", "teacher", "include_path")
"""How the names of settings end that are directories."""
FILES = ("path", "html", "output", "prompts", "data", "memory", "config")


def script(words: list[str]) -> None:
    """Print the script for a shell. Exits with one line for another shell, and without shtab."""
    if words not in [[shell] for shell in SHELLS]:
        fail(f"litlora {COMPLETION}: needs a shell, one of {', '.join(SHELLS)}")
    try:
        import shtab
    except ImportError:
        fail("litlora completion: needs shtab; install it with: pip install 'litlora[completion]'")
    print(shtab.complete(parser(shtab), shell=words[0]))


def parser(shtab: Any) -> argparse.ArgumentParser:
    """A parser that knows every command's options, to be read by shtab alone."""
    top = argparse.ArgumentParser(prog="litlora")
    groups = {(): top.add_subparsers()}
    for command in commands():
        *group, name = command.words
        for depth in range(1, len(group) + 1):
            part = tuple(group[:depth])
            if part not in groups:
                groups[part] = groups[part[:-1]].add_parser(part[-1], help=f"{part[-1]} ...").add_subparsers()
        _add_options(groups[tuple(group)].add_parser(name, help=command.summary), command, shtab)
    shells = groups[()].add_parser(COMPLETION, help="completion in a shell")
    shells.add_argument("shell", choices=SHELLS)
    return top


def _add_options(to: argparse.ArgumentParser, command: Command, shtab: Any) -> None:
    types: dict[str, Any] = {"config": str, "print_config": str}
    for name in command.settings:
        types |= setting_types(getattr(settings, name))
    for name, kind in types.items():
        action = to.add_argument(f"--{name}", choices=_choices(kind))
        if name.endswith(DIRECTORIES):
            action.complete = shtab.DIRECTORY
        elif name.rpartition(".")[2] in FILES:
            action.complete = shtab.FILE


def _choices(kind: Any) -> list[str] | None:
    """What a setting can be, if that is a few words."""
    found: list[str] = []
    for each in (kind, *get_args(kind)):
        if get_origin(each) is Literal:
            found += map(str, get_args(each))
        elif each is bool:
            found += ["true", "false"]
    return found or None
