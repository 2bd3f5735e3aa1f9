"""metrics.csv: one row for each logged step and each validation."""

import csv
import io
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litlora.report.events import Evaluated, Event, Logged, Validation
from litlora.report.sinks import Sink, say_if_possible
from litlora.storage.atomic import replacing_file

METRICS_FILE = "metrics.csv"
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "val_loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "seconds",
    "skipped",
    "peak_memory_gib",
)


class Metrics(Sink):
    """metrics.csv; a row is on its way to the disk as soon as it is written."""

    def __init__(self, path: Path, earlier: str | None = None, figures: tuple[str, ...] = ()) -> None:
        """`earlier`: the text of the file at the step from which the run resumes; its columns stay.
        `figures`: what the objective measures besides its loss, and what probes measure; each has a
        column of its own."""
        self._path = path
        self._columns = COLUMNS + figures
        if earlier:
            self._columns = tuple(next(csv.reader(io.StringIO(earlier))))
        self._rows = [earlier or self._line(dict(zip(self._columns, self._columns, strict=True)))]
        with replacing_file(path) as staging:
            staging.write_text(self.text, encoding="utf-8", newline="")
        self._size = path.stat().st_size
        self._pending: list[str] = []

    @property
    def text(self) -> str:
        """The whole file, including rows that could not be written yet."""
        return "".join(self._rows)

    def handle(self, event: Event) -> None:
        if isinstance(event, Logged | Validation | Evaluated):
            values = asdict(event)
            values |= values.pop("figures", {})
            if isinstance(event, Logged):
                values["peak_memory_gib"] = event.peak_memory / 2**30
            self._write({name: value for name, value in values.items() if name in self._columns})

    def _write(self, row: dict[str, Any]) -> None:
        """Write a row; on a full disk, say so and keep the rows for later."""
        line = self._line(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        )
        self._rows.append(line)
        self._pending.append(line)
        rows = "".join(self._pending).encode()
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._size)  # over a part of a row, should one have been written
                if file.write(rows) < len(rows):
                    raise OSError("only a part could be written")
            self._size += len(rows)
            self._pending.clear()
        except OSError as error:
            if len(self._pending) == 1:
                say_if_possible(
                    f"note: {self._path} cannot be written ({error.strerror or error}); "
                    "its rows are kept in memory",
                    file=sys.stderr,
                )

    def _line(self, row: dict[str, Any]) -> str:
        line = io.StringIO()
        csv.DictWriter(line, self._columns).writerow(row)
        return line.getvalue()
