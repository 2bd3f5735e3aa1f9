"""evaluation.json: what was measured of a checkpoint, beside it. Torch-free."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from litlora.errors import UserError
from litlora.storage.atomic import replacing_file
from litlora.storage.untrusted import read_json_object

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measure of a checkpoint on one set of data, or one task of the harness."""

    measure: str
    """Its name, or the task's as harness/NAME."""
    data: str
    how: dict[str, Any]
    """What else the figures depend on: the prompt style, the number format, whether an adapter was
    live, the settings of the measure."""
    records: int
    figures: dict[str, float]
    wrong: list[dict[str, Any]] = field(default_factory=list)

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.measure, self.data, json.dumps(self.how, sort_keys=True)

    def rows(self) -> list[list[str]]:
        """A row for each figure: measure, figure, value, records, data. A standard error stands
        behind its figure."""
        errors = {name: value for name, value in self.figures.items() if name.endswith("_stderr")}
        rows = []
        for name, value in self.figures.items():
            if name in errors:
                continue
            error = errors.get(f"{name}_stderr")
            shown = f"{value:,.0f}" if value.is_integer() and value > 1 else f"{value:.4f}"
            shown += "" if error is None else f" ± {error:.4f}"
            rows.append([self.measure, name, shown, f"{self.records:,}", self.data])
        return rows


HEAD = ("measure", "figure", "value", "records", "data")


def read_results(file: Path) -> list[Result]:
    """Those that a file holds; none if it does not exist. Raises UserError for a file of something
    else."""
    if not file.exists():
        return []
    values = read_json_object(file)
    try:
        if values.get("format") != FORMAT:
            raise ValueError
        found = [Result(**result) for result in values["results"]]
        for result in found:
            result.rows()  # their figures are numbers
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: does not hold results of an evaluation; move it away") from None
    return found


def add_results(file: Path, new: Sequence[Result]) -> list[Result]:
    """Write results into a file, in place of earlier ones of the same measures; returns all of
    them."""
    replaced = {result.identity for result in new}
    results = [result for result in read_results(file) if result.identity not in replaced] + [*new]
    values = {"format": FORMAT, "results": [asdict(result) for result in results]}
    with replacing_file(file) as staging:
        staging.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return results
