"""torch.compile of the blocks: the same gradients under the same names, or one line."""

import os
import shutil
from array import array
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_config, tune

from litlora.data.examples import Example
from litlora.errors import UserError
from litlora.kernels import cross_entropy
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.settings import TrainConfig
from litlora.train.activations import checkpoint_activations
from litlora.train.compile import compile_blocks, compile_head
from litlora.train.objective import SFT

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler


def examples(*lengths):
    return [
        Example(array("i", torch.randint(0, 400, (length,)).tolist()), ((1, length),)) for length in lengths
    ]


def gradients(objective, batches):
    objective.zero_grad()
    for one in batches:
        objective(one)[0].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "how"), [(True, "none"), (True, "full"), (False, "selective")])
def test_a_compiled_model_learns_the_same_under_the_same_names(packed, how):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    # torch 2.11 cannot compile its own attention over padded rows in float64.
    is_exact = packed or torch.__version__ >= "2.12"
    dtype, apart = (torch.float64, 1e-10) if is_exact else (torch.float32, 1e-5)
    model = GPT(tiny_config(num_hidden_layers=1)).to(dtype)
    add_lora(model, LoRAConfig(rank=2), dtype)
    objective = SFT(model, TrainConfig(packing=packed)).train()
    sizes = ((9, 4), (14, 5, 11), (3, 8, 2, 2))
    batches = [objective.batch(examples(*lengths), torch.device("cpu")) for lengths in sizes]
    names, expected = [name for name, _ in model.named_parameters()], gradients(objective, batches)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    checkpoint_activations(model, how)
    compile_blocks(model, recomputed=how == "full")
    graphs = torch._dynamo.utils.counters["stats"]
    gradients(objective, batches[:2])
    compiled = graphs["unique_graphs"]
    assert compiled > 0, "it must have compiled"
    got = gradients(objective, batches)
    assert graphs["unique_graphs"] == compiled, "what is compiled must serve batches of any lengths"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [name for name, _ in model.named_parameters()] == names and list(model.state_dict()) == names
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=apart)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 48])
def test_steps_of_any_sizes_share_a_few_graphs(window):
    """LoRA on all linear layers: fifty packs, compiled, learn what they learn
    unpadded and uncompiled."""
    windows = {} if window is None else {"sliding_window": window, "full_attention_layers": (1,)}
    model = GPT(tiny_config(**windows)).double()
    add_lora(model, LoRAConfig(rank=2, targets=["all-linear"]), torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    random = torch.Generator().manual_seed(0)

    def number(most):
        return int(torch.randint(2, most, (), generator=random))

    packs = [examples(*(number(60) for _ in range(number(12)))) for _ in range(50)]
    plain, padded = SFT(model, TrainConfig(compile=False)), SFT(model, TrainConfig(compile=True))
    batches = [plain.batch(pack, torch.device("cpu")) for pack in packs]
    expected = [gradients(plain, [batch]) for batch in batches]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_blocks(model, backend="aot_eager")
    got = [gradients(padded, [batch]) for batch in batches]
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4, counters["stats"]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 28
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10)


@pytest.mark.slow
def test_compiled_blocks_take_the_casts_of_a_step():
    """A and B in fp32 in a model that computes in float64: their gradients are rounded once, to fp32."""
    model = GPT(tiny_config()).double()
    add_lora(model, LoRAConfig(rank=2, targets=["all-linear"]))
    objective = SFT(model, TrainConfig(compile=True))
    packs = [objective.batch(examples(*lengths), torch.device("cpu")) for lengths in ((9, 4), (30, 5), (70,))]
    start = {name: p.detach().clone() for name, p in objective.trainable().items()}

    def steps(context):
        """Their gradients, each with weights that the one before has changed."""
        found, trained = [], objective.trainable()
        with torch.no_grad():
            torch._foreach_copy_(list(trained.values()), [start[name] for name in trained])
        for pack in packs:
            with context():
                found.append(gradients(objective, [pack]))
            with torch.no_grad():
                torch._foreach_sub_(list(trained.values()), [p.grad for p in trained.values()])
        return found

    expected = steps(nullcontext)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_blocks(model, backend="aot_eager")
    got = steps(objective.in_step)
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4, counters["stats"]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 28
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_attention_in_chunks_is_not_compiled_for_each_pack():
    model = GPT(tiny_config(attention_chunk_size=7, full_attention_layers=(1,))).double()
    add_lora(model, LoRAConfig(rank=2), torch.float64)
    plain, padded = SFT(model, TrainConfig(compile=False)), SFT(model, TrainConfig(compile=True))
    packs = [(9, 4), (30, 5, 11), (3, 8, 2, 2), (40, 1, 23), (16, 6)]
    batches = [padded.batch(examples(*lengths), torch.device("cpu")) for lengths in packs]
    expected = [gradients(plain, [batch]) for batch in batches]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_blocks(model, backend="aot_eager")
    got = [gradients(padded, batches[:1])]
    compiled = counters["stats"]["unique_graphs"]
    got += [gradients(padded, [batch]) for batch in batches[1:]]
    assert 0 < compiled == counters["stats"]["unique_graphs"], counters["stats"]
    for ours, theirs in zip(got, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_loss_at_the_head_has_a_few_graphs_for_packs_of_any_sizes(cap, backend, monkeypatch):
    """Learned, and validated; over several blocks of tokens and tiles of the vocabulary, the last of
    which is smaller."""
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler here")
    monkeypatch.setitem(cross_entropy.TILES, "cpu", cross_entropy.Tiles(64, 64 * 170))
    # No size of a block is the width: the compiler would take that for another kind, once.
    model = GPT(tiny_config(num_hidden_layers=1, hidden_size=48, final_logit_softcapping=cap)).double()
    add_lora(model, LoRAConfig(rank=2), torch.float64)
    objective = SFT(model, TrainConfig(compile=True))
    packs = [(9, 4), (120, 14, 11), (3, 8, 2, 2), (100,), (40, 50)]
    batches = [objective.batch(examples(*lengths), torch.device("cpu")) for lengths in packs]
    expected = [(objective(batch)[0].detach(), gradients(objective, [batch])) for batch in batches]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_head(objective, backend=backend)
    for batch, (loss, wanted) in zip(batches, expected, strict=True):
        got = gradients(objective, [batch])
        with torch.no_grad():
            torch.testing.assert_close(objective(batch)[0], loss, rtol=1e-12, atol=0)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-10)
    assert not counters["graph_break"]
    # With a gradient and without, in one block and in several.
    assert counters["stats"]["unique_graphs"] == 4, counters["stats"]


def test_without_a_compiler_it_is_one_line(base, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(
        UserError, match="^compile: torch.compile does not work here .* C\\+\\+ compiler"
    ) as raised:
        tune("lora", base, alpaca_file, tmp_path / "out", train={"compile": True})
    assert "\n" not in str(raised.value)
