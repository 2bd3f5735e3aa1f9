"""The errors that litlora raises on purpose.

    UserError                   a mistake that the user can correct
    ├── CheckpointError         a checkpoint that is missing, broken or not what it claims to be
    │   └── BaseMismatchError   an adapter that meets another base than the one it was trained on
    ├── DataError               a data file or record that cannot be trained on
    └── MissingExtraError       an optional dependency that is not installed

A message is one line: what is wrong, where, and what to do. The command line prints it on stderr
and exits with status 2. A broken invariant of our own is an `assert`.
"""

import re
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can correct.

    A message names settings through `setting`. `str(error)` shows their plain names; a command
    shows its own options instead (`with_options`).
    """

    def __str__(self) -> str:
        return self.with_options(lambda name: name)

    def with_options(self, option: Callable[[str], str]) -> str:
        """The message with every setting's name replaced by `option(name)`."""
        return with_options(super().__str__(), option)


def setting(name: str) -> str:
    """A setting's name for the message of a UserError, or for a line that a command says through
    `with_options`: "rank" appears as rank in a library, and as --lora.rank or --rank in a command with
    that option."""
    return f"{_MARKS[0]}{name}{_MARKS[1]}"


def with_options(text: str, option: Callable[[str], str]) -> str:
    """A text with every name that `setting` gave replaced by `option(name)`."""
    return _SETTING.sub(lambda found: option(found[1]), text)


_MARKS = ("\x02", "\x03")
_SETTING = re.compile(f"{_MARKS[0]}(\\w+){_MARKS[1]}")


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message begins with its path."""


class BaseMismatchError(CheckpointError):
    """An adapter meets another base than the one it was trained on."""


class DataError(UserError):
    """Training data that cannot be used. The message names the file and, if there is one, the
    record."""


class MissingExtraError(UserError):
    """An optional dependency is not installed. The message names the extra that provides it."""
