"""Runs whose adapters start by the weights or the data: early checkpoints resume to the bit, and what
is saved fits the base as it is."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import JSON, REPO, tune

from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import CheckpointError, UserError
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantize import QUANTIZERS
from litlora.load import load
from litlora.lora import LoRAConfig
from litlora.serve.opening import Opening, open_model
from litlora.settings import FinetuneLoRA

IDS = torch.arange(20)[None] * 7 % 300
EXACT = {"precision": "32-true", "train": {"save_interval": 3}}
SLOW = pytest.mark.slow
ORDINARY = {"pissa_niter_4": "lora", "olora": "dora", "eva": "lora", "gaussian": "lora"}
LOFTQ = ["--precision", "32-true", "--quantize", "nf4", "--lora.alpha", "3"]


def stored(directory) -> dict:
    return torch.load(directory / "lit_model.pth", weights_only=True)


@torch.no_grad()
def logits(directory, **options) -> torch.Tensor:
    return load(directory, **options).model(IDS)


@pytest.mark.parametrize(
    ("init", "variant"),
    [("pissa", "lora"), *(pytest.param(*case, marks=SLOW) for case in ORDINARY.items())],
)
def test_a_run_resumes_to_the_bit_and_its_adapter_is_an_ordinary_one(
    init, variant, base, alpaca_file, tmp_path, capsys
):
    config = {**EXACT, "lora": LoRAConfig(rank=2, dropout=0.1, init=init, variant=variant)}
    tune("lora", base, alpaca_file, tmp_path / "run", **config)
    step = tmp_path / "run/step-000003"
    capsys.readouterr()
    tune("lora", base, alpaca_file, tmp_path / "resumed", resume=str(step), **config)
    assert "computing A and B" not in capsys.readouterr().out
    files = [tmp_path / name / "final/lit_model.pth" for name in ("run", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    described = stored(tmp_path / "run/final")["litlora"]
    assert described["format"] == 1 and "init" not in described["lora"]
    assert described["lora"]["rank"] == (4 if init in ("pissa", "pissa_niter_4", "olora") else 2)
    for directory in (step, tmp_path / "run/final"):
        live, merged = logits(directory, live=True), logits(directory)
        torch.testing.assert_close(live, merged, atol=1e-5, rtol=1e-4)
        assert (merged - logits(base)).abs().max() > 1e-3


@SLOW
def test_the_start_is_part_of_the_state(base, alpaca_file, tmp_path, capsys):
    """As no two machines compute the last bits of a decomposition alike."""
    config = {**EXACT, "lora": LoRAConfig(rank=2, init="pissa")}
    tune("lora", base, alpaca_file, tmp_path / "run", **config)
    step = tmp_path / "run/step-000003"
    state = torch.load(step / "state.pth", weights_only=True)
    kept, saved = state["start"]["tensors"], stored(step)["model"]
    for name, A in kept.items():
        layer, leaf = name.rsplit(".", 1)
        if leaf == "start_A":
            assert torch.equal(saved[f"{layer}.lora_A"][2:], A)
            assert torch.equal(saved[f"{layer}.lora_A"][:2], state["weights"][f"{layer}.lora_A"])
    for change, error in (
        (lambda start: start["tensors"].popitem(), "broken: its start: it does not hold the start of"),
        (lambda start: start.update(tensors=3), "broken: its start: it is not made of tensors"),
        (lambda start: start.update(init="olora"), "init is pissa, and was olora; it cannot be resumed"),
    ):
        changed = torch.load(step / "state.pth", weights_only=True)
        change(changed["start"])
        torch.save(changed, step / "state.pth")
        with pytest.raises(UserError, match=error):
            tune("lora", base, alpaca_file, tmp_path / "resumed", resume=str(step), **config)
    torch.save(state, step / "state.pth")
    for init in ("olora", "kaiming"):
        capsys.readouterr()
        with pytest.raises(UserError, match=f"resume .*init is {init}, and was pissa; it cannot be resumed"):
            other = {**config, "lora": LoRAConfig(rank=2, init=init), "resume_force": True}
            tune("lora", base, alpaca_file, tmp_path / "resumed", resume=str(step), **other)
        assert "base: " not in capsys.readouterr().out, "it is refused before anything is loaded"


@SLOW
def test_an_adapter_on_an_adapter_starts_from_the_sum(base, alpaca_file, tmp_path):
    tune("lora", base, alpaca_file, tmp_path / "one", precision="32-true", lora=LoRAConfig(rank=2))
    first = tmp_path / "one/final"
    tune("lora", first, alpaca_file, tmp_path / "two", precision="32-true", lora=LoRAConfig(init="pissa"))
    second = tmp_path / "two/final"
    assert len(resolve(second).adapters) == 2
    torch.testing.assert_close(logits(second, live=True), logits(second), atol=1e-5, rtol=1e-4)
    assert 1e-3 < (logits(second) - logits(first)).abs().max() < 3


@SLOW
def test_pissa_on_quantised_values_is_a_plain_adapter_of_these(base, run, tmp_path):
    run("lora", tmp_path / "run", "--quantize", "int8", "--lora.init", "pissa", "--precision", "32-true")
    final = tmp_path / "run/final"
    live, merged = load(final, live=None), load(final)
    assert len(stored_weights(live.model)) == 14
    with torch.inference_mode():
        torch.testing.assert_close(live.model(IDS), merged.model(IDS), atol=1e-5, rtol=1e-4)


@SLOW
@pytest.mark.parametrize("init", ["loftq", "loftq_iter_3"])
def test_loftq_is_trained_resumed_and_merged_on_the_bits_that_it_makes_up_for(
    init, base, run, tmp_path, forked, alpaca_file
):
    whole, early, words = tmp_path / "whole", tmp_path / "early", ["--lora.rank", 8, "--lora.init", init]
    run("lora", whole, *LOFTQ, *words, "--train.max_steps", 4)
    run("lora", early, *LOFTQ, *words, "--train.max_steps", 4, stop_after=2)
    run("lora", early, *LOFTQ, *words, "--train.max_steps", 4, "--resume", "auto")
    final = whole / "final"
    one, other = stored(final)["model"], stored(early / "final")["model"]
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert open_checkpoint(final).needs_quantised
    live, merged = logits(final, live=None), logits(final)
    torch.testing.assert_close(live, merged, atol=1e-5, rtol=1e-4)
    for options in ({"quantize": "none"}, {"quantize": "int8"}):
        with pytest.raises(CheckpointError, match="was started by LoftQ"):
            logits(final, live=None, **options)
    merge = ["scripts/merge_lora.py", "--lora_path", final, "--out_dir", tmp_path / "merged"]
    assert "LoftQ" in forked.refuses(*merge, "--onto", "original", cwd=tmp_path)
    assert "at strength 1" in forked.refuses(*merge, "--strength", 0.5, cwd=tmp_path)
    forked.succeeds(*merge, cwd=tmp_path)
    torch.testing.assert_close(logits(tmp_path / "merged"), merged, atol=0, rtol=0)
    both = ["--lora_path", final, early / "final", "--out_dir", tmp_path / "both"]
    assert "was started by LoftQ" in forked.refuses("scripts/combine_lora.py", *both, cwd=tmp_path)
    resize = ["scripts/resize_lora.py", "--lora_path", final, "--rank", 12, "--out_dir", tmp_path / "large"]
    forked.succeeds(*resize, cwd=tmp_path)
    torch.testing.assert_close(logits(tmp_path / "large"), merged, atol=1e-5, rtol=1e-4)
    export = ["scripts/export_peft.py", "--lora_path", final, "--out_dir", tmp_path / "out"]
    assert "was started by LoftQ" in forked.refuses(*export, "--format", "mlx", cwd=tmp_path)
    if init == "loftq":
        assert "started by LoftQ: use it on the base in nf4" in forked.succeeds(*export, cwd=tmp_path)
    else:
        assert "started by LoftQ in several iterations" in forked.refuses(*export, cwd=tmp_path)
    said = forked.succeeds("scripts/inspect_checkpoint.py", final, cwd=tmp_path)
    assert "loftq" in said.lower()


def test_the_base_of_several_iterations_is_found_again_to_the_bit(base, run, tmp_path):
    run("lora", tmp_path / "run", *LOFTQ, "--lora.init", "loftq_iter_2", "--train.max_steps", 1)
    final = tmp_path / "run/final"
    content, chain = stored(final), resolve(final)
    taken_out = chain.top.base.quantized.taken_out
    loaded, plain = load(final, live=None), load(base, quantize="nf4")
    W = dict(load(base).model.named_parameters())
    for name, weight in stored_weights(loaded.model).items():
        layer = name.removesuffix(".weight").removesuffix(".linear")
        wanted = QUANTIZERS["nf4"].quantised(W[f"{layer}.weight"], name, base, taken_out[layer])
        assert torch.equal(weight.matrix.packed, wanted.packed)
        assert torch.equal(weight.matrix.absmax, wanted.absmax)
    told = content["litlora"]["base"]["quantized"]["fingerprint"]
    assert told == loaded.quantized.fingerprint != plain.quantized.fingerprint
    opening = Opening(torch.device("cpu"))
    with torch.no_grad():
        found = open_model(chain, opening, live=False).loaded.model(IDS)
    torch.testing.assert_close(found, logits(final), atol=1e-5, rtol=1e-4)
    with pytest.raises(CheckpointError, match="without the adapter that base is no model"):
        open_model(chain, opening, live=True)
    held = open_model(resolve(base), dataclasses.replace(opening, quantize="nf4"), live=True)
    with pytest.raises(CheckpointError, match="no other adapter fits it; open it alone"):
        held.add_adapter("one", final)


@SLOW
def test_a_file_whose_base_cannot_be_found_again_is_refused(base, run, tmp_path):
    run("lora", tmp_path / "run", *LOFTQ, "--lora.init", "loftq_iter_2", "--train.max_steps", 1)
    file, name = tmp_path / "run/final/lit_model.pth", "model.layers.0.mlp.up_proj.loftq_"

    def without(content, *leaves):
        content["model"] = {n: t for n, t in content["model"].items() if not n.endswith(leaves)}

    for change, error in (
        (lambda c: c["model"][f"{name}A"].mul_(2), "does not have the bits that it was trained on"),
        (lambda c: without(c, "loftq_A"), "has loftq_A or loftq_B alone"),
        (
            lambda c: without(c, "loftq_A", "loftq_B"),
            "init is loftq_iter_2, and it lacks loftq_A and loftq_B",
        ),
        (lambda c: c["litlora"]["lora"].update(init="loftq"), "init is loftq, and it holds loftq_A"),
        (lambda c: c["model"].update({f"{name}B": torch.ones(64, 8)}), "must be in torch.bfloat16"),
        (lambda c: c["model"][f"{name}A"].fill_(torch.nan), "taken out of .*: it holds values .* not finite"),
        (
            lambda c: c["model"].update({f"{name}B": torch.ones(3, 8).bfloat16()}),
            r"takes \(3, 32\) out of model.layers.0.mlp.up_proj, and the base has \(64, 32\) there",
        ),
    ):
        content = torch.load(file, weights_only=True)
        change(content)
        broken = tmp_path / "run/broken"
        shutil.copytree(file.parent, broken, dirs_exist_ok=True)
        torch.save(content, broken / "lit_model.pth")
        for live in (None, False):
            with pytest.raises(CheckpointError, match=error):
                load(broken, live=live)


def test_loftq_needs_a_quantised_base(forked, tmp_path):
    words = ["finetune/lora.py", "--lora.init", "loftq", "--out_dir", tmp_path / "out"]
    said = forked.refuses(*words, cwd=tmp_path)
    assert said.startswith("error: --lora.init loftq makes up for what --quantize loses, which is not set")
    with pytest.raises(UserError, match="init loftq makes up for what quantize loses"):
        FinetuneLoRA(lora=LoRAConfig(init="loftq"))


def test_eva_sees_no_single_experts_and_no_output_head(make_checkpoint, alpaca_file, tmp_path):
    base = make_checkpoint("moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    with pytest.raises(UserError, match=r"init eva: targets .*\.experts\.0\.\w+: only layers of the blocks"):
        tune("lora", base, alpaca_file, tmp_path / "run", lora=LoRAConfig(init="eva"))


@SLOW
@pytest.mark.parametrize("init", ["pissa", "loftq", "loftq_iter_2", "eva"])
def test_preference_tuning_resumes_with_its_reference(init, base, tmp_path):
    """The reference is the model at its start, which a resumed run must find again."""
    import importlib.util

    from litlora.settings import FinetuneDPO, TrainConfig

    spec = importlib.util.spec_from_file_location("finetune_dpo", REPO / "finetune/dpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    records = [{"prompt": f"Say {n}", "chosen": f"the fox {n}", "rejected": "no " * n} for n in range(1, 25)]
    (tmp_path / "pairs.json").write_text(json.dumps(records))

    def dpo(out, **settings):
        module.main(
            FinetuneDPO(
                checkpoint_dir=str(base),
                data=JSON(path=str(tmp_path / "pairs.json"), val_fraction=0.2),
                out_dir=str(tmp_path / out),
                prompt_style="plain",
                accelerator="cpu",
                precision="32-true",
                quantize="nf4" if init.startswith("loftq") else None,
                lora=LoRAConfig(rank=4, init=init),
                train=TrainConfig(max_steps=4, save_interval=2, global_batch_size=4, max_seq_length=64),
                **settings,
            )
        )

    dpo("run")
    dpo("resumed", resume=str(tmp_path / "run/step-000002"))
    files = [tmp_path / name / "final/lit_model.pth" for name in ("run", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
