"""A run that was stopped and goes on is the run that was not stopped, to the bit; and it only goes
on as the same run."""

import csv
import json
import os
import shutil

import pytest
import torch
import yaml
from conftest import fails

from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError, UserError
from litlora.storage.tensors import open_torch
from litlora.train import precision
from litlora.train.resume import MAY_CHANGE, flat_settings, generators, set_generators
from litlora.train.run_directory import step_directories

MEASURED = ("seconds", "tokens_per_second", "peak_memory_gib")


def metrics(out):
    """The rows without what depends on the clock and on other runs of the process."""
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def same(out, expected):
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    assert metrics(out) == metrics(expected)
    return True


# 36 examples to train on: 6 steps an epoch, 12 in all. The stops: mid-epoch, at an epoch's end,
# after a validation, before the last step.
@pytest.mark.parametrize(
    ("method", "words"),
    [
        pytest.param("lora", ["--lora.dropout", 0.3], id="lora"),
        pytest.param(
            "lora",
            ["--lora.dropout", 0.3, "--lora.modules_to_save", "[lm_head, norm]", "--lora.targets", "qv"],
            id="lora and whole modules",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lora", ["--lora.dropout", 0.3, "--train.packing", "false"], id="padded", marks=pytest.mark.slow
        ),
        pytest.param("full", [], id="full", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_again_and_again_is_the_run_that_was_not(run, tmp_path, capsys, method, words):
    words = [*words, "--train.epochs", 2]
    expected = run(method, tmp_path / "expected", *words)
    out = tmp_path / "out"
    for stop in (1, 6, 8, 11):
        run(method, out, *words, "--resume", "auto", stop_after=stop)
        assert step_directories(out)[-1].name == f"step-{stop:06}" and not (out / "final").exists()
        assert (open_checkpoint(step_directories(out)[-1]).kind == "adapter") == (method == "lora")
    run(method, out, *words, "--resume", "auto")
    assert same(out, expected)
    assert [int(row["step"]) for row in metrics(out) if row["loss"]] == [1, 5, 10, 12]
    assert [int(row["step"]) for row in metrics(out) if row["val_loss"]] == [4, 8, 12]
    said = capsys.readouterr().out
    assert (
        f"{out} holds no early checkpoint, so the run begins" in said
        and f"resumed: {out / 'step-000011'}, 11 steps done" in said
    )


@pytest.mark.slow
def test_a_full_run_of_a_bf16_base_resumes_from_the_weights_it_trains(run, make_checkpoint, tmp_path):
    """What lit_model.pth stores is rounded; what is trained on is not. What was measured at the
    start is not measured again."""
    make_checkpoint("base", dtype=torch.bfloat16)
    expected = run("full", tmp_path / "expected", "--precision", "bf16-mixed")
    out = run("full", tmp_path / "out", "--precision", "bf16-mixed", stop_after=5)
    state = open_torch(out / "step-000005/state.pth")["weights"]
    stored = open_checkpoint(out / "step-000005").tensors
    assert all(t.dtype == torch.float32 for t in state.values()) and all(
        t.dtype == torch.bfloat16 for t in stored.values()
    )
    run("full", out, "--resume", "auto")
    assert same(out, expected)


@pytest.mark.slow
def test_what_was_measured_at_the_start_is_not_measured_again(
    run, make_checkpoint, tmp_path, monkeypatch, capsys
):
    """It could come out otherwise, and the run would be another."""
    make_checkpoint("base", dtype=torch.bfloat16)
    words = ["--precision", "auto", "--train.auto_batch"]
    monkeypatch.setattr(precision, "FAST", 0.0)  # whatever is measured is fast
    expected = run("lora", tmp_path / "expected", *words)
    out = run("lora", tmp_path / "out", *words, stop_after=4)
    assert capsys.readouterr().out.count("found by a dry run") == 2
    monkeypatch.setattr(precision, "FAST", float("inf"))
    run("lora", out, *words, "--resume", "auto")
    said = capsys.readouterr().out
    assert "found by a dry run" not in said and "precision: bf16-true (as set)" in said
    assert same(out, expected)


@pytest.mark.slow
def test_the_stored_configuration_resumes_too(run, tmp_path):
    """And an explicit directory: an older one than the newest, whose course is then given up."""
    expected = run("lora", tmp_path / "expected", "--train.epochs", 2)
    words = ("--train.epochs", 2, "--train.save_interval", 2, "--train.keep_checkpoints", 4)
    out = run("lora", tmp_path / "out", *words, stop_after=9)
    assert [path.name for path in step_directories(out)] == [
        "step-000004",
        "step-000006",
        "step-000008",
        "step-000009",
    ]
    stored = ("--config", out / "hyperparameters.yaml", "--train.epochs", 2, "--resume")
    run("lora", out, *stored, out / "step-000004", stop_after=5)
    assert [path.name for path in step_directories(out)] == ["step-000004", "step-000005"]
    assert [row["step"] for row in metrics(out)] == ["1", "4", "5"], (
        "the rows of the given-up course are gone"
    )
    settings = yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert settings["resume"] is None and settings["overwrite"] is False
    run("lora", out, *stored, "auto")
    assert same(out, expected)


def test_another_directory_takes_up_a_run_and_leaves_the_first_alone(run, tmp_path):
    expected = run("lora", tmp_path / "expected", "--train.save_interval", 4)
    before = {path: path.read_bytes() for path in expected.rglob("*") if path.is_file()}
    assert same(run("lora", tmp_path / "fork", "--resume", expected / "step-000004"), expected)
    assert before == {path: path.read_bytes() for path in expected.rglob("*") if path.is_file()}


def test_a_complete_run_is_left_alone(run, tmp_path, capsys):
    out = run("lora", tmp_path / "out", "--train.max_steps", 2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run("lora", out, "--train.max_steps", 2, "--resume", "auto")
    assert f"the run in {out} is complete, nothing is left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.max_steps is 3, and was 2"):
        run("lora", out, "--train.max_steps", 3, "--resume", "auto")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


MATTER = (
    (["--train.learning_rate", 2e-3], r"train\.learning_rate is 0\.002, and was 0\.001"),
    (["--train.micro_batch_tokens", 300], r"train\.micro_batch_tokens is 300, and was 400"),
    (["--train.epochs", 4], r"train\.epochs is 4, and was 1"),
    (["--train.mask_prompt", "false"], r"train\.mask_prompt is False, and was True"),
    (["--seed", 1], r"seed is 1, and was 1337"),
    (["--lora.rank", 4], r"lora\.rank is 4, and was 8"),
    (["--lora.targets", "qv"], r"lora\.targets is qv, and was all-linear"),
    (["--data.val_fraction", 0.2], r"data\.val_fraction is 0\.2, and was 0\.1"),
    (["--prompt_style", "plain"], r"prompt_style is plain, and was alpaca"),
)


def test_a_setting_that_matters_must_be_what_it_was(run, tmp_path):
    out = run("lora", tmp_path / "out", stop_after=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for words, says in MATTER:
        with pytest.raises(UserError, match=rf"^resume .*step-000002: {says}; .* resume_force$"):
            run("lora", out, *words, "--resume", "auto")
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}, words


@pytest.mark.parametrize(
    "change",
    [{"output": "Other."}, pytest.param({"history": [["Before?", "Then."]]}, marks=pytest.mark.slow)],
)
def test_other_data_or_another_base_is_refused_unless_forced(
    run, tmp_path, alpaca_file, make_checkpoint, capsys, change
):
    out = run("lora", tmp_path / "out", stop_after=2)
    records = json.loads(alpaca_file.read_text())
    alpaca_file.write_text(json.dumps([{**records[0], **change}, *records[1:]]))
    with pytest.raises(
        UserError, match=r"(training|validation) data is \w{16}, and was \w{16}; .* resume_force"
    ):
        run("lora", out, "--resume", "auto")
    shutil.move(alpaca_file, tmp_path / "moved.json")
    (tmp_path / "moved.json").write_text(json.dumps(records))
    moved = ("--data.path", tmp_path / "moved.json", "--resume", "auto")
    run("lora", out, *moved, stop_after=3)
    make_checkpoint("base", seed=5)
    with pytest.raises(UserError, match=r"base is \w{16}, and was \w{16}"):
        run("lora", out, *moved)
    run("lora", out, *moved, "--resume_force")
    assert "note: resumed although base is" in capsys.readouterr().out


def test_not_even_force_puts_weights_where_they_do_not_fit(run, tmp_path):
    out = run("lora", tmp_path / "out", stop_after=2)
    with pytest.raises(UserError, match="other weights train there than here"):
        run("lora", out, "--lora.rank", 4, "--resume", "auto", "--resume_force")


def test_what_may_change_exists_and_changes_nothing(run, tmp_path):
    from litlora.settings import JSON, Alpaca, EvalConfig, FinetuneDistill, LogConfig, ReportConfig, dump

    known = set()
    for data in (Alpaca(), JSON(path="x", ignore=("id",), cache=False, cache_dir="x")):
        probes = {"eval": EvalConfig(every=1, on="x"), "report": ReportConfig(prompts="x")}
        probes["log"] = LogConfig(to=["tensorboard"], name="x")
        settings = FinetuneDistill(teacher="x", data=data, stream_base=True, **probes)
        known |= flat_settings(yaml.safe_load(dump(settings))).keys()
    assert known >= MAY_CHANGE
    expected = run("lora", tmp_path / "expected")
    out = run("lora", tmp_path / "out", stop_after=3)
    words = [
        "--train.log_interval",
        2,
        "--train.eval_interval",
        0,
        "--train.save_interval",
        4,
        "--train.keep_checkpoints",
        1,
    ]
    run("lora", out, "--resume", "auto", *words, "--train.max_bad_steps", 9)
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()


def test_every_kind_of_generator_comes_back():
    import random

    import numpy as np

    state = generators(torch.device("cpu"))
    drawn = (random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), random.gauss(0, 1))
    set_generators(state, torch.device("cpu"))
    assert drawn == (
        random.random(),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
        random.gauss(0, 1),
    )


# ---- what cannot be resumed


def test_what_is_no_step_directory_is_refused(run, tmp_path):
    out = run("lora", tmp_path / "out", "--train.max_steps", 4, "--train.save_interval", 2)
    step = out / "step-000002"
    with pytest.raises(
        CheckpointError,
        match=rf"resume {out}: has no state.pth, the state of a run; did you mean {step}\?",
    ):
        run("lora", out, "--resume", out)
    with pytest.raises(CheckpointError, match=rf"resume {out / 'final'}: .*checkpoint_dir"):
        run("lora", tmp_path / "new", "--resume", out / "final")
    with pytest.raises(
        UserError, match="is complete; to continue differently from there, name another out_dir"
    ):
        run("lora", out, "--resume", step)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/metrics.csv").write_text("step")
    with pytest.raises(UserError, match="already holds metrics.csv"):
        run("lora", tmp_path / "used", "--resume", step)
    shutil.rmtree(out / "final")
    (step / "state.pth").unlink()
    with pytest.raises(CheckpointError, match=rf"{step}: has no state.pth, so it cannot be resumed"):
        run("lora", out, "--resume", "auto")
    with pytest.raises(UserError, match="resume continues what overwrite would remove"):
        run("lora", out, "--resume", "auto", "--overwrite")


BROKEN = (
    (lambda file, content: file.write_bytes(file.read_bytes()[:1000]), "broken"),
    (lambda file, content: torch.save({}, file), "not the state of a training run"),
    (
        lambda file, content: torch.save({**content, "litlora": {"format": 9, "kind": "state"}}, file),
        "reads format 1",
    ),
    (
        lambda file, content: torch.save(
            {**content, "litlora": {"format": torch.ones(3), "kind": "state"}}, file
        ),
        "reads format 1",
    ),
    (
        lambda file, content: torch.save({**content, "facts": {"base": torch.ones(3)}}, file),
        "facts are not text",
    ),
    (
        lambda file, content: torch.save({**content, "position": {**content["position"], "step": 2}}, file),
        "its position is step 2, which is step 1 of epoch 0",
    ),
    (
        lambda file, content: torch.save({**content, "position": {"where": 3}}, file),
        "broken: its position is .*where",
    ),
    (
        lambda file, content: torch.save({**content, "position": {**content["position"], "step": "7"}}, file),
        "broken: its position",
    ),
    (
        lambda file, content: torch.save({**content, "weights": {"x": 3}}, file),
        "one of its weights is not a tensor",
    ),
    (
        lambda file, content: torch.save({**content, "optimizer": {"state": {}, "param_groups": []}}, file),
        "or is broken: the optimizer must have 1 groups",
    ),
    (lambda file, content: torch.save({**content, "ranks": [3]}, file), "or is broken: a rank lacks"),
    (lambda file, content: torch.save({**content, "weights": {}}, file), "other weights train there"),
)


def test_a_broken_state_is_refused_in_one_line(run, tmp_path):
    out = run("lora", tmp_path / "out", stop_after=1)
    file = out / "step-000001/state.pth"
    sound = file.read_bytes()
    for change, says in BROKEN:
        file.write_bytes(sound)
        change(file, torch.load(file, weights_only=True))
        with pytest.raises(UserError, match=rf"step-000001(/state.pth)?: .*({says})") as raised:
            run("lora", out, "--resume", "auto")
        assert "\n" not in str(raised.value)


def test_two_runs_do_not_write_one_directory(run, tmp_path):
    import fcntl

    out = run("lora", tmp_path / "out", stop_after=1)
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is writing there"):
        run("lora", out, "--resume", "auto")
    os.close(handle)
    run("lora", out, "--resume", "auto", "--train.save_interval", 0)


def test_an_overwritten_run_is_kept_until_the_new_one_has_saved_something(run, tmp_path):
    out = run("lora", tmp_path / "out", "--train.max_steps", 2, "--train.save_interval", 1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail():
        raise UserError("in the third step")

    with pytest.raises(UserError, match="in the third step"):
        run("lora", out, "--overwrite", "--seed", 1, at=(2, fail))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run("lora", out, "--overwrite", stop_after=1)
    assert sorted(path.name for path in out.iterdir()) == [
        "hyperparameters.yaml",
        "metrics.csv",
        "report.html",
        "step-000001",
    ]


def test_a_mistake_in_resume_is_one_line(tmp_path):
    assert "has no state.pth" in fails("finetune/lora.py", "--resume", tmp_path / "nowhere")


# ---- determinism


def test_one_seed_one_result_and_another_seed_another(run, tmp_path):
    words = ["--lora.dropout", 0.3, "--train.max_steps", 3]
    first = run("lora", tmp_path / "first", *words)
    torch.rand(7)  # whatever was drawn before
    assert same(run("lora", tmp_path / "second", *words), first)
    other = open_checkpoint(run("lora", tmp_path / "other", *words, "--seed", 1338) / "final").tensors
    assert all(
        not torch.equal(other[name], tensor)
        for name, tensor in open_checkpoint(first / "final").tensors.items()
    )
