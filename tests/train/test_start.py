"""Runs whose adapters start by the weights or the data: what is saved fits the base as it is."""


import pytest
import torch
from conftest import tune

from litlora.lora import LoRAConfig

IDS = torch.arange(20)[None] * 7 % 300
EXACT = {"precision": "32-true", "train": {"save_interval": 3}}


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "eva"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_run_resumes_to_the_bit(init, variant, base, alpaca_file, tmp_path):
    config = {**EXACT, "lora": LoRAConfig(rank=2, dropout=0.1, init=init, variant=variant)}
    tune("lora", base, alpaca_file, tmp_path / "run", **config)
    step = tmp_path / "run/step-000003"
    tune("lora", base, alpaca_file, tmp_path / "resumed", resume=str(step), **config)
    files = [tmp_path / name / "final/lit_model.pth" for name in ("run", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
