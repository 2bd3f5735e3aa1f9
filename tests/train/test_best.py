"""The best step by validation loss: its checkpoint is kept, and is the result; and a run that no longer
gets better ends."""

import csv
import errno
import json
import os
import shutil

import pytest
import torch

from litlora.cli import parse
from litlora.errors import CheckpointError, UserError
from litlora.settings import FinetuneLoRA
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.resume import Position
from litlora.train.run_directory import step_directories
from litlora.train.state_check import check_position


@pytest.fixture
def words(tmp_path):
    """Settings with which the validation loss falls and then rises: what is learned beyond the form
    of the answers is wrong there."""
    file = tmp_path / "validation.json"
    records = [
        {"instruction": f"Repeat {n}.", "input": "", "output": " ".join(f"{n} the {n}" for _ in range(4))}
        for n in range(50, 56)
    ]
    file.write_text(json.dumps(records))
    return [
        *("--data.val_path", file, "--data.val_fraction", 0, "--train.learning_rate", 0.03),
        *("--train.eval_interval", 2, "--train.save_interval", 3, "--train.keep_checkpoints", 1),
        *("--precision", "32-true", "--train.schedule", "constant", "--train.epochs", 3),
    ]


def val_losses(out):
    rows = csv.DictReader((out / "metrics.csv").read_text().splitlines())
    return {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}


def steps(out):
    return [directory.name for directory in step_directories(out)]


def weights(directory):
    return torch.load(directory / "lit_model.pth", weights_only=True)["model"]


def same_weights(directory, other):
    mine, others = weights(directory), weights(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def refuse_step(step):
    """`EarlyCheckpoints.save` on a disk that has no room for the checkpoint of one step."""

    def save(self, number, state, best=None):
        if number == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, number, state, best)

    real = EarlyCheckpoints.save
    return save


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_best_step_is_kept_and_is_the_result(run, words, tmp_path, capsys, method):
    out = run(method, tmp_path / "out", *words, "--train.keep_best")
    losses = val_losses(out)
    best = min(losses, key=losses.get)
    assert 2 <= best < 18
    assert steps(out) == [f"step-{best:06}", "step-000018"]
    assert same_weights(out / "final", out / f"step-{best:06}")
    assert not same_weights(out / "final", out / "step-000018")
    said = capsys.readouterr().out
    assert f"best: step {best}, validation loss {losses[best]:.4f}; final/ is that step, not the last" in said


@pytest.mark.slow
def test_a_run_that_stops_getting_better_ends_and_resumes_to_the_bit(run, words, tmp_path, capsys):
    words = [*words, "--train.early_stopping_patience", 3, "--lora.dropout", 0.3]
    plain = run("lora", tmp_path / "plain", *words)
    words += ["--train.keep_best"]
    expected = run("lora", tmp_path / "expected", *words)
    losses = val_losses(expected)
    best = min(losses, key=losses.get)
    assert list(losses)[-1] == best + 6 < 21 and losses == val_losses(plain)
    ends = f"stopped early after step {best + 6}: 3 validations in a row without a loss below"
    assert capsys.readouterr().out.count(ends) == 2
    assert same_weights(expected / "final", expected / f"step-{best:06}")
    assert not same_weights(expected / "final", plain / "final")

    out = tmp_path / "out"
    for stop in (1, best, best + 1, best + 3):
        run("lora", out, *words, "--resume", "auto", stop_after=stop)
    assert f"step-{best:06}" in steps(out)
    run("lora", out, *words, "--resume", "auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    assert val_losses(out) == losses and steps(out)[0] == steps(expected)[0]
    run("lora", out, *words, "--resume", "auto")
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="early_stopping_patience is 4, and was 3"):
        run("lora", out, *words, "--train.early_stopping_patience", 4, "--resume", "auto")


@pytest.mark.slow
def test_where_the_best_is_the_last_step_or_the_only_validation_nothing_more_is_kept(
    run, words, tmp_path, capsys
):
    words = [*words, "--train.keep_best", "--train.save_interval", 0]
    out = run("lora", tmp_path / "few", *words, "--train.max_steps", 4, "--train.learning_rate", 1e-3)
    assert steps(out) == ["step-000002"] and not same_weights(out / "final", out / "step-000002")
    assert "best: the last step, 4, validation loss" in capsys.readouterr().out
    out = run("lora", tmp_path / "one", *words, "--train.max_steps", 2, "--train.eval_interval", 9)
    assert steps(out) == [] and list(val_losses(out)) == [2]
    assert "best: the last step, 2, validation loss" in capsys.readouterr().out


@pytest.mark.slow
def test_without_its_best_step_a_run_goes_on_only_if_told_to(run, words, tmp_path):
    words = [*words, "--train.keep_best", "--lora.rank", 2]
    out = run("lora", tmp_path / "out", *words, stop_after=9)
    best = step_directories(out)[0]
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=f"keep_best needs {elsewhere / best.name}, the best"):
        run("lora", elsewhere, *words, "--resume", out / "step-000009")
    shutil.move(best, tmp_path / "away")
    with pytest.raises(UserError, match="or forget the best with resume_force"):
        run("lora", out, *words, "--resume", "auto")
    run("lora", out, *words, "--resume", "auto", "--resume_force", "--train.learning_rate", 0.02)
    assert (out / "final/lit_model.pth").exists()


@pytest.mark.slow
def test_a_best_step_that_is_gone_at_the_end_loses_nothing(run, words, tmp_path):
    words = [*words, "--train.keep_best", "--train.save_interval", 0]
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"step-\d+"):
        run("lora", out, *words, at=(20, lambda: shutil.rmtree(step_directories(out)[0])))
    assert steps(out) == ["step-000021"] and not (out / "final").exists()


@pytest.mark.slow
def test_a_best_step_that_cannot_be_saved_is_not_the_best(run, words, tmp_path, capsys, monkeypatch):
    """Then final/ is the best of those that could be."""
    out = tmp_path / "out"
    expected = val_losses(run("lora", tmp_path / "expected", *words))
    best = min(expected, key=expected.get)
    monkeypatch.setattr("litlora.train.checkpoints.EarlyCheckpoints.save", refuse_step(best))
    run("lora", out, *words, "--train.keep_best")
    said = capsys.readouterr().out
    assert f"step-{best:06} could not be saved (No space left on device)" in said
    rest = {step: loss for step, loss in expected.items() if step != best}
    second = min(rest, key=rest.get)
    assert f"best: step {second}, validation loss {rest[second]:.4f}; final/ is that step" in said
    assert same_weights(out / "final", out / f"step-{second:06}")


@pytest.mark.slow
def test_no_run_without_the_settings_has_more_in_its_state(run, tmp_path):
    """The entries are as they were before, so that earlier states and these are alike."""
    out = run("lora", tmp_path / "out", stop_after=5)
    position = torch.load(out / "step-000005/state.pth", weights_only=True)["position"]
    assert "best" not in " ".join(position) and len(position) == 13


@pytest.mark.parametrize(
    "change",
    [
        {"best_step": 9},
        {"best_step": 2, "best_loss": None},
        {"best_step": 0},
        {"best_loss": float("nan")},
        {"validations_since_best": -1},
        {"validations_since_best": 99},
    ],
)
def test_a_stored_position_has_a_best_step_that_a_run_can_have(change):
    at = Position(step=8, seconds=1.0, loss=1.0, best_step=2, best_loss=-1.5, validations_since_best=3)
    check_position(vars(at))
    with pytest.raises(ValueError, match="best"):
        check_position({**vars(at), **change})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train.keep_best"], "keep_best: compares validations, and eval_interval 0 makes only one"),
        (["--train.early_stopping_patience", 2], "early_stopping_patience: compares validations"),
        (
            ["--train.keep_best", "--train.eval_interval", 2, "--data.val_fraction", 0],
            "keep_best: needs validation data, and val_fraction is 0",
        ),
        (["--train.early_stopping_patience", 0, "--train.eval_interval", 2], "must be at least 1"),
    ],
)
def test_what_compares_validations_needs_some(words, says):
    with pytest.raises(UserError, match=says):
        parse(FinetuneLoRA, list(map(str, words)))
