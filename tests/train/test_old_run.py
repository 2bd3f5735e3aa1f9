"""A run that an earlier version of litlora began is resumed by this one (see
old_run_files/make.py)."""

import csv
import importlib.util
import shutil
from pathlib import Path

import torch
from conftest import REPO

from litlora.checkpoint import open_checkpoint
from litlora.cli import parse
from litlora.settings import FinetuneLoRA
from litlora.storage.tensors import open_torch

FILES = Path(__file__).parent / "old_run_files"


def test_a_state_that_names_weights_through_wrappers_is_resumed_to_the_same_result(tmp_path):
    """Not forced: the hashes of the base and of the data are the same as well. The tolerance is for
    processors other than the one that made the files, where it is 0."""
    step = tmp_path / "run/step-000004"
    shutil.copytree(FILES / "run/step-000004", step)
    state = open_torch(step / "state.pth")
    assert all(name.startswith("module.model.model.layers.0.") for name in state["weights"])
    spec = importlib.util.spec_from_file_location("command_lora", REPO / "finetune/lora.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    words = ["--config", step / "hyperparameters.yaml", "--checkpoint_dir", FILES / "base"]
    words += ["--data.path", FILES / "records.json", "--out_dir", tmp_path / "run", "--resume", "auto"]
    command.main(parse(FinetuneLoRA, [str(word) for word in words]))

    resumed, expected = (open_checkpoint(run / "final").tensors for run in (tmp_path / "run", FILES / "run"))
    assert resumed.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(resumed[name], expected[name], rtol=1e-4, atol=1e-6)
    rows, earlier = (
        list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
        for run in (tmp_path / "run", FILES / "run")
    )
    assert [row["step"] for row in rows] == [row["step"] for row in earlier]
    assert rows[:4] == earlier[:4], "those up to the checkpoint come from it"
