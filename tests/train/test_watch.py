"""A rank that dies takes the others down with its name and reason, and the run goes on from what is
there."""

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, succeeds
from test_many import learned, words_for

SAVES = ("--train.save_interval", 1, "--train.eval_interval", 2, "--devices", 2)


def faulty(out, base, data, fault, *more):
    """(status, the lines on stderr, seconds) of a run with this fault."""
    words = words_for(out, base, data, *SAVES, *more)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(REPO / "tests/train/faulty.py"), *map(str, words)],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "FAULT": fault, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines(), time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["_optimizer_step", "save", "validate"])
def test_a_killed_rank_ends_the_run_with_one_line(method, strategy, base, alpaca_file, tmp_path):
    out, more = tmp_path / "out", ("--strategy", strategy)
    fault = f"{method} 1 SIGKILL"
    status, errors, _ = faulty(out, base, alpaca_file, fault, *more)
    assert status == 2 and len(errors) == 1, errors
    assert errors[0].startswith("error: rank 1 of 2 on ") and "was killed by SIGKILL" in errors[0]
    assert "the newest checkpoint is" in errors[0] and "--resume auto" in errors[0]
    words = words_for(out, base, alpaca_file, *SAVES, *more)
    succeeds("finetune/lora.py", *words, "--resume", "auto", OMP_NUM_THREADS="1")
    succeeds("finetune/lora.py", *words_for(tmp_path / "whole", base, alpaca_file, *SAVES, *more))
    for name, weight in learned(tmp_path / "whole").items():
        assert torch.equal(learned(out)[name], weight)


@pytest.mark.slow
def test_a_rank_that_fails_says_why(base, alpaca_file, tmp_path):
    fault = "validate 1 error"
    status, errors, _ = faulty(tmp_path / "out", base, alpaca_file, fault)
    assert status == 2 and len(errors) == 1, errors
    assert ": something that only this rank meets; the newest checkpoint is " in errors[0]


@pytest.mark.slow
def test_without_rank_0_no_rank_stays_behind(base, alpaca_file, tmp_path):
    fault = "_optimizer_step 0 SIGKILL"
    status, errors, seconds = faulty(tmp_path / "out", base, alpaca_file, fault)
    # subprocess.run returns once the last process has closed stderr.
    assert status == -9 and len(errors) == 1 and "rank 0" in errors[0] and seconds < 150, errors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["_optimizer_step", "save", "validate"])
def test_a_rank_that_goes_silent_ends_the_run(method, base, alpaca_file, tmp_path):
    """Stopped as a whole, as where its machine is gone: it does not even count."""
    status, errors, seconds = faulty(tmp_path / "out", base, alpaca_file, f"{method} 1 SIGSTOP")
    assert status == 2 and len(errors) == 1, errors
    assert errors[0].startswith("error: rank 1 of 2: has not answered for 40 seconds; the newest checkpoint")
    assert "--resume auto" in errors[0] and seconds < 150


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_hangs_ends_the_run(strategy, base, alpaca_file, tmp_path):
    """Its threads go on, so only the exchange that the others wait for can tell."""
    fault = "validate 1 hang"
    status, errors, _ = faulty(tmp_path / "out", base, alpaca_file, fault, "--strategy", strategy)
    assert status == 2 and len(errors) == 1, errors
    assert errors[0].startswith("error: lost the connection to another rank: ") and "resume" in errors[0]


@pytest.mark.slow
def test_max_time_by_any_clock_stops_all_ranks_after_the_same_step(base, alpaca_file, tmp_path):
    out, more = tmp_path / "out", ("--train.max_time", 60, "--strategy", "fsdp")
    status, errors, _ = faulty(out, base, alpaca_file, "_optimizer_step 1 clock", *more)
    assert status == 0 and not errors, errors
    assert (out / "step-000003").is_dir() and not (out / "final").exists()
