"""A merge that is not what was tested is refused, whatever went wrong, and leaves nothing that
looks finished."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_checkpoint import write_adapter
from test_merge import merge

from litlora.adapters import merge as merging
from litlora.adapters.merge import MergedTensor, converted, plan_merge, plan_sum
from litlora.adapters.verify import bytes_needed, live_model, logits, tolerance, verify
from litlora.checkpoint import open_checkpoint, reference_to, resolve, write_full
from litlora.checkpoint import write_adapter as store_adapter
from litlora.errors import CheckpointError
from litlora.load import load
from litlora.lora import Adapter, LoRAConfig, Update
from litlora.model import GPT
from litlora.storage.pages import MAX_HELD

IDS = torch.arange(30).view(1, 30)


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def adapter(request, tmp_path, make_checkpoint):
    return write_adapter(tmp_path / "adapter", make_checkpoint("base", dtype=request.param))


def remains(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def merged_and_damaged(out, adapter, damage, *, verified=True):
    """Write a merge, let `damage` change its tensors in the file, and verify it before it gets its
    name."""
    chain = resolve(adapter)
    plan, config = plan_merge(chain)

    def check(directory):
        content = torch.load(directory / "lit_model.pth", weights_only=True)
        damage(content["model"])
        torch.save(content, directory / "lit_model.pth")
        if verified:
            verify(plan, config, directory, IDS)

    write_full(out, plan, config, sidecars_from=chain.sources, check=check)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_one_wrong_value_in_the_file_is_seen(tmp_path, adapter, name):
    """An updated tensor and one that is only copied."""

    def damage(tensors):
        tensors[name].view(-1)[5] *= 1.02

    with pytest.raises(CheckpointError, match=rf"not kept: {name} is not the sum that was to be written"):
        merged_and_damaged(tmp_path / "out", adapter, damage)
    assert remains(tmp_path) == ["adapter", "base"]
    merged_and_damaged(tmp_path / "out", adapter, damage, verified=False)


@pytest.mark.parametrize("steps", [1, -1])
def test_the_wrong_one_of_two_neighbours_is_seen(tmp_path, adapter, steps):
    """The last bit of one value: nearer than another value of its dtype, yet not what the sum
    rounds to."""

    def damage(tensors):
        for name in (name for name in tensors if name.endswith("up_proj.weight")):
            is_short = tensors[name].itemsize == 2
            bits = tensors[name].view(torch.int16 if is_short else torch.int32).view(-1)
            bits[3] += steps * (1 if is_short else 64)

    with pytest.raises(CheckpointError, match="up_proj.weight is not the sum that was to be written"):
        merged_and_damaged(tmp_path / "out", adapter, damage)


@pytest.mark.parametrize("wrong", ["a value", "a token"])
def test_a_failure_leaves_the_number_of_threads(tmp_path, adapter, wrong):
    """Of this thread, and of those that start later."""
    merge(tmp_path / "out", adapter)
    plan, config = plan_merge(resolve(adapter))
    ids = IDS
    if wrong == "a value":
        plan = {name: dataclasses.replace(tensor, links=()) for name, tensor in plan.items()}
    else:
        ids = torch.tensor([[config.vocab_size]])
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises((CheckpointError, IndexError)):
            verify(plan, config, tmp_path / "out", ids)
        with ThreadPoolExecutor(1) as later:
            assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(before)


def test_a_wrong_sum_is_seen_in_the_logits(tmp_path, adapter, monkeypatch):
    """The update subtracted instead of added: each number is what the sum says, yet it is not the
    live model."""
    exact = MergedTensor.exact
    monkeypatch.setattr(
        MergedTensor, "exact", lambda self, rows, into=None: 2 * self.before(rows).float() - exact(self, rows)
    )
    with pytest.raises(
        CheckpointError, match="not kept: the merged model is not the live one: their logits differ by"
    ):
        merge(tmp_path / "out", adapter)
    assert remains(tmp_path) == ["adapter", "base"]


def test_a_mistake_in_untying_is_seen_in_the_logits(tmp_path, make_checkpoint, monkeypatch):
    """The head keeps the base's weight, not the one that the embedding's update was trained on."""
    base = make_checkpoint("base", tie_word_embeddings=True)
    chain, end = resolve(base), "model.embed_tokens"
    below = torch.randn_like(chain.base.tensors[f"{end}.weight"])
    config = LoRAConfig(rank=3, targets=[end], modules_to_save=[end])
    update = Update(torch.randn(3, 32), torch.randn(400, 3), config.alpha / 3)
    adapter = Adapter(
        config, {end: update}, {f"{end}.weight": below}, reference_to(chain.base, tmp_path / "adapter")
    )
    store_adapter(tmp_path / "adapter", adapter, chain.config, sidecars_from=[base])
    for strength in (1.0, 0.5):
        merge(tmp_path / f"out {strength}", tmp_path / "adapter", strength=strength)
    monkeypatch.setattr(merging, "whole_of", lambda adapter, config: adapter.whole)
    for strength in (1.0, 0.5):
        with pytest.raises(CheckpointError, match="not kept: the merged model is not the live one"):
            merge(tmp_path / "wrong", tmp_path / "adapter", strength=strength)


def test_a_refused_merge_keeps_what_it_was_to_replace(tmp_path, adapter, monkeypatch):
    merge(tmp_path / "out", adapter)
    before = (tmp_path / "out/lit_model.pth").read_bytes()
    exact = MergedTensor.exact
    monkeypatch.setattr(
        MergedTensor, "blocks", lambda self, memory: iter([exact(self, slice(None)).mul(1.1).to(self.dtype)])
    )
    with pytest.raises(CheckpointError, match="not kept"):
        merge(tmp_path / "out", adapter, overwrite=True)
    assert (tmp_path / "out/lit_model.pth").read_bytes() == before
    assert remains(tmp_path) == ["adapter", "base", "out"]


def test_the_live_side_is_the_live_model(tmp_path, adapter):
    plan, config = plan_merge(resolve(adapter))
    theirs = load(adapter, live=True).model
    with torch.no_grad():
        torch.testing.assert_close(
            logits(*live_model(plan, config), IDS), theirs.float()(IDS)[0], atol=1e-5, rtol=1e-5
        )


WHOLE = {"targets": "qv", "modules_to_save": ["lm_head", "norm", "embed_tokens"]}


def test_of_a_chain_no_weight_below_the_last_link_is_held(tmp_path, make_checkpoint):
    first = write_adapter(tmp_path / "first", make_checkpoint("base", dtype=torch.bfloat16), **WHOLE)
    second = write_adapter(tmp_path / "second", first, seed=2, targets="qv")
    model, computed = live_model(*plan_merge(resolve(second)))
    assert all(p.untyped_storage().nbytes() <= 4 for p in computed)
    names = {
        name.rpartition(".linear")[0].rpartition(".")[2]
        for name, p in model.named_parameters()
        if p in computed
    }
    assert names == {"q_proj", "v_proj"}
    with torch.no_grad():
        theirs = load(second, live=True).model.float()(IDS)[0]
        torch.testing.assert_close(logits(model, computed, IDS), theirs, atol=1e-5, rtol=1e-5)


def test_of_a_sum_of_whole_tensors_none_is_held(tmp_path, make_checkpoint):
    base = make_checkpoint("base", dtype=torch.bfloat16)
    adapters = [write_adapter(tmp_path / f"{seed}", base, seed=seed, **WHOLE) for seed in (1, 2)]
    plan, config = plan_sum([resolve(adapter) for adapter in adapters], [0.5, 0.25])
    model, computed = live_model(plan, config)
    assert {"model.embed_tokens.weight", "lm_head.weight"} == {
        name for name, p in model.named_parameters() if p in computed
    }
    assert all(p.untyped_storage().nbytes() <= 4 for p in computed)
    theirs = GPT.from_tensors(config, {name: tensor.exact(slice(None)) for name, tensor in plan.items()})
    with torch.no_grad():
        torch.testing.assert_close(logits(model, computed, IDS), theirs(IDS)[0], atol=1e-5, rtol=1e-5)


def test_the_report_holds_what_was_measured(tmp_path, adapter):
    merge(tmp_path / "out", adapter)
    plan, config = plan_merge(resolve(adapter))
    report = verify(plan, config, tmp_path / "out", IDS)
    live, merged = (
        load(path, live=live).model.float() for path, live in ((adapter, True), (tmp_path / "out", False))
    )
    with torch.no_grad():
        live, merged = live(IDS)[0].double(), merged(IDS)[0].double()
    assert report.tokens == 30
    assert report.max_difference == pytest.approx((live - merged).abs().max().item(), rel=0.2, abs=1e-6)
    kl = torch.nn.functional.kl_div(
        merged.log_softmax(-1), live.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    assert report.kl == pytest.approx(kl, rel=0.05, abs=1e-10)
    lost = update = 0.0
    shares = {}
    for name, W in open_checkpoint(tmp_path / "base").tensors.items():
        module = name.removesuffix(".weight")
        tensors = open_checkpoint(adapter).tensors
        if f"{module}.lora_A" in tensors:
            delta = 8 * tensors[f"{module}.lora_B"].double() @ tensors[f"{module}.lora_A"].double()
            loss = open_checkpoint(tmp_path / "out").tensors[name].double() - W.double() - delta
            lost, update = lost + loss.square().sum(), update + delta.square().sum()
            shares[module] = (loss.norm() / delta.norm()).item()
    assert report.lost == pytest.approx((lost / update).sqrt().item(), rel=0.02, abs=1e-7)
    if report.lost > 1e-6:  # of fp32 nothing is lost that could be told from the sum's own rounding
        assert report.worst == (max(shares, key=shares.get), pytest.approx(max(shares.values()), rel=0.02))


def test_tolerances_follow_the_precision():
    assert tolerance(torch.bfloat16) == 8 * tolerance(torch.float16) > 1000 * tolerance(torch.float32)


def test_a_model_beyond_the_memory_is_not_verified_and_that_is_said(tmp_path, adapter, monkeypatch, capsys):
    monkeypatch.setattr("litlora.ram.free_ram", lambda: 1000)
    merge(tmp_path / "out", adapter)
    assert "not verified: it takes 0.0 GB of memory, and 0.0 GB are free" in capsys.readouterr().out
    plan, config = plan_merge(resolve(adapter))
    size = (tmp_path / "base/lit_model.pth").stat().st_size
    largest = 400 * 32 * 4  # the output head, in fp32
    assert bytes_needed(plan, config) == pytest.approx(2 * size + largest, rel=0.1)
    assert bytes_needed(converted(plan, torch.float32), config) >= bytes_needed(plan, config)
    # Most of a large model is in its files, and the pages that were read are given back.
    large = {"W": dataclasses.replace(plan["lm_head.weight"], start=torch.empty(1).expand(2**20, 2**14))}
    assert bytes_needed(large, config) == 2**34 * 4 + 4 * MAX_HELD


def test_without_a_tokenizer_the_probe_says_so(tmp_path, adapter, capsys):
    for place in ("base", "adapter"):
        (tmp_path / place / "tokenizer.json").unlink()
    merge(tmp_path / "out", adapter)
    assert (
        "note: the probe's tokens are spread over the vocabulary, as no text can be encoded"
        in capsys.readouterr().out
    )
