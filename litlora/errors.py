"""The errors litlora raises on purpose.

    UserError                 a mistake that the user can mend: one line that says what is wrong, where, and what to do
    ├── CheckpointError       a checkpoint directory or file that is missing, broken or not what it claims to be
    │   └── BaseMismatchError an adapter that was trained on another base than the one at hand
    ├── DataError             a data file or record that cannot be trained on
    └── MissingExtraError     an optional dependency that is not installed

The command line turns each into one line on stderr and exit status 2. A broken invariant of our own is an `assert`.
"""


class UserError(Exception):
    """A mistake of the user's: the message is one line that names the thing, its place and the way out."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message begins with its path."""


class BaseMismatchError(CheckpointError):
    """An adapter meets another base than the one it was trained on."""


class DataError(UserError):
    """Training data that cannot be used; the message names the file and, where there is one, the record."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message names the extra that brings it."""
