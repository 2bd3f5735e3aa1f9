"""The errors litlora raises on purpose.

    UserError                 a mistake that the user can mend: one line that says what is wrong, where, and what to do
    ├── CheckpointError       a checkpoint directory or file that is missing, broken or not what it claims to be
    │   └── BaseMismatchError an adapter that was trained on another base than the one at hand
    ├── DataError             a data file or record that cannot be trained on
    └── MissingExtraError     an optional dependency that is not installed

The command line turns each into one line on stderr and exit status 2. A broken invariant of our own
is an `assert`.
"""

import re
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's: one line that names the thing, its place and the way out.

    A message names settings through `setting`. `str(error)` shows them by their plain names; a
    command shows them as its own options, by `with_options`.
    """

    def __str__(self) -> str:
        return self.with_options(lambda name: name)

    def with_options(self, option: Callable[[str], str]) -> str:
        """The message, each setting's name replaced by `option(name)`."""
        return _SETTING.sub(lambda found: option(found[1]), super().__str__())


def setting(name: str) -> str:
    """A setting's name for the message of a UserError: "rank" is shown as rank by a library, and as
    --lora.rank or --rank by the command that has it as its option."""
    return f"{_MARKS[0]}{name}{_MARKS[1]}"


_MARKS = ("\x02", "\x03")
_SETTING = re.compile(f"{_MARKS[0]}(\\w+){_MARKS[1]}")


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message begins with its path."""


class BaseMismatchError(CheckpointError):
    """An adapter meets another base than the one it was trained on."""


class DataError(UserError):
    """Training data that cannot be used; the message names the file and, where there is one, the
    record."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message names the extra that brings it."""
