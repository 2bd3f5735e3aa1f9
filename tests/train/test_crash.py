"""Faults of the process and of the disk: at any moment there is the old or the new, whole, and the
run goes on from it."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import REPO, extra_sinks
from test_resume import metrics, same

from litlora.checkpoint import open_checkpoint
from litlora.errors import UserError
from litlora.paths import output_dir
from litlora.report.console import Console
from litlora.report.events import Note, Step
from litlora.report.sinks import Sink, Sinks
from litlora.storage.atomic import (
    remove_directory,
    replacing_directory,
    replacing_file,
    setting_aside,
    settle,
)
from litlora.train.run_directory import step_directories


@pytest.mark.slow
def test_no_kill_ever_loses_a_run():
    """A real run, killed 50 times, half of them in the middle of a save; see the script for what is
    checked after each."""
    done = subprocess.run(
        [sys.executable, str(REPO / "benchmarks/crash.py"), "--kills", "50"],
        capture_output=True, text=True, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = {
        name: int(count)
        for name, _, count in (part.partition(": ") for part in done.stdout.strip().split(", "))
    }
    assert counts["kills"] == counts["kills after a random time"] + counts["kills at a file operation"] == 50
    assert counts["kills that left something incomplete"] >= 5 and counts["runs that finished"] >= 1


# ---- every single moment of a change on the disk


def killed_before(operation, work):
    """Whether a process that does `work` was killed before operation number `operation` on files;
    False if it ended first."""
    if (pid := os.fork()) == 0:
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in (
                "open",
                "os.rename",
                "os.mkdir",
                "os.remove",
                "os.rmdir",
                "os.listdir",
                "os.scandir",
                "shutil.rmtree",
            ):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def fill(directory, text):
    for name in ("a", "b"):
        (directory / name).write_text(text)


def read(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def moments(work):
    """1, 2, ...: every operation of `work`, which is done anew each time, is the one before which
    it is killed."""
    operation = 1
    while killed_before(operation, work):
        yield operation
        operation += 1


def test_a_directory_is_the_old_one_or_the_new_one_wherever_the_replacing_is_killed(tmp_path):
    target, seen = tmp_path / "target", []

    def work():
        with replacing_directory(target) as staging:
            fill(staging, "new")

    target.mkdir()
    fill(target, "old")
    for _ in moments(work):
        settle(tmp_path)
        seen.append(read(target)["a"])
        assert read(target) in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        assert [path.name for path in tmp_path.iterdir()] == ["target"], (
            "nothing of the dead process may remain"
        )
        fill(target, "old")
    assert seen.count("old") >= 5 and seen.count("new") >= 2
    assert read(target) == {"a": "new", "b": "new"}


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    def work():
        with replacing_file(tmp_path / "file") as staging:
            staging.write_text("new")

    (tmp_path / "file").write_text("old")
    for _ in moments(work):
        settle(tmp_path)
        assert (tmp_path / "file").read_text() in ("old", "new")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        (tmp_path / "file").write_text("old")
    assert (tmp_path / "file").read_text() == "new"


def test_a_directory_that_is_removed_is_never_half_there(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    fill(target, "old")
    for _ in moments(lambda: remove_directory(target)):
        assert not target.exists() or read(target) == {"a": "old", "b": "old"}
        settle(tmp_path)
        target.mkdir(exist_ok=True)
        fill(target, "old")
    assert not list(tmp_path.iterdir())


def test_what_is_set_aside_is_there_again_until_it_is_given_up_in_order(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def work():
        with setting_aside([first, second]) as forget:
            forget()

    def fill_both():
        first.mkdir(exist_ok=True)
        fill(first, "old")
        second.write_text("old")

    fill_both()
    seen = set()
    for _ in moments(work):
        settle(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
        seen.add(tuple(left))
        assert not first.exists() or read(first) == {"a": "old", "b": "old"}
        fill_both()
    assert seen == {("first", "second"), ("second",)} and not list(tmp_path.iterdir())


def test_what_a_living_process_is_writing_is_left_alone(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / f".target.{other.pid}.new").mkdir()
        settle(tmp_path)
        assert list(tmp_path.iterdir())
        other.kill()
    settle(tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_leftovers_of_that_name_are_touched(tmp_path):
    for name in (".other.4194999.new", ".target", ".target.new", ".target.x.new", "target.4194999.new"):
        (tmp_path / name).mkdir()
    settle(tmp_path, "target")
    assert len(list(tmp_path.iterdir())) == 5


def test_a_replacement_that_fails_between_the_renames_puts_the_old_one_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    fill(target, "old")
    rename = type(target).rename

    def fail(path, to):
        if path.suffix == ".new":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(type(target), "rename", fail)
    with pytest.raises(KeyboardInterrupt), replacing_directory(target) as staging:
        fill(staging, "new")
    assert read(target) == {"a": "old", "b": "old"} and [path.name for path in tmp_path.iterdir()] == [
        "target"
    ]


def test_what_a_killed_run_left_does_not_stand_in_the_way(run, tmp_path):
    """A probe of whether the directory can be written, and a step that was not finished."""
    expected = run("lora", tmp_path / "expected")
    out = run("lora", tmp_path / "out", stop_after=2)
    for name in (".probe.4194999.new", ".step-000003.4194999.new", ".step-000001.4194999.gone"):
        (out / name).mkdir()
        (out / name / "half").write_text("x")
    with (out / "metrics.csv").open("a") as file:
        file.write("5,0,1.0,,0.1,0.1,9,9,9,0\n6,")
    assert output_dir(str(tmp_path / "expected/new"), overwrite=False, names=(), inputs=[])
    run("lora", out, "--resume", "auto")
    assert same(out, expected) and not list(out.glob(".*"))


# ---- a full disk


def limit(size):
    """What lets no file grow beyond so many bytes: a full disk, in the middle of writing."""
    return lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


@pytest.fixture
def lifted():
    """Whatever a test limits is lifted after it."""
    yield
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_training_goes_on_when_a_checkpoint_cannot_be_saved(run, tmp_path, capsys, lifted):
    expected = run("lora", tmp_path / "expected")
    capsys.readouterr()
    size = (expected / "final/lit_model.pth").stat().st_size + 1000  # the result fits, the state does not
    out = run("lora", tmp_path / "out", "--train.save_interval", 2, at=(3, limit(size)))
    said = capsys.readouterr().out
    note = (
        f"note: {out / 'step-000004'} could not be saved (File too large); "
        f"the newest checkpoint is {out / 'step-000002'}\n"
    )
    assert said.count(note) == 1
    assert [path.name for path in step_directories(out)] == ["step-000002"]
    assert same(out, expected) and not list(out.glob(".*")), "nothing half written may remain"


def test_a_result_that_cannot_be_saved_is_one_line_and_loses_no_checkpoint(run, tmp_path, lifted, capsys):
    """Metrics cannot be written either; they are whole again after the resume."""
    expected = run("lora", tmp_path / "expected")
    out = tmp_path / "out"
    with pytest.raises(
        UserError,
        match=r"final: could not be written \(File too large\); "
        r"the newest checkpoint is .*step-000004; make room",
    ) as e:
        run("lora", out, "--train.save_interval", 4, at=(5, limit(100)))
    assert "resume auto" in str(e.value) and "\n" not in str(e.value)
    assert (
        "metrics.csv cannot be written (File too large); its rows are kept in memory"
        in capsys.readouterr().err
    )
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])()
    assert not (out / "final").exists() and open_checkpoint(out / "step-000004").kind == "adapter"
    run("lora", out, "--resume", "auto")
    assert same(out, expected)


def test_metrics_are_complete_once_there_is_room_again(run, tmp_path, lifted, capsys):
    expected = run("lora", tmp_path / "expected", "--train.log_interval", 1)

    class Disk(Sink):
        def handle(self, event):
            if isinstance(event, Step) and event.step in (2, 5):
                limit(100 if event.step == 2 else resource.getrlimit(resource.RLIMIT_FSIZE)[1])()

    with extra_sinks(Disk()):
        out = run("lora", tmp_path / "out", "--train.log_interval", 1)
    assert capsys.readouterr().err.count("cannot be written") == 1, "said once"
    assert metrics(out) == metrics(expected) and len(metrics(out)) > 6


def test_a_stop_on_a_full_disk_names_the_newest_checkpoint(run, tmp_path, capsys, lifted):
    out = run("lora", tmp_path / "out", stop_after=3)
    before = {path: path.read_bytes() for path in out.glob("step-*/*")}
    capsys.readouterr()
    limit(60_000)()
    run("lora", out, "--resume", "auto", stop_after=5)
    said = capsys.readouterr().out
    assert "step-000005 could not be saved (File too large)" in said
    assert f"stopped by SIGTERM after step 5; the newest checkpoint is {out / 'step-000003'}" in said
    assert before == {path: path.read_bytes() for path in out.glob("step-*/*")}


def test_a_log_on_a_full_disk_does_not_end_the_run(monkeypatch, capsys):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = isatty = lambda self: False

    monkeypatch.setattr(sys, "stdout", Full())
    Sinks([Console()]).handle(Note("a line"))

    class Gone(Full):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        Sinks([Console()]).handle(Note("a line"))


# ---- the directory of a run goes away


@pytest.mark.parametrize(
    ("how", "anew"),
    [
        pytest.param("deleted", False, id="a new run-deleted"),
        pytest.param("renamed", True, id="over an earlier one-renamed"),
        pytest.param("renamed", False, id="a new run-renamed", marks=pytest.mark.slow),
        pytest.param("deleted", True, id="over an earlier one-deleted", marks=pytest.mark.slow),
    ],
)
def test_a_directory_that_goes_away_in_mid_run_is_said_and_what_there_is_is_saved(run, tmp_path, how, anew):
    expected, out = run("lora", tmp_path / "expected"), tmp_path / "out"
    if anew:
        run("lora", out, "--train.max_steps", 1)

    def go_away():
        shutil.rmtree(out) if how == "deleted" else out.rename(tmp_path / "elsewhere")

    says = r"out_dir .*out: was deleted or renamed .*: final, hyperparameters.yaml, metrics.csv$"
    with pytest.raises(UserError, match=says):
        run("lora", out, *["--overwrite"] * anew, at=(3, go_away))
    assert same(out, expected)
    assert metrics(out) == metrics(expected)
    assert (out / "hyperparameters.yaml").is_file()


@pytest.mark.slow
def test_a_stopped_run_whose_directory_went_away_can_be_resumed(run, tmp_path):
    expected, out = run("lora", tmp_path / "expected"), tmp_path / "out"

    def go_away_and_stop():
        shutil.rmtree(out)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(UserError, match="saved there anew: hyperparameters.yaml, metrics.csv, step-000003"):
        run("lora", out, at=(3, go_away_and_stop))
    run("lora", out, "--resume", "auto")
    assert same(out, expected)
