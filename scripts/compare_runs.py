"""Show several runs beside each other: which was best, and in which settings they differ.

python scripts/compare_runs.py out/first out/second
python scripts/compare_runs.py out/* --html compared.html

A run may still be going on. With --html, the curves lie over one another in a page of their own.
"""

from pathlib import Path

from litlora import cli
from litlora.console import say
from litlora.errors import UserError, setting
from litlora.paths import HYPERPARAMETERS_FILE
from litlora.report import compare
from litlora.report.history import History, read_history
from litlora.report.page import Content, html
from litlora.settings import CompareRuns
from litlora.storage.atomic import replacing_file


def main(settings: CompareRuns) -> None:
    target = Path(settings.html) if settings.html else None
    if target is not None:
        _check_target(target, overwrite=settings.overwrite)
    places = dict.fromkeys(Path(run) for run in settings.runs)
    runs = compare.best_first([read_history(place, place / HYPERPARAMETERS_FILE) for place in places])
    figures, differences = compare.figures(runs), compare.differences(runs)
    say(*compare.text(figures), "")
    if differences.rows:
        say(*compare.text(differences))
    else:
        say("their settings do not differ" if len(runs) > 1 else "one run: nothing to compare it with")
    if target is not None:
        _write(target, runs, [figures, *([differences] if differences.rows else [])])
        say(f"page: {target}")


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.is_dir():
        raise UserError(f"{setting('html')} {target}: is a directory; name a file such as compared.html")
    if target.exists() and not overwrite:
        raise UserError(f"{setting('html')} {target}: exists; add {setting('overwrite')} to replace it")


def _write(target: Path, runs: list[History], tables: list[compare.Table]) -> None:
    content = Content(
        title=f"{len(runs)} runs", state="best first", runs=runs, tables=tables, figures=(), about=()
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(target) as staging:
        staging.write_text(html(content), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, CompareRuns)
