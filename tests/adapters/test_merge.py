"""A merge is exact: equal to the live adapters, linear in its strength, rounded once, and gone
without a trace when undone."""

import dataclasses
import itertools
import math
import runpy

import pytest
import torch
from conftest import REPO, fails, succeeds
from test_checkpoint import write_adapter

from litlora.adapters import merge as merging
from litlora.adapters.merge import Added, MergedTensor, merge_chain, plan_merge, rounded
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import BaseMismatchError, CheckpointError, UserError
from litlora.load import load
from litlora.lora import LoRAConfig, Update, add_lora, attach_lora, merge_lora, unmerge_lora, unwrap_lora
from litlora.settings import MergeLoRA

IDS = torch.arange(40).view(2, 20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_FAST = [
    torch.bfloat16,
    *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES if dtype != torch.bfloat16),
]
VARIANTS = {
    "all linear": {},
    "query and value": {"targets": "qv", "rank": 4, "alpha": 3},
    "rsLoRA": {"rslora": True, "rank": 4},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 2.0}},
    "whole modules": {"targets": "qv", "modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    "the output head": {"targets": ["lm_head", "down_proj"]},
}


def merge(out, *adapters, **settings):
    """scripts/merge_lora.py, in this process."""
    main = runpy.run_path(str(REPO / "scripts/merge_lora.py"))["main"]
    main(MergeLoRA(lora_path=[str(path) for path in adapters], out_dir=str(out), **settings))
    return open_checkpoint(out)


def remains(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def logits(directory, **options):
    """In fp32, so that only the weights' own roundings show."""
    with torch.no_grad():
        return load(directory, **options).model.float()(IDS)


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].view(torch.uint8).equal(b[n].view(torch.uint8)) for n in a
    )


def kinds():
    """Every variant, in the default suite in fp32, and two of them in bf16. A tied model has no module to
    save whole, and is no different elsewhere but at its head."""
    for dtype, variant in itertools.product(DTYPES, VARIANTS):
        default = dtype == torch.float32 or (
            dtype == torch.bfloat16 and variant in ("all linear", "whole modules")
        )
        for tied in (False, True) if variant == "the output head" else (False,):
            yield pytest.param(dtype, variant, tied, marks=[pytest.mark.slow] * (not default))


@pytest.mark.parametrize(("dtype", "variant", "tied"), [*kinds()])
def test_merged_equals_live(tmp_path, make_checkpoint, dtype, variant, tied):
    adapter = write_adapter(
        tmp_path / "adapter",
        make_checkpoint("base", dtype=dtype, tie_word_embeddings=tied),
        **VARIANTS[variant],
    )
    merge(tmp_path / "merged", adapter)
    live, merged, base = logits(adapter, live=True), logits(tmp_path / "merged"), logits(tmp_path / "base")
    error = (merged - live).square().mean().sqrt() / live.std()
    assert error < {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert error < 0.1 * (live - base).square().mean().sqrt() / live.std(), "the update must be there"
    assert same_bits(open_checkpoint(tmp_path / "merged").tensors, merge_chain(resolve(adapter))[0]), (
        "chat merges alike"
    )


@pytest.mark.parametrize("dtype", ONE_FAST, ids=str)
def test_a_chain_equals_merging_one_by_one(tmp_path, make_checkpoint, dtype):
    base = make_checkpoint("base", dtype=dtype)
    first = write_adapter(tmp_path / "first", base, modules_to_save=["norm"])
    second = write_adapter(
        tmp_path / "second", first, seed=2, targets="qv", rank=4, modules_to_save=["lm_head"]
    )
    third = write_adapter(tmp_path / "third", second, seed=3, targets=["q_proj", "lm_head"])
    at_once = merge(tmp_path / "at_once", third)
    merge(tmp_path / "one", first)
    merge(tmp_path / "two", second, checkpoint_dir=str(tmp_path / "one"))
    one_by_one = merge(tmp_path / "three", third, checkpoint_dir=str(tmp_path / "two"))
    assert same_bits(at_once.tensors, one_by_one.tensors)


def test_the_strength_is_linear_and_zero_is_the_base(tmp_path, make_checkpoint):
    base = make_checkpoint("base", tie_word_embeddings=True)
    adapter = write_adapter(
        tmp_path / "adapter",
        base,
        targets=["q_proj", "lm_head"],
        modules_to_save=["model.norm", "input_layernorm"],
    )
    W, one = open_checkpoint(base).tensors, merge(tmp_path / "one", adapter).tensors
    for strength in (-1.0, 0.3, 2.0):
        scaled = merge(tmp_path / f"at{strength}", adapter, strength=strength).tensors
        assert scaled.keys() == one.keys()
        for name, tensor in scaled.items():
            before = W.get(name, W["model.embed_tokens.weight"])
            torch.testing.assert_close(tensor - before, strength * (one[name] - before), atol=1e-6, rtol=1e-6)
    none = merge(tmp_path / "none", adapter, strength=0.0)
    assert same_bits(none.tensors, W) and none.config == open_checkpoint(base).config
    assert none.fingerprint == open_checkpoint(base).fingerprint


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_several_adapters_are_added_up_and_rounded_once(tmp_path, make_checkpoint, dtype):
    base = make_checkpoint("base", dtype=dtype)
    one = write_adapter(tmp_path / "one", base, modules_to_save=["model.norm"])
    two = write_adapter(
        tmp_path / "two", base, seed=2, targets="qv", rank=4, alpha=3, modules_to_save=["model.norm"]
    )
    W, a, b = (open_checkpoint(path).tensors for path in (base, one, two))
    merged = merge(tmp_path / "sum", one, two, weights=[0.7, -0.4], strength=2.0).tensors
    module = "model.layers.0.self_attn.q_proj"
    exact = W[f"{module}.weight"].double()
    for tensors, factor in ((a, 1.4 * 16 / 2), (b, -0.8 * 3 / 4)):
        exact = exact + factor * tensors[f"{module}.lora_B"].double() @ tensors[f"{module}.lora_A"].double()
    # Rounding the fp32 sum and rounding the exact sum may differ in a tie only.
    assert (merged[f"{module}.weight"] != exact.to(dtype)).float().mean() < 5e-3
    norm = W["model.norm.weight"].double()
    expected = (
        norm + 1.4 * (a["model.norm.weight"].double() - norm) - 0.8 * (b["model.norm.weight"].double() - norm)
    )
    torch.testing.assert_close(merged["model.norm.weight"], expected.to(dtype))
    alone = merge(tmp_path / "alone", one)
    assert same_bits(merge(tmp_path / "with_nothing", two, one, weights=[0, 1]).tensors, alone.tensors)


def test_adapters_of_different_bases_are_not_added_up(tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    first = write_adapter(tmp_path / "first", base)
    second = write_adapter(tmp_path / "second", first, seed=2)
    with pytest.raises(
        BaseMismatchError,
        match="second: was trained on .*first, but .*first on .*base; .* must share their base",
    ):
        merge(tmp_path / "out", first, second)
    with pytest.raises(BaseMismatchError, match="first: is what .*second was trained on"):
        merge(tmp_path / "out", second, first)
    elsewhere = write_adapter(tmp_path / "elsewhere", make_checkpoint("other", seed=5))
    with pytest.raises(BaseMismatchError, match="base: not the base that .*elsewhere was trained on"):
        merge(tmp_path / "out", first, elsewhere)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_merge_answers_for_its_chain_only_if_it_is_that_chain(tmp_path, make_checkpoint):
    first = write_adapter(tmp_path / "first", make_checkpoint("base", dtype=torch.bfloat16))
    chain = open_checkpoint(first).fingerprint
    assert merge(tmp_path / "plain", first).answers_to(chain)
    for number, other in enumerate(
        ({"strength": 0.5}, {"dtype": "fp32"}, {"rounding": "stochastic"}, {"weights": [2.0]})
    ):
        assert not merge(tmp_path / f"other{number}", first, **other).answers_to(chain)


def test_a_result_of_another_dtype_is_rounded_once(tmp_path, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base", dtype=torch.bfloat16))
    wide, half = (
        merge(tmp_path / "wide", adapter, dtype="fp32"),
        merge(tmp_path / "half", adapter, dtype="fp16"),
    )
    plan, _ = plan_merge(resolve(adapter))
    for name, tensor in plan.items():
        exact = tensor.exact(slice(None))
        assert torch.equal(wide.tensors[name], exact) and torch.equal(half.tensors[name], exact.half())


def test_numbers_beyond_fp16_are_refused_and_leave_nothing(tmp_path, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base"), alpha=1e7)
    with pytest.raises(
        CheckpointError, match="q_proj.weight: merged, it holds values that are not finite in float16"
    ):
        merge(tmp_path / "out", adapter, dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_large_layers_are_computed_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr("litlora.storage.blocks.BLOCK_BYTES", 1 << 12)
    W, A, B = torch.randn(1000, 16).bfloat16(), torch.randn(4, 16), torch.randn(1000, 4)
    tensor = MergedTensor("W", W, W.dtype, W.dtype, ((Added(Update(A, B, 0.5), 1.0),),))
    blocks = list(tensor.blocks())
    assert max(block.numel() for block in blocks) * 4 <= 1 << 12
    torch.testing.assert_close(torch.cat(blocks), (W.float() + 0.5 * B @ A).bfloat16())
    assert torch.equal(torch.cat(blocks), tensor.tensor())


# ---- undone


@pytest.mark.parametrize("dtype", ONE_FAST, ids=str)
def test_a_thousand_cycles_and_swapped_adapters_leave_no_drift(tmp_path, make_checkpoint, dtype):
    base = make_checkpoint("base", dtype=dtype, num_hidden_layers=1)
    adapters = [
        open_checkpoint(write_adapter(tmp_path / name, base, seed=n)) for n, name in enumerate(("one", "two"))
    ]
    model = load(base).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = [model(IDS)]
        for adapter in adapters:
            attach_lora(model, list(adapter.updates), LoRAConfig(rank=2, alpha=16.0))
            model.load_state_dict(adapter.tensors, strict=False)
            merge_lora(model)
            expected.append(model(IDS))
            for _ in range(500):
                unmerge_lora(model)
                merge_lora(model)
            assert torch.equal(model(IDS), expected[-1])
            unmerge_lora(model)
            unwrap_lora(model)
            assert torch.equal(model(IDS), expected[0])
        for _ in range(3):  # back and forth
            for adapter, wanted in zip(adapters, expected[1:], strict=True):
                attach_lora(model, list(adapter.updates), LoRAConfig(rank=2, alpha=16.0))
                model.load_state_dict(adapter.tensors, strict=False)
                merge_lora(model)
                assert torch.equal(model(IDS), wanted)
                unmerge_lora(model)
                unwrap_lora(model)
    assert not torch.equal(expected[1], expected[2])
    assert same_bits(dict(model.named_parameters()), before)


# ---- rounding


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_in_the_mean(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.cat(
        [torch.randn(20), torch.tensor([0.0, -0.0, 1.0, -3.25, tiny / 3.3, -tiny / 2.7, 60000.3])]
    )
    generator = torch.Generator().manual_seed(0)
    runs = torch.stack([rounded(values, dtype, generator) for _ in range(20_000)]).double()
    exact = values.double()
    step = (runs.max(dim=0).values - runs.min(dim=0).values).clamp(min=1e-300)
    assert ((runs - exact).abs() <= step).all(), "never further than a neighbour"
    assert (runs.unique(dim=0).shape[0] > 1) and all(len(column.unique()) <= 2 for column in runs.T)
    error = (runs.mean(dim=0) - exact).abs()
    assert (error <= 5 * step / 2 / 20_000**0.5).all(), "five standard deviations of the mean"
    stays = exact == values.to(dtype).double()
    assert stays.sum() >= 4 and (runs[:, stays] == exact[stays]).all(), "what needs no rounding stays"


@pytest.mark.slow
def test_small_updates_survive_stochastic_rounding_in_the_mean(tmp_path, make_checkpoint):
    base = make_checkpoint("base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base, targets=["up_proj"], rank=1, alpha=1.0, seed=3)
    W = open_checkpoint(base).tensors["model.layers.0.mlp.up_proj.weight"].float()
    exact = plan_merge(resolve(adapter))[0]["model.layers.0.mlp.up_proj.weight"].exact(slice(None)) - W

    def kept(tensors):
        return (
            (tensors["model.layers.0.mlp.up_proj.weight"].float() - W) * exact
        ).sum() / exact.square().sum()

    small = {"strength": 0.002}
    assert kept(merge(tmp_path / "nearest", adapter, **small).tensors) < 0.002 * 0.2
    one = merge(tmp_path / "one", adapter, **small, rounding="stochastic")
    again = merge(tmp_path / "again", adapter, **small, rounding="stochastic")
    other = merge(tmp_path / "other", adapter, **small, rounding="stochastic", seed=2)
    assert same_bits(one.tensors, again.tensors) and not same_bits(one.tensors, other.tensors)
    mean = (
        sum(
            kept(merge(tmp_path / f"s{seed}", adapter, **small, rounding="stochastic", seed=seed).tensors)
            for seed in range(20)
        )
        / 20
    )
    assert abs(mean - 0.002) < 0.002 * 0.3
    untouched = {
        name: tensor for name, tensor in open_checkpoint(base).tensors.items() if "up_proj" not in name
    }
    assert same_bits({name: one.tensors[name] for name in untouched}, untouched)


# ---- the command


def test_the_command_takes_several_adapters_and_says_what_it_did(tmp_path, make_checkpoint):
    base = make_checkpoint("base", dtype=torch.bfloat16)
    one, two = write_adapter(tmp_path / "one", base), write_adapter(tmp_path / "two", base, seed=2)
    words = ["--lora_path", one, two, "--weights", "0.5", "-1", "--out_dir", tmp_path / "out"]
    done = succeeds("scripts/merge_lora.py", *words)
    assert f"merged: {base} + {one} x 0.5 + {two} x -1\n" in done.stdout
    assert "verified on " in done.stdout and "rounding took " in done.stdout
    assert same_bits(
        open_checkpoint(tmp_path / "out").tensors,
        merge(tmp_path / "again", one, two, weights=[0.5, -1.0]).tensors,
    )
    assert "--weights 1.0: 1 for 2 adapter(s)" in fails(
        "scripts/merge_lora.py", "--lora_path", one, two, "--weights=1", "--out_dir=x"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": float("inf")}, "strength inf: must be a finite number"),
        ({"weights": [float("nan")]}, "weights nan: must be a finite number"),
        ({"lora_path": []}, "lora_path is empty"),
        ({"seed": -1}, "seed -1: must be at least 0"),
        ({"seed": 2**63}, "seed 9223372036854775808: must be"),
        ({"dtype": "fp32", "rounding": "stochastic"}, "rounding stochastic: is for bf16 and fp16"),
    ],
)
def test_settings_that_make_no_merge_are_refused(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        MergeLoRA(**{"lora_path": ["a"], "out_dir": "out", **settings})


def test_stochastic_rounding_of_an_fp32_base_is_refused(tmp_path, base):
    with pytest.raises(UserError, match="this base is neither"):
        merge(tmp_path / "out", write_adapter(tmp_path / "adapter", base), rounding="stochastic")


@pytest.mark.parametrize("verify", [True, False])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused(tmp_path, base, verify):
    """In a row of the embedding that the probe's text does not look up."""
    adapter = write_adapter(tmp_path / "adapter", base, targets="qv", modules_to_save=["embed_tokens"])
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    content["model"]["model.embed_tokens.weight"][399, 3] = math.nan
    torch.save(content, adapter / "lit_model.pth")
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight holds values that are not finite"):
        merge(tmp_path / "merged", adapter, verify=verify)
    assert remains(tmp_path) == ["adapter", "base"]


def test_a_resized_vocabulary_has_no_other_strength(tmp_path, base):
    adapter = resolve(write_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens", "lm_head"]))
    resized = {
        n: torch.cat([t, t[:3]]) if n in (merging.HEAD, merging.EMBEDDING) else t
        for n, t in adapter.top.tensors.items()
    }
    larger = dataclasses.replace(adapter.top, whole={name: resized[name] for name in adapter.top.whole})
    plan, config = plan_merge(dataclasses.replace(adapter, adapters=[]))
    assert merging.add_adapters(plan, config, [(larger, 1.0)])[1].vocab_size == 403
    with pytest.raises(
        CheckpointError,
        match="vocabulary from 400 to 403 rows; such an adapter can only be merged alone and at strength 1",
    ):
        merging.add_adapters(plan, config, [(larger, 0.5)])


@pytest.mark.parametrize(
    "settings",
    [["--strength", "1e39"], ["--weights", "1e300"], ["--strength", "-1e200", "--weights", "1e200"]],
)
def test_a_factor_beyond_fp32_is_one_line(tmp_path, make_checkpoint, settings):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base"))
    said = fails("scripts/merge_lora.py", "--lora_path", adapter, "--out_dir", tmp_path / "out", *settings)
    assert (
        "which is beyond fp32; name a smaller strength or weight" in said and not (tmp_path / "out").exists()
    )


def test_one_adapter_under_two_names_is_one(tmp_path, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base"))
    for script in ("merge", "combine"):
        said = fails(
            f"scripts/{script}_lora.py",
            "--lora_path",
            adapter,
            adapter / "lit_model.pth",
            "--out_dir",
            tmp_path / "out",
        )
        assert "named twice; give it a weight instead" in said


def test_the_current_directory_is_not_replaced(tmp_path, make_checkpoint, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "", tmp_path):
        with pytest.raises(UserError, match="is or holds the current directory|holds .*, which is read"):
            merge(out, adapter)
    assert remains(tmp_path) == ["adapter", "base", "here"]


def test_a_merged_layer_stores_its_weight_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    add_lora(model, LoRAConfig(rank=2, targets=["0"]))
    names = list(model.state_dict())
    merge_lora(model)
    assert list(model.state_dict()) == names
    model.half()
    unmerge_lora(model)
    assert model[0].linear.weight.dtype == torch.float16
