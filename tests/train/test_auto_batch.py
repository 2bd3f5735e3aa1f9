"""The size of a micro-batch, and what is recomputed: settled by memory, without a change in what is
learned."""

import math
import re
import shutil
from array import array

import pytest
import torch
from conftest import tune
from test_memory import measurable, objective

from litlora.checkpoint import open_checkpoint
from litlora.data.examples import Example
from litlora.errors import UserError
from litlora.lora import LoRAConfig
from litlora.settings import TrainConfig
from litlora.train import memory
from litlora.train.auto_batch import fit_to_memory, largest_fitting
from litlora.train.memory import DryRun
from litlora.train.objective import SFT
from litlora.train.optim import state_bytes
from litlora.train.parallel import Parallel


def test_the_largest_size_is_found_without_trying_what_is_far_too_large():
    for total in (1, 2, 7, 12, 24, 60, 64):
        sizes = [n for n in range(1, total + 1) if total % n == 0]
        for limit in range(0, total + 2):
            tried = []

            def fits(size, tried=tried, limit=limit):
                tried.append(size)
                return size <= limit

            fitting = [size for size in sizes if size <= limit]
            assert largest_fitting(sizes, fits) == (fitting[-1] if fitting else None)
            assert len(tried) == len(set(tried)) and tried[0] == 1
            above = min((size for size in sizes if size > limit), default=total)
            assert max(tried) <= max(2 * limit, above), "never much more than what is known to fit"


@pytest.mark.parametrize(
    ("packing", "checkpointing"),
    [
        *((True, "none"), (False, "full")),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(False, "none", marks=pytest.mark.slow),
    ],
)
def test_auto_batch_trains_what_its_size_by_hand_trains(
    packing, checkpointing, base, alpaca_file, tmp_path, capsys
):
    measurable()
    settings = {"lora": LoRAConfig(rank=2, dropout=0.3)}
    train = {"global_batch_size": 6, "checkpoint_activations": checkpointing, "packing": packing}
    tune("lora", base, alpaca_file, tmp_path / "auto", **settings, train={**train, "auto_batch": True})
    size = r"([\d,]+) tokens" if packing else r"(6) examples"
    said = rf"micro-batch: {size}, found by a dry run: the longest batch takes [\d.]+ GiB of [\d.]+ GiB \(80%"
    found = int(re.search(said, capsys.readouterr().out)[1].replace(",", ""))
    stored = (tmp_path / "auto/hyperparameters.yaml").read_text()
    name = "micro_batch_tokens" if packing else "micro_batch_size"
    assert f"{name}: {found}\n" in stored and "auto_batch: false\n" in stored
    tune("lora", base, alpaca_file, tmp_path / "hand", **settings, train={**train, name: found})
    auto, hand = (open_checkpoint(tmp_path / name / "final").tensors for name in ("auto", "hand"))
    assert auto.keys() == hand.keys() and all(torch.equal(auto[name], hand[name]) for name in auto)


def test_auto_batch_tries_on_the_cpu_only_what_will_fit(monkeypatch):
    tried = []

    class Counted(DryRun):
        def expected(self, trial):
            return 11_000

        def peak(self, trial):
            tried.append(len(trial.lengths))
            return 1000 + 10_000 * len(trial.lengths)

    def fit(free):
        monkeypatch.setattr(memory, "free_ram", lambda: free + reserved)
        return fit_to_memory(Parallel("cpu"), plain, examples, config, lambda line: None, Counted)

    config = TrainConfig(global_batch_size=12, auto_batch=True)
    plain = SFT(objective(dtype=torch.float32).model, config)
    reserved = math.ceil(state_bytes(plain.trainable(), config) / 0.8)
    examples = [Example(array("i", range(20)), ((3, 20),))] * 36
    found = fit(64_000)
    assert tried == [1, 2, 4]  # 41,000 of 51,200; 5 would take 51,250 by what 4 took
    assert found.micro_batch_tokens == 80 and not found.auto_batch
    tried.clear()
    with pytest.raises(
        UserError, match=r"^auto_batch: not even one example of 20 tokens fits .*; lower max_seq_length$"
    ):
        fit(12_000)
    assert not tried


def test_a_run_for_which_memory_is_too_short_leaves_nothing_behind(base, alpaca_file, tmp_path, monkeypatch):
    measurable()
    monkeypatch.setattr(memory, "free_ram", lambda: 12_000)
    with pytest.raises(UserError, match=r"auto_batch: not even one example of \d+ tokens fits "):
        tune("lora", base, alpaca_file, tmp_path / "none", train={"auto_batch": True})
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_activations_are_computed_again_where_memory_would_not_hold_them(
    base, alpaca_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "free_ram", lambda: 2**40)
    tune("lora", base, alpaca_file, tmp_path / "kept")
    assert "activations:" not in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_ram", lambda: 300_000)
    tune("lora", base, alpaca_file, tmp_path / "again")
    assert "activations: recomputed in the backward (full)" in capsys.readouterr().out
    assert "checkpoint_activations: full\n" in (tmp_path / "again/hyperparameters.yaml").read_text()
    kept, again = (open_checkpoint(tmp_path / name / "final").tensors for name in ("kept", "again"))
    for name in kept:
        torch.testing.assert_close(again[name], kept[name], rtol=1e-4, atol=1e-5)


def settled(monkeypatch, free: int, **changes) -> tuple[TrainConfig, str]:
    """What the settings become with so many free bytes beyond those of the optimizer, and what is said."""
    config, said = TrainConfig(max_seq_length=128, **changes), []
    plain = SFT(objective(dtype=torch.float32).model, config)
    reserved = state_bytes(plain.trainable(), config)
    monkeypatch.setattr(memory, "free_ram", lambda: math.ceil((free + reserved) / 0.8))
    examples = [Example(array("i", [1] * 32), ((3, 32),))] * 8
    return fit_to_memory(Parallel("cpu"), plain, examples, config, said.append), " ".join(said)


def test_packs_are_smaller_where_recomputing_is_not_enough(monkeypatch):
    config, said = settled(monkeypatch, 2**40)
    assert (config.micro_batch_tokens, config.checkpoint_activations, said) == (None, "none", "")
    config, said = settled(monkeypatch, 700_000)
    assert config.micro_batch_tokens == 64 and config.checkpoint_activations == "full"
    assert "micro-batch: 64 tokens instead of 128, which would still take" in said and "warning" not in said
    config, said = settled(monkeypatch, 20_000)
    assert config.micro_batch_tokens == 32  # one example
    assert "warning: a micro-batch of 32 tokens may take about" in said
    assert said.endswith("the system ends what takes too much: lower micro_batch_tokens or max_seq_length")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"micro_batch_tokens": 64}, "micro_batch_tokens or max_seq_length"),
        ({"packing": False}, "micro_batch_size or max_seq_length"),
        ({"update_early": True, "max_grad_norm": 0}, "global_batch_size or max_seq_length"),
    ],
)
def test_a_size_that_matters_or_was_chosen_stays_with_a_warning(monkeypatch, changes, remedy):
    config, said = settled(monkeypatch, 20_000, **changes)
    assert config.micro_batch_tokens == changes.get("micro_batch_tokens")
    assert "warning: a micro-batch of" in said and said.endswith(f"lower {remedy}")


def test_what_a_run_chose_by_memory_stays_when_it_resumes(base, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_ram", lambda: 300_000)
    train = {"max_steps": 2, "save_interval": 1, "keep_checkpoints": 2}
    tune("lora", base, alpaca_file, tmp_path / "run", train=train)
    stored = (tmp_path / "run/hyperparameters.yaml").read_text()
    assert "checkpoint_activations: full\n" in stored and re.search(r"micro_batch_tokens: \d+\n", stored)
    shutil.rmtree(tmp_path / "run/final")
    monkeypatch.setattr(memory, "free_ram", lambda: 2**40)
    tune("lora", base, alpaca_file, tmp_path / "run", train=train, resume="auto")
    again = (tmp_path / "run/hyperparameters.yaml").read_text()
    assert again.count("micro_batch_tokens: null") == 0
