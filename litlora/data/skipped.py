"""Records that cannot be used and are left out. Torch-free."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from litlora.errors import DataError, setting

NAMED = 3
"""How many of them are named."""


class Skipped:
    """How many records were left out, and the errors of the first of them: there may be millions."""

    def __init__(self) -> None:
        self.number = 0
        self.first: list[DataError] = []

    def append(self, error: DataError) -> None:
        """Note one more."""
        self.number += 1
        if len(self.first) < NAMED:
            self.first.append(error)

    @property
    def reasons(self) -> list[str]:
        """The messages of the first, in which a command still puts its options."""
        return [error.args[0] for error in self.first]

    def notices(self) -> list[str]:
        """What the user must know of them; nothing if there are none."""
        return [skipped_notice(self.number, self.reasons)] if self.number else []


def skipped_notice(number: int, first: Iterable[str]) -> str:
    """How many records were left out, with the places and reasons of the first NAMED."""
    reasons = [*first] + [f"and {number - NAMED:,} more"] * (number > NAMED)
    return f"{number:,} {'record was' if number == 1 else 'records were'} left out: {' | '.join(reasons)}"


@contextmanager
def reading_files(on_bad: str) -> Iterator[None]:
    """Where bad records are skipped, an error of a whole file inside the block says that files are not:
    nothing tells how many records would be lost with one."""
    try:
        yield
    except DataError as error:
        if on_bad != "skip":
            raise
        why = f"{setting('on_bad')} skip leaves out records of files that can be read, never a file"
        raise DataError(f"{error.args[0]} ({why})") from None
