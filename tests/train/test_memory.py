"""What is kept, what is computed again and how large a batch may be: all of it without a change in
what is learned."""

import math
import re
from array import array

import pytest
import torch
from conftest import tiny_config, tune
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.data.batches import Batch
from litlora.data.examples import Example
from litlora.errors import UserError
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.ram import free_ram
from litlora.settings import TrainConfig
from litlora.train import memory
from litlora.train.activations import checkpoint_activations, offloading
from litlora.train.auto_batch import fit_to_memory, largest_fitting
from litlora.train.memory import DryRun, Trial, expected_peak, generous_peak, saved_bytes
from litlora.train.objective import SFT
from litlora.train.optim import state_bytes
from litlora.train.parallel import Parallel

CPU = torch.device("cpu")
FAMILIES = {
    "llama": {},
    "gemma": {
        "norm": "rmsnorm_plus_one",
        "norm_position": "both",
        "attn_logit_softcapping": 20.0,
        "hidden_act": "gelu_tanh",
    },
    "mixture": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def objective(seed=0, dropout=0.0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes)).to(dtype)
    add_lora(model, LoRAConfig(rank=2, dropout=dropout), dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    return SFT(model, TrainConfig(packing=False)).train()


def all_learned(ids):
    """A padded batch (B, T) of which every token but the first of a row is learned."""
    B, T = ids.shape
    positions = torch.arange(B * T).view(B, T)[:, :-1].flatten()
    return Batch(ids, positions, ids.flatten()[positions + 1], None)


def gradients(objective, ids):
    torch.manual_seed(7)
    objective.zero_grad()
    objective(all_learned(ids))[0].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


# ---- activations


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["full", "selective"])
def test_computing_again_changes_no_gradient(how, family):
    plain, ids = objective(dropout=0.3, **FAMILIES[family]), torch.randint(0, 400, (2, 24))
    expected, kept = gradients(plain, ids), saved_bytes(plain, all_learned(ids))
    names = [name for name, _ in plain.named_parameters()]
    checkpoint_activations(plain.model, how)
    got = gradients(plain, ids)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)
    assert saved_bytes(plain, all_learned(ids)) < (0.4 if how == "full" else 0.85) * kept, (
        "something must be given up"
    )
    assert [name for name, _ in plain.named_parameters()] == names
    checkpoint_activations(plain.model, "none")
    assert saved_bytes(plain, all_learned(ids)) == kept


def test_nothing_is_computed_again_where_nothing_is_learned():
    plain, calls = objective(), []
    checkpoint_activations(plain.model, "full")
    plain.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(0, 400, (2, 8))
    with torch.no_grad():
        plain(all_learned(ids))
    assert len(calls) == 1
    plain(all_learned(ids))[0].backward()
    assert len(calls) == 3


def test_offloading_copies_activations_and_no_weight():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)
    with offloading(layer):
        y = torch.mm(x * 1, layer.weight)
    assert y.grad_fn._saved_mat2.data_ptr() == layer.weight.data_ptr()
    plain, ids = objective(), torch.randint(0, 400, (2, 24))
    expected = gradients(plain, ids)
    with offloading(plain):
        got = gradients(plain, ids)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_offloading_has_no_effect_on_the_cpu(base, alpaca_file, tmp_path):
    with pytest.raises(UserError, match="^offload_activations has no effect on cpu"):
        tune("lora", base, alpaca_file, tmp_path / "out", train={"offload_activations": True})


# ---- how much there is


def test_free_memory_is_the_least_of_the_machine_and_every_group(tmp_path):
    def put(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert free_ram(tmp_path) is None
    put("proc/meminfo", "MemTotal:  200 kB\nMemAvailable:   100 kB\n")
    put("proc/self/cgroup", "5:cpuset:/\n4:cpu,memory:/box/inner\n0::/box/inner\n")
    assert free_ram(tmp_path) == 100 * 1024
    v1, v2 = "sys/fs/cgroup/memory/box", "sys/fs/cgroup/box"
    put(f"{v2}/memory.max", "max\n")
    put(f"{v2}/memory.current", "5000\n")
    assert free_ram(tmp_path) == 100 * 1024
    put(f"{v2}/inner/memory.max", "90000\n")
    put(f"{v2}/inner/memory.current", "50000\n")
    put(f"{v2}/inner/memory.stat", "anon 1\ninactive_file 7000\n")
    assert free_ram(tmp_path) == 47000
    put(f"{v1}/memory.limit_in_bytes", "40000\n")
    put(f"{v1}/memory.usage_in_bytes", "30000\n")
    put(f"{v1}/memory.stat", "inactive_file 1\ntotal_inactive_file 2000\n")
    assert free_ram(tmp_path) == 12000
    put(f"{v1}/memory.usage_in_bytes", "50000\n")
    assert free_ram(tmp_path) == 0


def test_this_machine_tells_its_memory():
    free = free_ram()
    if free is None:
        pytest.skip("no /proc here")
    assert 2**20 < free < 2**50


# ---- how large a batch fits


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


def measurable():
    if memory.available_memory(CPU) is None:
        pytest.skip("the memory in use cannot be measured here")


def test_a_dry_run_leaves_nothing_behind_but_its_peak():
    measurable()

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            # 64 MiB each: the random numbers, two products
            return (torch.rand(2**24) * self.weight * x).sum(), {}

    wide = Wide()
    run, random = DryRun(wide, CPU), torch.get_rng_state()
    peak = run.peak(Trial(torch.ones(1), [1], 1))
    assert 120 * 2**20 < peak < 400 * 2**20
    assert (
        wide.weight.grad is None
        and torch.equal(torch.get_rng_state(), random)
        and float(wide.weight.detach()) == 1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_short_pieces_tell_what_the_whole_keeps(family):
    """Attention that keeps its scores grows with the square of the length; a line through two
    lengths would miss that."""
    size = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "max_position_embeddings": 1024,
    }
    wide = objective(dtype=torch.float32, **{**FAMILIES[family], **size})
    ids = torch.randint(0, 400, (2, 512))
    state = torch.get_rng_state()
    trial = Trial(all_learned(ids), [512] * 2, 2 * 511)
    expected, kept = expected_peak(wide, trial), saved_bytes(wide, trial.batch)
    logits, gradients = 2 * 511 * 400 * 12, sum(p.nbytes for p in wide.parameters() if p.requires_grad)
    assert (expected - logits - gradients) / (1.2 + 1 / 4) == pytest.approx(kept, rel=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert generous_peak(wide, trial) > 1.5 * expected


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("packing", [True, False])
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
    reserved = math.ceil(state_bytes([p for p in plain.parameters() if p.requires_grad], config) / 0.8)
    examples = [Example(array("i", range(20)), 3)] * 36
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


def test_an_allocator_that_refuses_means_a_batch_that_does_not_fit():
    class Refused(nn.Module):
        def forward(self, *_):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )

    class Broken(nn.Module):
        def forward(self, *_):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    assert DryRun(Refused(), CPU).peak(Trial(1, [1], 1)) is None
    with pytest.raises(RuntimeError, match="shapes"):
        DryRun(Broken(), CPU).peak(Trial(1, [1], 1))
