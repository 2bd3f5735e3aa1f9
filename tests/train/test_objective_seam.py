"""An objective from outside the library: it trains, logs its figures, and resumes to the bit."""

import csv
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import AfterStep, extra_sinks
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.cli import parse
from litlora.data.batches import collate
from litlora.data.sources import read_dataset
from litlora.errors import UserError
from litlora.lora import LoRAConfig, adapter_of, add_lora
from litlora.settings import FinetuneLoRA
from litlora.storage.tensors import open_torch
from litlora.train.method import Method
from litlora.train.objective import Objective
from litlora.train.run import finetune
from litlora.train.run_directory import run_directory


class Unlikelihood(Objective):
    """Likely answers, unlikely repetitions of the token before (Welleck et al. 2020), at a learned
    temperature."""

    figures = ("repetition",)

    def __init__(self, model, config=None, contexts=()):
        super().__init__(model, config, contexts)
        self.temperature = nn.Parameter(torch.ones(()))

    def batch(self, examples, device):
        return collate(examples, mask_prompt=True, packed=True)

    def loss(self, batch):
        log_p = F.log_softmax(self.model.logits(self.hidden(batch)) / self.temperature, -1)
        before = log_p.gather(1, batch.input_ids.flatten()[batch.positions, None]).exp()
        repetition = -torch.log1p(-before.clamp(max=0.999)).sum()
        return F.nll_loss(log_p, batch.targets, reduction="sum") + repetition, {"repetition": repetition}

    def weight(self, example):
        return len(collate([example], mask_prompt=True, packed=True).targets)

    def length(self, example):
        return len(example.ids)

    def content(self, example):
        return example.ids.tobytes()


MEASURED = ("seconds", "tokens_per_second", "peak_memory_gib")
"""What differs from run to run."""


@pytest.fixture
def tune(base, alpaca_file):
    """tune(out, *words, stop_after=None): a LoRA run on the toy objective, as an entry file would
    start it."""

    def tune(out, *words, stop_after=None, objective=Unlikelihood):
        lora = LoRAConfig(rank=2, dropout=0.3)
        method = Method(
            prepare=lambda model: add_lora(model, lora),
            trains_base=False,
            content=lambda model: adapter_of(model, lora),
            objective=objective,
            stores="the adapter only",
            resume="again {command} {config}",
            repeat="anew {command} {config}",
            next="see {result}",
        )
        inputs = ["--checkpoint_dir", base, "--data", "JSON", "--data.path", alpaca_file, "--out_dir", out]
        inputs += ["--accelerator", "cpu", "--train.global_batch_size", 6, "--train.micro_batch_tokens", 200]
        inputs += ["--data.val_fraction", 0.1, "--train.max_steps", 9, "--train.log_interval", 4, *words]
        settings = parse(FinetuneLoRA, [str(word) for word in inputs])
        kill = AfterStep(stop_after or 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
        place = run_directory(settings.out_dir, "out", overwrite=False, resume=settings.resume, inputs=[])
        with extra_sinks(kill):
            finetune(settings, method, read_dataset(settings.data), place)
        return out

    return tune


def rows(out):
    found = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


def test_a_foreign_objective_trains_and_resumes_to_the_bit(tune, tmp_path, capsys):
    expected = tune(tmp_path / "expected")
    logged = [row for row in rows(expected) if row["loss"]]
    assert [row["step"] for row in logged] == ["1", "4", "8", "9"]
    assert all(0 < float(row["repetition"]) < float(row["loss"]) for row in logged)
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    assert "| repetition 0." in capsys.readouterr().out

    out = tmp_path / "out"
    for stop in (3, 6):  # in the middle of an interval: its figures are kept too
        with pytest.raises(SystemExit):
            tune(out, "--resume", "auto", stop_after=stop)
    state = open_torch(out / "step-000006/state.pth")
    assert state["weights"]["temperature"] != 1, "what the objective trains itself is kept"
    assert f"resume: again python {os.sys.argv[0]}" in capsys.readouterr().out
    tune(out, "--resume", "auto")
    assert (out / "final/lit_model.pth").read_bytes() == (expected / "final/lit_model.pth").read_bytes()
    assert rows(out) == rows(expected)
    assert open_checkpoint(out / "final").kind == "adapter"


def test_weights_are_named_by_the_model_whatever_the_objective(tune, tmp_path):
    """So the state of a run does not depend on what is wrapped around the model."""

    class Again(Unlikelihood):
        def __init__(self, model, config=None, contexts=()):
            super().__init__(model, config, contexts)
            self.head = nn.Identity()

    with pytest.raises(SystemExit):
        tune(tmp_path / "out", stop_after=2)
    names = open_torch(tmp_path / "out/step-000002/state.pth")["weights"].keys()
    assert {name for name in names if "lora" in name} == set(
        open_checkpoint(tmp_path / "out/step-000002").tensors
    )
    tune(tmp_path / "out", "--resume", "auto", objective=Again)


def test_memory_is_settled_without_pieces_of_a_batch(tune, tmp_path, capsys):
    """What an objective does not offer is estimated generously."""
    try:
        tune(tmp_path / "out", "--train.auto_batch", "true")
    except UserError as error:  # a machine that cannot measure
        pytest.skip(str(error))
    assert "found by a dry run" in capsys.readouterr().out
