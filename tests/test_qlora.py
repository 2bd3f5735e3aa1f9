"""QLoRA: training on a base that is quantised while it is loaded, and every use of the result."""

import json
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import random_adapter, resident, succeeds
from families import save_folder
from quantized import quantize_folder

from litlora.adapters.merge import merge_chain, plan_merge
from litlora.adapters.quantised import block_linears, quantised
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import BaseMismatchError, CheckpointError, UserError
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantize import QUANTIZERS
from litlora.load import load
from litlora.lora import LoRAConfig

WORDS = ["--prompt_style", "plain", "--precision", "32-true", "--train.max_steps", 4]
IDS = torch.arange(20)[None] * 7 % 300


@pytest.fixture
def trained(base, run, tmp_path) -> Path:
    """What four steps on the base in nf4 give."""
    run("lora", tmp_path / "run", *WORDS, "--quantize", "nf4", "--lora.targets", '["q_proj", "down_proj"]')
    return tmp_path / "run/final"


@pytest.fixture
def says(forked, tmp_path):
    """says(*words): what a command prints; it must succeed."""

    def says(*words: object) -> str:
        done = forked.run(*words, cwd=tmp_path)
        assert done["status"] == 0, done["stderr"]
        return done["stdout"] + done["stderr"]

    return says


def stored(directory: Path) -> dict:
    return torch.load(directory / "lit_model.pth", weights_only=True)


def rewritten(directory: Path, change) -> Path:
    """A copy of an adapter whose described facts were changed by hand."""
    copy = directory.parent / "changed"
    shutil.copytree(directory, copy, dirs_exist_ok=True)
    content = stored(directory)
    change(content["litlora"])
    torch.save(content, copy / "lit_model.pth")
    return copy


# ---- loading


@pytest.mark.parametrize("name", QUANTIZERS)
def test_only_the_linear_layers_of_the_blocks_are_quantised(name, make_checkpoint):
    directory = make_checkpoint("wide", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    plain, loaded = load(directory), load(directory, quantize=name)
    weights, values = stored_weights(loaded.model), dict(plain.model.named_parameters())
    assert set(weights) == set(block_linears(plain.model.config)) and len(weights) == 14
    for layer, weight in weights.items():
        now = QUANTIZERS[name].quantised(values[layer], layer, directory)
        assert torch.equal(weight.rows(), now.rows()) and weight.dtype == torch.bfloat16
    for layer, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, values[layer])
    assert loaded.quantized.quantizer == QUANTIZERS[name] and plain.quantized is None


def peak_of_tensors(mapped: Path, call) -> tuple[object, int]:
    """What `call` returns, and the most bytes of tensors that were allocated at once meanwhile,
    without the `mapped` file."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return result, max(accumulate(size for _, size in steps if abs(size) != mapped.stat().st_size))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chained", [False, True])
def test_loading_takes_one_layer_more_than_the_result(chained, make_checkpoint, tmp_path):
    """Of a chain, whose merged layers are nowhere in a file, it takes one layer in fp32 as well."""
    sizes = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 8}
    directory = make_checkpoint("large", dtype=torch.bfloat16, head_dim=64, **sizes)
    layer, file = 512 * 3072 * 2, directory / "lit_model.pth"
    dense = 2 * sum(p.numel() for p in load(directory).model.model.layers.parameters())
    if chained:
        directory = random_adapter(tmp_path / "adapter", directory, LoRAConfig(rank=2, targets="all-linear"))
    loaded, peak = peak_of_tensors(file, lambda: load(directory, quantize="nf4"))
    kept = sum(weight.nbytes for weight in stored_weights(loaded.model).values())
    assert kept <= 0.32 * dense and kept < peak <= kept + (3 if chained else 1) * layer < dense
    assert resident(file) < layer  # the pages of what was quantised are given back


# ---- training


def test_the_adapter_says_what_it_was_trained_on(trained, base):
    described = stored(trained)["litlora"]
    found = open_checkpoint(trained)
    loaded = load(base, quantize="nf4")
    assert described["format"] == 2 and described["base"]["fingerprint"] == open_checkpoint(base).fingerprint
    assert described["base"]["quantized"] == {
        "quantizer": {"kind": "nf4", "blocksize": 64},
        "fingerprint": loaded.quantized.fingerprint,
    }
    assert found.base.quantized == loaded.quantized
    plain = found.trained_on(resolve(trained).on_original.top.base)
    assert plain.fingerprint != found.fingerprint and plain.base.quantized is None


@pytest.mark.parametrize("name", ["nf4-dq", "fp8"])
def test_a_run_resumes_to_the_bit(name, base, run, tmp_path):
    words = (*WORDS, "--quantize", name)
    run("lora", tmp_path / "whole", *words)
    run("lora", tmp_path / "stopped", *words, stop_after=2)
    early = sorted((tmp_path / "stopped").glob("step-*"))[-1]
    assert open_checkpoint(early).base.quantized.quantizer == QUANTIZERS[name]
    others = ["--quantize", "int8"], []
    for other in others:
        with pytest.raises(UserError, match="quantize is .*, and was " + name):
            run("lora", tmp_path / "stopped", *WORDS, *other, "--resume", "auto")
    run("lora", tmp_path / "stopped", *words, "--resume", "auto")
    whole, stopped = (stored(tmp_path / where / "final")["model"] for where in ("whole", "stopped"))
    assert all(torch.equal(tensor, stopped[layer]) for layer, tensor in whole.items())


def test_training_is_that_on_the_dequantised_values(base, run, tmp_path, trained):
    """To the bit: as on a base that holds these values in its own dtype."""
    from litlora.checkpoint import write_full

    chain = resolve(base)
    plan, config = plan_merge(chain)
    values = quantised(plan, config, QUANTIZERS["nf4"], base)
    write_full(tmp_path / "values", values, config, sidecars_from=chain.sources)
    run(
        "lora",
        tmp_path / "dense",
        *WORDS,
        "--lora.targets",
        '["q_proj", "down_proj"]',
        "--checkpoint_dir",
        tmp_path / "values",
    )
    expected, found = stored(tmp_path / "dense/final")["model"], stored(trained)["model"]
    assert all(torch.equal(tensor, found[layer]) for layer, tensor in expected.items())


# ---- using


def test_chat_and_merging_use_the_values_that_were_trained_on(trained, base):
    """Live, as chat loads it, and merged, as every other command does."""
    live, merged = load(trained, live=None), load(trained)
    adapter = open_checkpoint(trained)
    expected = load(base, quantize="nf4").model
    weights = {name: weight.rows() for name, weight in stored_weights(expected).items()}
    assert live.quantized.quantizer == QUANTIZERS["nf4"] and len(stored_weights(live.model)) == 14
    values = dict(merged.model.named_parameters())
    for name, W in weights.items():
        update = adapter.updates.get(name.removesuffix(".weight"))
        assert torch.equal(values[name], W if update is None else update.added_to(W))
    assert merged.quantized is None and not stored_weights(merged.model)
    with torch.inference_mode():
        torch.testing.assert_close(live.model(IDS), merged.model(IDS), atol=1e-5, rtol=0)
        original = load(trained, live=None, quantize="none").model(IDS)
        assert (original - merged.model(IDS)).abs().max() > 1e-3


def test_dora_is_normalised_by_the_values_that_it_was_trained_on(base, run, tmp_path, says):
    run("lora", tmp_path / "run", *WORDS, "--quantize", "int8", "--lora.variant", "dora")
    live, merged = load(tmp_path / "run/final", live=None), load(tmp_path / "run/final")
    assert len(stored_weights(live.model)) == 14
    with torch.inference_mode():
        torch.testing.assert_close(live.model(IDS), merged.model(IDS), atol=1e-5, rtol=0)
    merge = "scripts/merge_lora.py", "--lora_path", tmp_path / "run/final", "--out_dir", tmp_path / "merged"
    assert "verified on" in says(*merge)


def test_the_user_may_ask_for_other_bits(trained, base, tmp_path):
    for name in ("int8", "nf4"):
        assert load(trained, live=None, quantize=name).quantized.quantizer == QUANTIZERS[name]
    plain = random_adapter(
        tmp_path / "plain", base, LoRAConfig(modules_to_save=["layers.1.mlp.up_proj"], targets="qv")
    )
    loaded = load(plain, live=None, quantize="nf4")
    assert len(stored_weights(loaded.model)) == 13
    assert load(plain, live=None).quantized is None


def test_chains(trained, base, run, tmp_path):
    """An adapter on an adapter that was trained on a quantised base, itself with and without one."""
    inner, _ = merge_chain(resolve(trained))
    for words in ([], ["--quantize", "nf4-dq"]):
        out = run("lora", tmp_path / f"second{len(words)}", *WORDS, *words, "--checkpoint_dir", trained)
        chain = resolve(out / "final")
        plan, config = plan_merge(chain.inner)
        if words:
            plan = quantised(plan, config, QUANTIZERS["nf4-dq"], base)
        expected = {name: tensor.tensor() for name, tensor in plan.items()}
        assert words or all(torch.equal(tensor, inner[name]) for name, tensor in expected.items())
        merged, _ = merge_chain(chain)
        for name, W in expected.items():
            update = chain.top.updates.get(name.removesuffix(".weight"))
            assert torch.equal(merged[name], W if update is None else update.added_to(W))


def test_other_bits_than_those_of_the_training_are_refused(trained):
    def change(described):
        described["base"]["quantized"]["fingerprint"] = "0" * 16

    changed = rewritten(trained, change)
    for call in (lambda: load(changed), lambda: load(changed, live=None)):
        with pytest.raises(BaseMismatchError, match="does not have the bits that it was trained on"):
            call()
    load(changed, allow_base_mismatch=True)


WRONG_BITS = (
    (lambda d: d.update(format=1), "has format 1, and base.quantized is {'quantizer'"),
    (lambda d: d["base"].pop("quantized"), "has format 2, and base.quantized is None"),
    (lambda d: d.update(format=3), "this version of litlora reads format 1 and, of an adapter, 2"),
    (lambda d: d["base"]["quantized"]["quantizer"].update(bits=3), "the quantiser's bits is not known"),
    (lambda d: d["base"]["quantized"]["quantizer"].update(blocksize=32), "is not one of nf4, nf4-dq"),
    (lambda d: d["base"]["quantized"].update(fingerprint=7), "base.quantized is not usable"),
    (lambda d: d["base"]["quantized"].update(quantizer=[]), "base.quantized is not usable"),
    (lambda d: d["base"].update(quantized="nf4"), "base.quantized is not usable"),
)


def test_what_the_file_says_of_its_bits_is_never_dropped(trained):
    for change, says in WRONG_BITS:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(rewritten(trained, change))
        assert says in str(error.value)


# ---- the commands


@pytest.mark.parametrize("onto", [pytest.param("dequantized", marks=pytest.mark.slow), "original"])
def test_a_merge_says_which_base_fits_better(onto, trained, base, tmp_path, says):
    words = [] if onto == "dequantized" else ["--onto", onto]
    out = tmp_path / "merged"
    said = says("scripts/merge_lora.py", "--lora_path", trained, "--out_dir", out, *words)
    assert f"onto {onto} (written): beside the model that was trained" in said and f", onto {onto}\n" in said
    assert said.count("beside the model that was trained") == 2
    assert (
        "the merge onto dequantized fits the model that was trained better" in said and "verified on" in said
    )
    merged, adapter = open_checkpoint(out), open_checkpoint(trained)
    bits = {name: weight.rows() for name, weight in stored_weights(load(base, quantize="nf4").model).items()}
    for name, tensor in open_checkpoint(base).tensors.items():
        W = bits.get(name, tensor) if onto == "dequantized" else tensor
        update = adapter.updates.get(name.removesuffix(".weight"))
        assert torch.equal(merged.tensors[name], W if update is None else update.added_to(W))
    # What is exactly the model that was trained stands for it.
    assert merged.answers_to(adapter.fingerprint) == (onto == "dequantized")


def test_merging_gives_the_figures_of_the_models(trained, tmp_path):
    from litlora.adapters.fit import fits
    from litlora.adapters.merge import plan_sum
    from litlora.adapters.unmerged import Unmerged

    chain = resolve(trained)
    plans = {"dequantized": plan_sum([chain], [1.0]), "original": plan_sum([chain.on_original], [1.0])}
    unmerged = Unmerged(*plan_merge(chain.inner), [(chain.top, 1.0)])
    candidates = {name: plan for name, (plan, _) in plans.items()}
    found = fits(candidates["dequantized"], candidates, chain.config, IDS, unmerged)
    with torch.inference_mode():
        live, original = (load(trained, live=None, quantize=how).model(IDS)[0] for how in (None, "none"))
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (live, original))
    fit = found["original"]
    assert fit.max_difference == pytest.approx((live - original).abs().max().item(), rel=1e-3)
    assert fit.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3)
    assert fit.agreement == (live.argmax(-1) == original.argmax(-1)).double().mean().item()
    assert found["dequantized"].kl < 1e-9 and found["dequantized"].agreement == 1


def test_a_choice_where_there_is_none_is_refused(base, trained, tmp_path, forked):
    plain = random_adapter(tmp_path / "plain", base, LoRAConfig(targets="qv"))
    out = ("--out_dir", tmp_path / "out")

    def refused(*words):
        return forked.refuses(*words, cwd=tmp_path)

    said = refused("scripts/merge_lora.py", "--lora_path", plain, *out, "--onto", "original")
    assert "--onto original: " in said and "was not trained with --quantize" in said
    said = refused("scripts/merge_lora.py", "--lora_path", plain, trained, *out)
    assert "was trained on its base in nf4, but" in said and "as it is stored" in said


def test_adapters_made_of_it_keep_what_it_was_trained_on(trained, tmp_path, says):
    says("scripts/resize_lora.py", "--lora_path", trained, "--rank", 4, "--out_dir", tmp_path / "small")
    one, other = trained, tmp_path / "small"
    says("scripts/combine_lora.py", "--lora_path", one, other, "--out_dir", tmp_path / "sum")
    for made in ("small", "sum"):
        assert open_checkpoint(tmp_path / made).base.quantized == open_checkpoint(trained).base.quantized
    said = json.loads(says("scripts/inspect_checkpoint.py", tmp_path / "sum", "--json"))
    assert said["base"]["quantized"]["name"] == "nf4" and said["base"]["matches"]
    assert "quantised to nf4 in training" in says("scripts/inspect_checkpoint.py", trained)


def test_converting_writes_the_model_that_was_trained(trained, tmp_path, says):
    out = tmp_path / "hf"
    said = says("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", trained, "--out_dir", out)
    expected, _ = merge_chain(resolve(trained))
    assert ", onto dequantized" in said
    written = open_checkpoint(out).tensors
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_chat_says_what_it_loads(trained, base, says):
    ask = ("chat/base.py", "--prompt", "the fox", "--temperature", 0, "--checkpoint_dir")
    assert "the linear layers of the blocks are in nf4 (blocks of 64)" in says(*ask, trained)
    said = says(*ask, base, "--quantize", "fp8")
    assert "the linear layers of the blocks are in fp8 (a scale for each row)" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_peft_on_a_base_that_bitsandbytes_quantises_is_the_same_model(name, run, tmp_path, tokenizer_dir):
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_folder("llama", tmp_path / "folder", hidden_size=128, intermediate_size=192, vocab_size=400)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "folder")
    words = ["--checkpoint_dir", tmp_path / "folder", "--quantize", name, "--train.learning_rate", 0.01]
    run("lora", tmp_path / "run", *WORDS, *words)
    adapter = tmp_path / "run/final"
    said = succeeds("scripts/export_peft.py", "--lora_path", adapter, "--out_dir", tmp_path / "peft").stdout
    assert f"trained on the base's values in {name};" in said and "BitsAndBytesConfig(load_in_4" in said
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": name == "nf4-dq"}
    settings = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", dtype="auto", quantization_config=settings
    )
    # In fp32: bitsandbytes itself multiplies in bf16 on the CPU.
    theirs = peft.PeftModel.from_pretrained(model.dequantize().float(), tmp_path / "peft").eval()
    with torch.inference_mode():
        ours, original = (load(adapter, live=None, quantize=how).model(IDS) for how in (None, "none"))
        found = theirs(IDS).logits
    close = 2e-5 if name == "nf4" else 0.02  # one in 600 of its scales is not the nearest
    assert (found - ours).abs().max() < close < (found - original).abs().max()


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["finetune/full.py", "--quantize", "nf4"], "--quantize nf4: a full fine-tune trains all weights"),
        (
            ["finetune/lora.py", "--quantize", "int8", "--lora.modules_to_save", '["up_proj"]'],
            "--lora.modules_to_save up_proj: --quantize int8 quantises model.layers.0.mlp.up_proj",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_both_settings(words, why, base, tmp_path, forked):
    out = ("--out_dir", tmp_path / "out")
    assert why in forked.refuses(*words, "--checkpoint_dir", base, *out, cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_layer_smaller_than_a_block_is_refused(make_checkpoint):
    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    directory = make_checkpoint("small", head_dim=2, **sizes)
    with pytest.raises(
        UserError, match="quantize nf4: .*q_proj.* is 4 x 4, 16 values, and a block has 64; int8"
    ):
        load(directory, quantize="nf4")
    load(directory, quantize="int8")


def test_a_base_in_few_bits_is_not_quantised_again(tmp_path, tokenizer_dir):
    save_folder("llama", tmp_path / "base", vocab_size=400)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "base")
    quantize_folder(tmp_path / "base", "nf4")
    with pytest.raises(UserError, match=r"quantize int8: .* in few bits already \(nf4\)"):
        load(tmp_path / "base", quantize="int8")
