"""A sink from outside the library: it sees all that happens, and cannot stop a run by failing."""

import pytest
from conftest import AfterStep, extra_sinks

from litlora.errors import UserError
from litlora.report.events import Begun, Done, Logged, Saved, Step, Validation
from litlora.report.sinks import Sink


class Diary(Sink):
    """Keeps every event."""

    def __init__(self):
        self.events, self.closed = [], 0

    def handle(self, event):
        self.events.append(event)

    def close(self):
        self.closed += 1

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class Broken(Sink):
    """As a logger whose server cannot be reached."""

    def handle(self, event):
        raise ConnectionError("no route to the server")

    def close(self):
        raise ConnectionError("still none")


WORDS = ["--train.max_steps", 8, "--train.save_interval", 3]


def test_a_sink_sees_steps_validations_saves_and_the_end(run, tmp_path):
    diary = Diary()
    with extra_sinks(diary):
        out = run("lora", tmp_path / "out", *WORDS)
    assert diary.events[0] == Begun(step=0, total_steps=8)
    assert [event.step for event in diary.of(Step)] == list(range(1, 9))
    assert all(event.finite and event.grad_norm > 0 for event in diary.of(Step))
    assert [event.step for event in diary.of(Logged)] == [1, 5, 8]
    assert [event.step for event in diary.of(Validation)] == [4, 8]
    assert [event.directory for event in diary.of(Saved)] == [out / "step-000003", out / "step-000006"]
    (done,) = diary.of(Done)
    assert done is diary.events[-1] and diary.closed == 1
    assert (done.steps, done.stopped, done.checkpoint) == (8, None, out / "step-000006")
    assert done.loss == diary.of(Logged)[-1].loss and done.val_loss == diary.of(Validation)[-1].val_loss


def test_a_resumed_run_tells_where_it_begins(run, tmp_path):
    run("lora", tmp_path / "out", stop_after=2)
    diary = Diary()
    with extra_sinks(diary):
        run("lora", tmp_path / "out", "--resume", "auto")
    assert diary.events[0] == Begun(step=2, total_steps=6)
    assert diary.of(Step)[0].step == 3 and diary.of(Done)[0].steps == 6


def test_a_sink_that_fails_does_not_stop_the_run_or_the_others(run, tmp_path, capsys):
    expected = run("lora", tmp_path / "expected", *WORDS)
    capsys.readouterr()
    diary = Diary()
    with extra_sinks(Broken(), diary):
        out = run("lora", tmp_path / "out", *WORDS)
    said = capsys.readouterr().err
    assert said == "note: Broken failed (ConnectionError: no route to the server); training continues\n"
    assert diary.of(Done) and diary.closed == 1
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()


def test_an_error_that_a_sink_calls_fatal_ends_the_run_and_closes_all(run, tmp_path):
    def fail():
        raise UserError("enough")

    diary = Diary()
    with extra_sinks(AfterStep(2, fail), diary), pytest.raises(UserError, match="enough"):
        run("lora", tmp_path / "out", *WORDS)
    assert [event.step for event in diary.of(Step)] == [1] and diary.closed == 1
