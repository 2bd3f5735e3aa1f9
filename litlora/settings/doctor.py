"""The command for what a machine can do."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine can do, for bug reports."""

    measure: bool = True
    """Measure how fast each device multiplies; false: only look."""
    json: bool = False
    """Print everything as JSON."""
