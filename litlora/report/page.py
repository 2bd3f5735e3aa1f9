"""report.html: one self-contained page with the curves of a run, or of several. Torch-free.

It asks nothing of a network and runs from the disk. What it shows is metrics.csv, so that a resumed
run has its whole past.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litlora.report.console import duration
from litlora.report.events import Begun, Done, Evaluated, Event, Logged, Note, Sampled, Saved, Validation
from litlora.report.history import History, parse_metrics
from litlora.report.metrics import METRICS_FILE
from litlora.report.sinks import Sink
from litlora.storage.atomic import replacing_file

PAGE_FILE = "report.html"
MOST_ROWS = 3000
"""Of one run in a page; the rest is thinned out."""
SECONDS_BETWEEN = 10
"""At least so long a page stays as it is while a run goes on, and 100 times as long as it took to
write: a page must not slow a run."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in a page."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(kw_only=True)
class Content:
    """What a page shows."""

    title: str
    state: str
    runs: Sequence[History]
    figures: Sequence[tuple[str, str]] = ()
    """Labels and values, shown large."""
    about: Sequence[str] = ()
    """Lines in front of the curves."""
    tables: Sequence[Table] = ()
    texts: Sequence[tuple[str, str]] = ()
    """Headings and what stands under them as it is, behind the curves."""
    running: bool = False
    """Whether the page is to load itself again."""


def html(content: Content) -> str:
    """The page."""
    data = {
        "title": content.title,
        "state": content.state,
        "running": content.running,
        "figures": list(content.figures),
        "about": list(content.about),
        "runs": [
            {"name": run.name, "columns": run.columns, "rows": run.thinned(MOST_ROWS)} for run in content.runs
        ],
        "tables": [_plain(table) for table in content.tables],
        "texts": list(content.texts),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("@DATA@", _as_text(data))


DATA = re.compile(r'(?<=<script type="application/json" id="data">).*?(?=</script>)', re.DOTALL)


def add_table(file: Path, table: Table) -> bool:
    """Put a table into a page, in place of one of the same title. Returns whether the file is a page of
    ours."""
    text = file.read_text(encoding="utf-8")
    try:
        data = json.loads(DATA.search(text)[0])
        others = [other for other in data["tables"] if other["title"] != table.title]
    except (TypeError, KeyError, ValueError):
        return False
    data["tables"] = [*others, _plain(table)]
    with replacing_file(file) as staging:
        staging.write_text(DATA.sub(lambda _: _as_text(data), text, count=1), encoding="utf-8")
    return True


def _plain(table: Table) -> dict[str, Any]:
    return {"title": table.title, "head": list(table.head), "rows": [list(row) for row in table.rows]}


def _as_text(data: dict[str, Any]) -> str:
    # Inside <script> only `</` and `<!` could end or change what is read.
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


@dataclass
class Page(Sink):
    """The report.html of a run, written again while it goes on."""

    directory: Path
    """That of the run, which holds metrics.csv."""
    about: Sequence[str]
    """Lines on what is trained."""
    settings: str
    """hyperparameters.yaml."""
    command: str
    """What repeats the run."""
    _total: int = 0
    _step: int = 0
    _notes: list[str] = field(default_factory=list)
    _samples: list[Sampled] = field(default_factory=list)
    _next: float = float("-inf")
    _running: bool = False
    """Whether the page says that the run goes on."""

    def handle(self, event: Event) -> None:
        match event:
            case Begun():
                self._total, self._step = event.total_steps, event.step
            case Sampled():
                self._samples.append(event)
            case Logged() | Validation() | Evaluated() | Saved():
                self._step = event.step
                if time.monotonic() >= self._next:
                    left = f"step {self._step:,} of {self._total:,}; this page loads itself again"
                    self._write(left, (), running=True)
            case Note():
                self._notes.append(event.text)
            case Done():
                self._write(*_outcome(event), running=False)

    def close(self) -> None:
        if self._running:  # an error ended the run
            self._write(f"ended by an error after step {self._step:,} of {self._total:,}", (), running=False)

    def _write(self, state: str, figures: Sequence[tuple[str, str]], *, running: bool) -> None:
        began = time.monotonic()
        file = self.directory / METRICS_FILE
        columns, rows = parse_metrics(file.read_text(encoding="utf-8"), file)
        history = History(str(self.directory), columns, rows, {})
        if history.best_val is not None:
            figures = [*figures, ("lowest validation loss", f"{history.best_val:.4f}")]
        notes = [("Notes", "\n".join(self._notes))] if self._notes else []
        content = Content(
            title=str(self.directory),
            state=state,
            runs=[history],
            figures=figures,
            about=self.about,
            tables=_samples(self._samples),
            texts=[("To repeat this run", self.command), *notes, ("Settings", self.settings)],
            running=running,
        )
        with replacing_file(self.directory / PAGE_FILE) as staging:
            staging.write_text(html(content), encoding="utf-8")
        self._running = running
        ended = time.monotonic()
        self._next = ended + max(SECONDS_BETWEEN, 100 * (ended - began))


def _samples(found: Sequence[Sampled]) -> list[Table]:
    """What the model said to the same prompts, before training and after it."""
    if not found:
        return []
    head = ["prompt", *("before training" if not one.step else f"after step {one.step:,}" for one in found)]
    asked = [one.samples for one in found]
    rows = [[same[0].prompt, *(sample.answer for sample in same)] for same in zip(*asked, strict=True)]
    if any(sample.expected for sample in asked[0]):
        head.append("expected")
        rows = [[*row, sample.expected] for row, sample in zip(rows, asked[0], strict=True)]
    return [Table(title="Samples", head=head, rows=rows)]


def _outcome(done: Done) -> tuple[str, list[tuple[str, str]]]:
    """How a run ended, and its figures."""
    state = "complete" if done.stopped is None else f"stopped by {done.stopped} after step {done.steps:,}"
    figures: list[tuple[str, Any]] = [("steps", f"{done.steps:,}"), ("of training", duration(done.seconds))]
    if done.seconds > 0:
        figures.append(("tokens a second", f"{done.tokens / done.seconds:,.0f}"))
    figures.append(("peak memory", f"{done.peak_memory / 2**30:.2f} GiB"))
    if done.loss is not None:
        figures.append(("loss", f"{done.loss:.4f}"))
    if done.val_loss is not None:
        figures.append(("validation loss", f"{done.val_loss:.4f}"))
    if done.skipped:
        figures.append(("steps skipped", f"{done.skipped:,}"))
    return state, figures
