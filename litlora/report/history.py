"""What a run directory tells of its run: the rows of metrics.csv, and the settings. Torch-free."""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.errors import UserError
from litlora.report.metrics import METRICS_FILE
from litlora.storage.untrusted import read_yaml_mapping, require_file

MAX_BYTES = 2**28
"""Of a metrics.csv; 100 bytes a row make two million rows."""


@dataclass(frozen=True)
class History:
    """What was logged while a run trained."""

    name: str
    """The directory, as it was named."""
    columns: tuple[str, ...]
    rows: list[list[float | None]]
    """A value for each column; None where a row has none, or none that is finite."""
    settings: Mapping[str, Any]
    """As resolved, by their full names: train.learning_rate."""

    def column(self, name: str) -> list[float]:
        """The values that there are, in order."""
        if name not in self.columns:
            return []
        at = self.columns.index(name)
        return [row[at] for row in self.rows if row[at] is not None]

    @property
    def steps(self) -> int:
        return int(max(self.column("step"), default=0))

    @property
    def last_loss(self) -> float | None:
        """The last loss of training, in nats; infinite if it was not finite."""
        for row in map(dict, (zip(self.columns, row, strict=True) for row in reversed(self.rows))):
            if row["loss"] is not None:
                return row["loss"]
            if row.get("learning_rate") is not None:  # steps were logged, and no validation
                return math.inf
        return None

    @property
    def best_val(self) -> float | None:
        """The lowest validation loss, in nats."""
        return min(self.column("val_loss"), default=None)

    def thinned(self, most: int) -> list[list[float | None]]:
        """At most about `most` rows, evenly taken, with the first, the last, and every validation
        and the least and greatest loss of each stretch that is left out."""
        if len(self.rows) <= most:
            return self.rows
        loss = self.columns.index("loss")
        val = self.columns.index("val_loss")
        step = math.ceil(3 * len(self.rows) / most)
        kept: set[int] = {0, len(self.rows) - 1}
        for start in range(0, len(self.rows), step):
            stretch = range(start, min(start + step, len(self.rows)))
            known = [number for number in stretch if self.rows[number][loss] is not None]
            if known:
                kept |= {min(known, key=lambda n: self.rows[n][loss]), known[-1]}
                kept.add(max(known, key=lambda n: self.rows[n][loss]))
            kept |= {number for number in stretch if self.rows[number][val] is not None}
        return [self.rows[number] for number in sorted(kept)]


def read_history(directory: Path, settings: Path) -> History:
    """The run in a directory, whose settings are in that file, if it exists. Raises UserError if the
    directory holds no run, or a file is broken."""
    metrics = directory / METRICS_FILE
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; name the out_dir of a run")
    if not metrics.exists():
        hint = f"; name {directory.parent}" if (directory.parent / METRICS_FILE).is_file() else ""
        raise UserError(f"{directory}: holds no {METRICS_FILE}, so it is not the directory of a run{hint}")
    require_file(metrics)
    if metrics.stat().st_size > MAX_BYTES:
        raise UserError(f"{metrics}: has {metrics.stat().st_size:,} bytes; a run's has at most {MAX_BYTES:,}")
    columns, rows = parse_metrics(metrics.read_bytes().decode("utf-8", "replace"), metrics)
    stored = flat_settings(settings) if settings.exists() else {}
    return History(str(directory), columns, rows, stored)


def parse_metrics(text: str, file: Path) -> tuple[tuple[str, ...], list[list[float | None]]]:
    """The columns and rows of a metrics.csv. A last line that is not whole is left out: it is being
    written. Raises UserError naming the line that is broken."""
    whole = text[: text.rfind("\n") + 1]
    lines = csv.reader(io.StringIO(whole))
    try:
        columns = tuple(next(lines, ()))
        for needed in ("step", "loss", "val_loss"):
            if needed not in columns:
                raise UserError(f"{file}: line 1: has no column {needed}; it is not a run's {METRICS_FILE}")
        rows = []
        for line in lines:
            if len(line) != len(columns):
                raise UserError(
                    f"{file}: line {lines.line_num}: has {len(line)} values for {len(columns)} columns"
                )
            rows.append([_number(value, file, lines.line_num) for value in line])
    except csv.Error as error:
        raise UserError(f"{file}: line {lines.line_num}: {error}") from None
    return columns, rows


def _number(text: str, file: Path, line: int) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{file}: line {line}: {text[:40]!r} is not a number") from None
    return value if math.isfinite(value) else None


def flat_settings(file: Path) -> dict[str, Any]:
    """The settings in a hyperparameters.yaml by their full names."""
    require_file(file)
    return dict(flat(read_yaml_mapping(file)))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names: train.learning_rate."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
