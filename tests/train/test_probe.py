"""Probes: samples and a task while a run trains, which learns the same without them."""

import csv
import json
import re

import pytest
from conftest import extra_sinks

from litlora.errors import UserError
from litlora.report.events import Evaluated, Sampled
from litlora.report.sinks import Sink
from litlora.settings import EvalConfig, FinetuneLoRA, ReportConfig, TrainConfig

WORDS = ["--train.max_steps", 6, "--train.save_interval", 3]


class Diary(Sink):
    def __init__(self):
        self.events = []

    def handle(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def probing(tmp_path, alpaca_file):
    (tmp_path / "prompts.txt").write_text("What says the fox?\n\nHow many dogs?\n")
    words = ["--report.prompts", tmp_path / "prompts.txt", "--report.sample_tokens", 5]
    return [*words, "--eval.every", 2, "--eval.on", alpaca_file, "--eval.first", 2, "--eval.measure", "loss"]


def test_a_run_with_probes_learns_the_same_and_shows_what_they_saw(run, tmp_path, probing):
    expected = run("lora", tmp_path / "expected", *WORDS, "--lora.dropout", 0.1)
    diary = Diary()
    with extra_sinks(diary):
        out = run("lora", tmp_path / "out", *WORDS, "--lora.dropout", 0.1, *probing)
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    assert [event.step for event in diary.of(Evaluated)] == [0, 2, 4, 6]
    rows = [row for row in csv.DictReader((out / "metrics.csv").read_text().splitlines()) if row["eval_loss"]]
    assert [(int(row["step"]), float(row["eval_loss"])) for row in rows] == [
        (event.step, pytest.approx(event.figures["eval_loss"], rel=1e-5)) for event in diary.of(Evaluated)
    ]
    losses = [event.figures["eval_loss"] for event in diary.of(Evaluated)]
    assert losses[-1] < losses[0], "it was trained on them"
    before, after = diary.of(Sampled)
    assert (before.step, after.step) == (0, 6)
    assert [sample.prompt for sample in before.samples] == ["What says the fox?", "How many dogs?"]
    page = json.loads(re.search(r'id="data">(.*?)</script>', (out / "report.html").read_text())[1])
    (table,) = [table for table in page["tables"] if table["title"] == "Samples"]
    assert table["head"] == ["prompt", "before training", "after step 6"]
    assert [row[2] for row in table["rows"]] == [sample.answer for sample in after.samples]


@pytest.mark.slow
def test_a_resumed_run_remembers_what_was_said_before_training(run, tmp_path, probing, capsys):
    diary = Diary()
    with extra_sinks(diary):
        out = run("lora", tmp_path / "out", *WORDS, *probing, stop_after=3)
        run("lora", out, *WORDS, *probing, "--resume", "auto")
    first, again, after = diary.of(Sampled)
    assert first == again and after.step == 6
    assert [event.step for event in diary.of(Evaluated)] == [0, 2, 4, 6]
    out = run("lora", tmp_path / "other", *WORDS, *probing, stop_after=3)
    (out / "samples.json").unlink()
    run("lora", out, *WORDS, *probing, "--resume", "auto")
    assert "samples.json: has no answers to these prompts" in capsys.readouterr().out


def test_settings_that_do_not_go_together_are_refused(tmp_path, run):
    for make, says in [
        (lambda: EvalConfig(every=3), "every 3: needs a task; name its file as on"),
        (lambda: EvalConfig(on="x"), "on: has no effect without every"),
        (lambda: EvalConfig(every=1, on="x", measure="choice", pattern="a"), "pattern: finds the answer"),
        (
            lambda: FinetuneLoRA(report=ReportConfig(prompts="x"), train=TrainConfig(compile=True)),
            "prompts: the model answers questions while it trains",
        ),
    ]:
        with pytest.raises(UserError) as raised:
            make()
        assert says in str(raised.value)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=r"prompts .*empty.txt: has 0 prompts; give from 1 to 50"):
        run("lora", tmp_path / "out", "--report.prompts", tmp_path / "empty.txt")
    assert not (tmp_path / "out").exists()
