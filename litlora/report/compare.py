"""Several runs beside each other: which was best, and which settings differ. Torch-free."""

import math
from collections.abc import Sequence
from typing import Any

from litlora.report.console import duration
from litlora.report.history import History
from litlora.report.page import Table

PLACES = ("out_dir", "overwrite", "resume", "resume_force")
"""Settings that say where a run is written, not what it does."""


def best_first(runs: Sequence[History]) -> list[History]:
    """In the order of their lowest validation loss; those without one follow by their last loss."""

    def rank(run: History) -> tuple[float, float]:
        val = math.inf if run.best_val is None else run.best_val
        return val, math.inf if run.last_loss is None else run.last_loss

    return sorted(runs, key=rank)


def figures(runs: Sequence[History]) -> Table:
    """What each run came to."""
    rows = []
    for run in runs:
        vals, seconds = run.column("val_loss"), run.column("seconds")
        rates = [rate for rate in run.column("tokens_per_second") if rate > 0]
        at = "" if run.best_val is None else f"{_step_of(run, run.best_val):,}"
        rows.append(
            [
                run.name,
                _loss(run.best_val),
                at,
                _loss(vals[-1] if vals else None),
                _loss(run.last_loss),
                f"{run.steps:,}",
                f"{sorted(rates)[len(rates) // 2]:,.0f}" if rates else "",
                duration(max(seconds)) if seconds else "",
            ]
        )
    head = ["run", "best val_loss", "at step", "last val_loss", "last loss", "steps", "tokens/s", "time"]
    return Table(title="Best first", head=head, rows=rows)


def differences(runs: Sequence[History]) -> Table:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [_shown(run.settings[name]) if name in run.settings else "-" for run in runs]
        if name not in PLACES and len(set(values)) > 1:
            rows.append([name, *values])
    return Table(title="Settings that differ", head=["setting", *(run.name for run in runs)], rows=rows)


def _step_of(run: History, val_loss: float) -> int:
    step, val = run.columns.index("step"), run.columns.index("val_loss")
    return next(int(row[step] or 0) for row in run.rows if row[val] == val_loss)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def text(table: Table) -> list[str]:
    """A table as lines of a terminal."""
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell[:1].isdigit() or not cell for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (table.head, *table.rows)
    ]
