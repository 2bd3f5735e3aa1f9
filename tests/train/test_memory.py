"""The memory of a training step: how much there is, and what a batch needs."""

import errno
import inspect
import linecache

import pytest
import torch
from conftest import tiny_config
from torch import nn

from litlora.data.batches import Batch
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.ram import free_ram, is_lack_of_memory
from litlora.settings import TrainConfig
from litlora.train import memory
from litlora.train.memory import DryRun, Trial, expected_peak, generous_peak, saved_bytes
from litlora.train.objective import SFT

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


def test_a_function_without_source_means_a_lack_of_memory(monkeypatch):
    """linecache takes a MemoryError for an empty file: inspect then fails without a number."""

    def unreadable(*args):
        raise MemoryError

    linecache.clearcache()
    monkeypatch.setattr(linecache, "updatecache", unreadable)
    with pytest.raises(OSError) as raised:
        inspect.getsource(free_ram)
    assert is_lack_of_memory(raised.value)
    assert not is_lack_of_memory(OSError("another")) and is_lack_of_memory(OSError(errno.ENOMEM, "no room"))


def test_this_machine_tells_its_memory():
    free = free_ram()
    if free is None:
        pytest.skip("no /proc here")
    assert 2**20 < free < 2**50


# ---- what a batch needs


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
