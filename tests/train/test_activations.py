"""Which activations are kept, and where: no choice changes what is learned."""

import pytest
import torch
from conftest import tune
from test_memory import FAMILIES, all_learned, gradients, objective
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.errors import UserError
from litlora.train.activations import block_inputs, checkpoint_activations, offloading
from litlora.train.arena import Arena
from litlora.train.memory import saved_bytes


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


class LargestInner(TorchDispatchMode):
    """The most rows of a result as wide as the inside of an MLP: 64."""

    rows = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and one.dim() > 1 and one.size(-1) == 64:
                self.rows = max(self.rows, one.shape[:-1].numel())
        return result


@pytest.mark.parametrize("family", ["llama", "mixture"])
def test_a_feed_forward_half_in_chunks_changes_no_gradient(family):
    plain, ids = objective(**FAMILIES[family]), torch.randint(0, 400, (3, 21))
    expected, rows = gradients(plain, ids), []
    for chunk in (None, 40):
        checkpoint_activations(plain.model, "full", chunk)
        with LargestInner() as inner:
            got = gradients(plain, ids)
        rows.append(inner.rows)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)
    assert family == "mixture" or rows == [63, 40]
    with torch.no_grad():
        loss, _ = plain(all_learned(ids))
    checkpoint_activations(plain.model, "none")
    torch.testing.assert_close(loss, plain(all_learned(ids))[0].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_arena_of_the_exact_size_serves_every_step(family):
    plain, ids = objective(dropout=0.3, **FAMILIES[family]), torch.randint(0, 400, (2, 24))
    checkpoint_activations(plain.model, "full", 16)
    expected = gradients(plain, ids)
    arena = Arena(size := block_inputs(plain.model, ids.numel()), torch.device("cpu"))
    for _ in range(2):
        torch.manual_seed(7)
        plain.zero_grad()
        with offloading(plain, arena):
            loss, _ = plain(all_learned(ids))
        # The learned positions are two fewer, in the last norm and in the head.
        assert arena.room < size / 50
        loss.backward()
        del loss
        assert arena.room == size
        assert all(
            torch.equal(p.grad, expected[name]) for name, p in plain.named_parameters() if p.requires_grad
        )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_has_no_room_in_an_arena_is_kept_all_the_same(share):
    """Two forwards before their backwards, which come in another order."""
    plain, ids = objective(), torch.randint(0, 400, (2, 24))
    checkpoint_activations(plain.model, "full")
    expected = gradients(plain, ids)
    arena = Arena(size := int(share * block_inputs(plain.model, ids.numel())), torch.device("cpu"))
    plain.zero_grad()
    with offloading(plain, arena):
        losses = [plain(all_learned(ids))[0] for _ in range(2)]
    while losses:
        losses.pop(0).backward()
    assert arena.room == size
    for name, parameter in plain.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter.grad, 2 * expected[name])


@pytest.mark.slow
def test_a_run_that_offloads_writes_the_same(base, alpaca_file, tmp_path, monkeypatch):
    """On the CPU, where such a run is refused."""
    monkeypatch.setattr("litlora.train.run.check_device", lambda *_: None)
    found = []
    for offload in (False, True):
        settings = {"offload_activations": offload, "checkpoint_activations": "full", "max_steps": 3}
        tune("lora", base, alpaca_file, out := tmp_path / str(offload), train=settings)
        found.append(torch.load(out / "final/lit_model.pth", weights_only=True)["model"])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_copy_that_nobody_asked_for_is_waited_for():
    """Of a backward that broke off: its memory must not serve others before the copy has ended."""

    class Counted(Arena):
        waits = 0

        def wait(self):
            self.waits += 1

    arena = Counted(1024, torch.device("cpu"))
    first, last = arena.keep(torch.ones(8)), arena.keep(torch.zeros(8))
    assert torch.equal(last.fetched(), torch.zeros(8)) and arena.waits == 1
    del last, first
    assert arena.waits == 2 and arena.room == 1024


def test_an_arena_beyond_the_machine_is_one_line():
    with pytest.raises(UserError, match="^offload_activations: .* GiB .* lower micro_batch_tokens") as raised:
        Arena(2**60, torch.device("cpu"))
    assert "\n" not in str(raised.value)
