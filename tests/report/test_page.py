"""report.html: what it holds, while a run goes on and after it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from litlora.errors import UserError
from litlora.report.events import Begun, Done, Logged, Note, Validation
from litlora.report.history import History, parse_metrics
from litlora.report.metrics import Metrics
from litlora.report.page import Content, Page, Table, add_table, html
from litlora.report.sinks import Sinks


def data_of(page: str):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def logged(step, loss):
    return Logged(step, 0, loss, 1e-3, 0.5, 10 * step, 10, 100.0, 0.1 * step, 0, peak_memory=2**29 * step)


def run(directory: Path, *, earlier=None, steps=range(1, 4)):
    """The events of a run, to its metrics and its page."""
    metrics = Metrics(directory / "metrics.csv", earlier)
    page = Page(directory, ["base: tiny </script><b>"], "lora:\n  rank: 4\n", "python train.py")
    sinks = Sinks([metrics, page])
    sinks.handle(Begun(steps[0] - 1, 3))
    for step in steps:
        sinks.handle(logged(step, 2.0 / step))
    sinks.handle(Validation(steps[-1], 0, 0.75, 30, 0.3, 0))
    sinks.handle(Note("a checkpoint could not be saved"))
    return sinks, metrics


def test_a_page_shows_the_run_while_it_goes_on_and_after_it(tmp_path):
    sinks, _ = run(tmp_path)
    page = tmp_path / "report.html"
    first = data_of(page.read_text())
    assert first["running"] and first["state"].startswith("step 1 of 3")
    sinks.handle(Done(3, 2.0, 60, 0.5, 0.75, 2**30, 0, None, None))
    text = page.read_text()
    found = data_of(text)
    assert not found["running"] and found["state"] == "complete"
    assert dict(found["figures"]) == {
        "steps": "3",
        "of training": "0:02",
        "tokens a second": "30",
        "peak memory": "1.00 GiB",
        "loss": "0.5000",
        "validation loss": "0.7500",
        "lowest validation loss": "0.7500",
    }
    (curves,) = found["runs"]
    loss = curves["columns"].index("loss")
    assert [row[loss] for row in curves["rows"]] == [2.0, 1.0, pytest.approx(2 / 3, 1e-5), None]
    assert found["about"] == ["base: tiny </script><b>"]
    assert ["Notes", "a checkpoint could not be saved"] in found["texts"]
    assert ["Settings", "lora:\n  rank: 4\n"] in found["texts"]
    assert text.count("</script>") == 2 and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_page_of_a_run_that_an_error_ended_says_so(tmp_path):
    sinks, _ = run(tmp_path)
    sinks.close()
    found = data_of((tmp_path / "report.html").read_text())
    assert not found["running"] and found["state"] == "ended by an error after step 3 of 3"
    assert len(found["runs"][0]["rows"]) == 4, "what came after the page was last written is there, too"
    sinks, _ = run(tmp_path)
    sinks.handle(Done(3, 2.0, 60, 0.5, 0.75, 2**30, 0, None, None))
    sinks.close()
    assert data_of((tmp_path / "report.html").read_text())["state"] == "complete"


def test_a_resumed_run_shows_its_whole_past(tmp_path):
    _, metrics = run(tmp_path)
    sinks, _ = run(tmp_path, earlier=metrics.text, steps=range(4, 6))
    sinks.handle(Done(5, 2.0, 60, 0.5, 0.75, 2**30, 0, None, None))
    (curves,) = data_of((tmp_path / "report.html").read_text())["runs"]
    assert [row[0] for row in curves["rows"]] == [1, 2, 3, 3, 4, 5, 5]


def test_columns_stay_where_a_run_of_an_earlier_version_resumes(tmp_path):
    earlier = "step,epoch,loss,val_loss\r\n1,0,2.5,\r\n"
    sinks, metrics = run(tmp_path, earlier=earlier, steps=[2])
    assert metrics.text.splitlines() == [*earlier.splitlines(), "2,0,1,", "2,0,,0.75"]


def test_a_result_of_an_evaluation_is_added_once(tmp_path):
    sinks, _ = run(tmp_path)
    table = Table(title="Evaluation of final", head=["figure"], rows=[["a </script>"]])
    for _ in range(2):
        assert add_table(tmp_path / "report.html", table)
    found = data_of((tmp_path / "report.html").read_text())["tables"]
    assert found == [{"title": "Evaluation of final", "head": ["figure"], "rows": [["a </script>"]]}]
    (tmp_path / "other.html").write_text("<html>")
    assert not add_table(tmp_path / "other.html", table)


def test_a_long_run_is_thinned_and_keeps_its_extremes():
    rows = [[float(step), 1 + step % 7 / 10, None] for step in range(50_000)]
    rows[31_234][1], rows[40_001][1], rows[12_345] = 9.0, 0.01, [12_345.0, None, 0.5]
    history = History("long", ("step", "loss", "val_loss"), rows, {})
    kept = history.thinned(3000)
    assert len(kept) <= 3100 and kept == sorted(kept, key=lambda row: row[0])
    assert kept[0] == rows[0] and kept[-1] == rows[-1]
    assert rows[31_234] in kept and rows[40_001] in kept and rows[12_345] in kept
    assert history.thinned(50_000) is rows


def test_what_is_not_finite_has_no_place_in_a_curve():
    text = "step,loss,val_loss\n1,nan,\n2,inf,3\n3,1.5,\n4,1."
    columns, rows = parse_metrics(text, Path("metrics.csv"))
    assert rows == [[1, None, None], [2, None, 3], [3, 1.5, None]], "the last line is not whole"
    html(Content(title="t", state="s", runs=[History("n", columns, rows, {})]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column step"),
        ("step,loss\n", "has no column val_loss"),
        ("step,loss,val_loss\n1,2\n", "line 2: has 2 values for 3 columns"),
        ("step,loss,val_loss\n1,many,\n", "line 2: 'many' is not a number"),
        ("step,loss,val_loss\n" + "1" * 200_000 + ",,\n", "field larger than field limit"),
    ],
    ids=["empty", "column", "values", "word", "long"],
)
def test_a_broken_file_is_named_with_its_line(text, says):
    with pytest.raises(UserError, match=says):
        parse_metrics(text, Path("metrics.csv"))


@pytest.mark.slow
def test_a_browser_draws_the_curves(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium here")
    sinks, _ = run(tmp_path)
    sinks.handle(Done(3, 2.0, 60, 0.5, 0.75, 2**30, 0, None, None))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", tmp_path / "report.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    drawn = done.stdout
    assert drawn.count("<figure") == 5 and drawn.count("<polyline") >= 6
    assert "base: tiny &lt;/script&gt;&lt;b&gt;" in drawn and "complete" in drawn
    assert not re.search(r"NaN|undefined", drawn.partition("<script>")[0])
