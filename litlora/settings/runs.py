"""The command for the runs that there are."""

from dataclasses import dataclass
from typing import ClassVar

from litlora.errors import setting
from litlora.settings.checks import check


@dataclass(frozen=True, kw_only=True)
class CompareRuns:
    """Show the runs of several directories beside each other: figures, best first, and the settings
    that differ."""

    runs: list[str]
    """The directories of runs: what their out_dir was. They may stand alone, without --runs."""
    html: str | None = None
    """Also write the curves over one another to this file, a page that needs no network."""
    overwrite: bool = False
    """Replace the file of html."""

    positional: ClassVar[str] = "runs"

    def __post_init__(self) -> None:
        check(len(self.runs) > 0, f"{setting('runs')} is empty: name the directory of a run")
