"""benchmarks/gpu.py from end to end, as far as a CPU can follow it."""

import importlib.util
import json
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import REPO

from litlora.config import ModelConfig
from litlora.frozen.linear import stored_weights

SCRIPT = REPO / "benchmarks/gpu.py"


def rows(*words, out):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--models", "tiny", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and out.read_text() == done.stdout, done.stderr
    return {row["part"].split()[0]: row for row in map(json.loads, done.stdout.splitlines())}


def test_without_time_each_part_is_named_and_left_out(tmp_path):
    found = rows("--deadline", "0", out=tmp_path / "rows")
    assert len(found) == 10 and all("left out" in row for row in found.values())


@pytest.mark.slow
def test_the_deadline_breaks_a_part_off(tmp_path):
    """One in the process of all, which compiles for longer than that."""
    started = time.monotonic()
    found = rows("--deadline", "12", "--parts", "machine", "waits", "decode", out=tmp_path / "rows")
    assert "stopped" in found["waits"] and "left out" in found["decode"] and "torch" in found["machine"]
    assert found["waits"]["seconds"] < 30 and time.monotonic() - started < 60


@pytest.mark.slow
def test_every_row_has_its_figures(tmp_path):
    """But `waits` and `train`, which take minutes."""
    parts = ["machine", "ceiling", "right", "experts", "quantised", "context", "loss", "decode"]
    found = rows("--steps", "4", "--deadline", "800", "--parts", *parts, out=tmp_path / "rows")
    assert list(found) == parts and not any(row.get("stopped") for row in found.values())
    assert found["ceiling"]["flops"] > 0 and found["decode"]["tokens per second"]["in step"] > 0
    assert found["right"]["torch.float32"] < 1e-5
    assert found["experts"]["relative distance"] < 1e-6 and found["experts"]["at once"] > 0
    speeds = {row["row"]: row for row in found["quantised"]["rows"]}
    assert list(speeds) == ["ours nf4", "ours fp8", "peft nf4"], found["quantised"]
    assert all(row["tokens_per_second"] > 0 and row["peak"] > 0 for row in speeds.values())
    # The same base, bit for bit, and the same steps.
    assert speeds["ours nf4"]["loss"] == pytest.approx(speeds["peft nf4"]["loss"], rel=1e-6)
    more = found["loss"]["more than fp32"]
    assert list(more) == ["ours", "ours nf4", "ours fp8"] and 0 < abs(more["ours"]) < 0.01
    assert found["context"]["extrapolated"] == "to 2 layers" and found["context"]["bytes a token"] > 0


@pytest.mark.slow
def test_a_base_quantised_on_the_device_is_that_of_a_file(tmp_path):
    spec = importlib.util.spec_from_file_location("train_speed", REPO / "benchmarks/train_speed.py")
    train_speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_speed)
    shape = {name: value for name, value in train_speed.SHAPES["tiny"].items() if name != "rope_scaling"}
    config = ModelConfig(**shape, **train_speed.COMMON)
    data = str(tmp_path / "data.json")
    for kind in ("nf4", "nf4-dq", "fp8"):
        job = Namespace(precision="bf16-true", hold=kind, quick=False, data=data)
        there = stored_weights(train_speed.quantised_on(torch.device("cpu"), config, job))
        here = stored_weights(train_speed.held(config, job))
        assert there.keys() == here.keys() and len(there) == 14
        assert all(torch.equal(there[name].rows(), here[name].rows()) for name in there)
