"""Tokens that a run adds: their rows train, the adapter stores only these, and every command and
other programs take the result."""

import json
from functools import partial

import pytest
import torch
import yaml
from families import save_folder
from made_tokenizers import write_tokenizer

from litlora.checkpoint import resolve
from litlora.errors import CheckpointError, UserError
from litlora.load import load
from litlora.settings import TokenizerConfig
from litlora.storage.tensors import open_torch
from litlora.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = ["<|im_start|>", "<|im_end|>"]
CHATML = ("--prompt_style", "chatml", "--tokenizer.add_tokens", "auto")
STEPS = ("--train.max_steps", 2, "--precision", "32-true", "--train.learning_rate", 0.01)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def model_folder(tmp_path):
    """model_folder(spare, tied) -> a Hugging Face folder whose embedding has so many rows to spare."""

    def make(spare: int, tied: bool):
        place = tmp_path / "model"
        size = Tokenizer(write_tokenizer(place, "byte-level", [])).vocab_size
        torch.manual_seed(0)
        sizes = {"vocab_size": size + spare, "max_position_embeddings": 128}
        save_folder("llama", place, tie_word_embeddings=tied, **sizes)
        return place, size

    return make


@pytest.fixture
def succeeds(forked, tmp_path):
    """What a command prints."""
    return partial(forked.succeeds, cwd=tmp_path)


def logits(model, ids):
    with torch.no_grad():
        found = model(torch.tensor([ids]))
    return getattr(found, "logits", found)


@pytest.mark.parametrize(
    ("tied", "spare"),
    [
        pytest.param(True, 0, id="tied", marks=pytest.mark.slow),
        pytest.param(False, 5, id="untied, spare rows"),
        pytest.param(True, 5, id="tied, spare rows", marks=pytest.mark.slow),
        pytest.param(False, 0, id="untied", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_stores_the_rows_of_its_tokens_alone(
    spare, tied, model_folder, run, succeeds, tmp_path, capsys
):
    base, known = model_folder(spare, tied)
    out = run("lora", tmp_path / "out", "--checkpoint_dir", base, *CHATML, *STEPS)
    assert f"tokenizer: added <|im_start|> ({known}), <|im_end|> ({known + 1})\n" in capsys.readouterr().out
    stored = yaml.safe_load((out / "hyperparameters.yaml").read_text())["tokenizer"]
    assert stored == {"add_tokens": TOKENS}
    final, ids = out / "final", [known, known + 1]
    content = open_torch(final / "lit_model.pth")
    rows = {name: tuple(t.shape) for name, t in content["model"].items() if ".lora_" not in name}
    names = ["model.embed_tokens.token_rows"] + ["lm_head.token_rows"] * (not tied)
    assert rows == dict.fromkeys(names, (2, 32))
    assert content["litlora"]["tokens"] == {"ids": ids, "num_rows": max(known + 2, known + spare)}

    loaded, before = load(final), load(base).model
    assert loaded.tokenizer.encode("<|im_end|>") == ids[1:]
    assert loaded.model.config.tie_word_embeddings == tied
    for name in [EMBEDDING] + [HEAD] * (not tied):
        new, old = loaded.model.get_parameter(name), before.get_parameter(name)
        assert torch.equal(new[:known], old[:known]), "all other rows are the base's"
        start = old[:known].mean(dim=0)
        assert all(0 < (new[i] - start).abs().max() < 0.1 for i in ids), "from the mean, by training"
    asked = loaded.tokenizer.encode(loaded.prompt_style.render("the fox", ""))
    assert asked[0] == ids[0]
    expected = logits(loaded.model, asked)
    assert torch.allclose(logits(load(final, live=True).model, asked), expected, atol=1e-5)

    said = succeeds("scripts/merge_lora.py", "--lora_path", final, "--out_dir", tmp_path / "merged")
    assert "verified on" in said
    assert torch.equal(logits(load(tmp_path / "merged").model, asked), expected)
    succeeds("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", final, "--out_dir", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    question = [{"role": "user", "content": "the fox"}]
    assert asked == tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert torch.allclose(logits(theirs, asked), expected, atol=1e-4)
    assert ids[1] in theirs.generation_config.eos_token_id

    said = succeeds("scripts/export_peft.py", "--lora_path", final, "--out_dir", tmp_path / "peft")
    assert ("resize_token_embeddings" in said) == (spare == 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    if spare == 0:
        theirs.resize_token_embeddings(known + 2, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    assert torch.allclose(logits(theirs, asked), expected, atol=1e-4)
    said = succeeds("scripts/inspect_checkpoint.py", final)
    assert f"adds {known}, {known + 1}; vocabulary {max(known + 2, known + spare)} with them" in said


@pytest.mark.slow
def test_a_chain_on_added_tokens_and_a_resumed_run(model_folder, run, succeeds, tmp_path, capsys):
    base, known = model_folder(0, True)
    words = ("--checkpoint_dir", base, *CHATML, *STEPS, "--train.save_interval", 1)
    whole = run("lora", tmp_path / "whole", *words) / "final"
    run("lora", tmp_path / "out", *words, stop_after=1)
    final = run("lora", tmp_path / "out", *words, "--resume", "auto") / "final"
    assert (final / "lit_model.pth").read_bytes() == (whole / "lit_model.pth").read_bytes()
    capsys.readouterr()

    second = run("lora", tmp_path / "second", "--checkpoint_dir", final, *STEPS) / "final"
    said = capsys.readouterr().out
    assert "prompt style: chatml (the model was trained with it)" in said and "pieces" not in said
    chain = resolve(second)
    assert len(chain.adapters) == 2 and not chain.notices
    third = ("--checkpoint_dir", second, *STEPS, "--tokenizer.add_tokens", "[<extra>, <|im_end|>]")
    third = run("lora", tmp_path / "third", *third) / "final"
    assert load(third).tokenizer.encode("<extra>") == [known + 2]
    assert load(third).model.config.vocab_size == known + 3
    small = tmp_path / "small"
    succeeds("scripts/resize_lora.py", "--lora_path", third, "--rank", 2, "--out_dir", small)
    assert load(small).model.config.vocab_size == known + 3
    succeeds("scripts/merge_lora.py", "--lora_path", third, "--out_dir", tmp_path / "merged")
    assert load(tmp_path / "merged").model.config.vocab_size == known + 3


def test_what_lies_below_may_untie_the_head_and_then_takes_no_tokens(model_folder, run, tmp_path):
    base, _ = model_folder(0, True)
    first = ("--checkpoint_dir", base, *STEPS, "--lora.targets", "[q_proj, lm_head]")
    first = run("lora", tmp_path / "first", *first) / "final"
    second = run("lora", tmp_path / "second", "--checkpoint_dir", first, *STEPS) / "final"
    ids = [1, 2, 3]
    assert torch.allclose(
        logits(load(second).model, ids), logits(load(second, live=True).model, ids), atol=1e-5
    )
    with pytest.raises(
        CheckpointError, match="first/final: updates lm_head.weight by LoRA, and .* merge .*second"
    ):
        run("lora", tmp_path / "third", "--checkpoint_dir", second, *STEPS, "--tokenizer.add_tokens", "<a>")
    full = ("--checkpoint_dir", second, *STEPS, "--tokenizer.add_tokens", "<a>")
    assert load(run("full", tmp_path / "full", *full) / "final").tokenizer.cut_up(["<a>"]) == []


def test_a_full_fine_tune_has_the_larger_vocabulary(model_folder, run, succeeds, tmp_path):
    base, known = model_folder(0, False)
    final = run("full", tmp_path / "out", "--checkpoint_dir", base, *CHATML, *STEPS) / "final"
    loaded = load(final)
    assert loaded.model.config.vocab_size == known + 2
    asked = loaded.tokenizer.encode(loaded.prompt_style.render("the fox", ""))
    succeeds("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", final, "--out_dir", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert torch.allclose(logits(theirs, asked), logits(loaded.model, asked), atol=1e-4)


def test_what_cannot_be_added_is_refused(model_folder, run, tmp_path, forked):
    base, known = model_folder(0, False)
    words = ("--checkpoint_dir", base, *STEPS, "--tokenizer.add_tokens")
    with pytest.raises(UserError, match="^add_tokens auto: the prompt style plain has no control tokens"):
        run("lora", tmp_path / "a", *words, "auto", "--prompt_style", "plain")
    with pytest.raises(UserError, match="leave these out of modules_to_save$"):
        run("lora", tmp_path / "b", *words, "<a>", "--lora.modules_to_save", "[embed_tokens]")
    with pytest.raises(UserError, match="leave these out of targets$"):
        run("lora", tmp_path / "c", *words, "<a>", "--lora.targets", "[q_proj, lm_head]")
    with pytest.raises(UserError, match="^add_tokens ' a': a token has no spaces around it"):
        TokenizerConfig(add_tokens=[" a"])
    with pytest.raises(UserError, match="names a token twice"):
        TokenizerConfig(add_tokens=["a", "a"])


@pytest.mark.parametrize(
    ("tied", "spare", "weights", "mode"),
    [
        pytest.param(True, 0, (0.7, 0.3), "linear", id="tied", marks=pytest.mark.slow),
        pytest.param(False, 5, (1, 1), "cat", id="untied, spare rows"),
        pytest.param(True, 5, (0.5, -1.5), "svd", id="tied, spare rows", marks=pytest.mark.slow),
    ],
)
def test_adapters_of_the_same_tokens_are_combined(
    tied, spare, weights, mode, model_folder, run, succeeds, tmp_path
):
    """By what training made of the rows; at weights whose sum is 1, that is the sum of the rows."""
    base, known = model_folder(spare, tied)
    finals = [
        run("lora", tmp_path / name, "--checkpoint_dir", base, *CHATML, *STEPS, "--seed", seed) / "final"
        for name, seed in (("one", 1), ("two", 2))
    ]
    words = ("--lora_path", *finals, "--weights", *weights, "--mode", mode, "--out_dir", tmp_path / "sum")
    succeeds("scripts/combine_lora.py", *words)
    live = [load(path, live=True) for path in (*finals, tmp_path / "sum")]
    before = load(base).model
    for name in (EMBEDDING, HEAD):
        one, two, both = (found.model.get_parameter(name) for found in live)
        assert not torch.equal(one[known], two[known])
        start = before.get_parameter(name)[:known].mean(dim=0)
        expected = start + weights[0] * (one[known:][:2] - start) + weights[1] * (two[known:][:2] - start)
        assert torch.allclose(both[known:][:2], expected, atol=1e-6)
        if sum(weights) == 1:
            assert torch.allclose(
                both[known:][:2], weights[0] * one[known:][:2] + weights[1] * two[known:][:2]
            )
        assert torch.equal(both[:known], one[:known])
    asked = live[2].tokenizer.encode(live[2].prompt_style.render("the fox", ""))
    assert asked[0] == known
    succeeds("scripts/merge_lora.py", "--lora_path", tmp_path / "sum", "--out_dir", tmp_path / "merged")
    expected = logits(live[2].model, asked)
    assert torch.allclose(logits(load(tmp_path / "merged").model, asked), expected, atol=1e-5)


@pytest.mark.slow
def test_adapters_of_other_tokens_are_not_combined(model_folder, run, tmp_path, forked):
    base, known = model_folder(5, True)
    words = ("--checkpoint_dir", base, *STEPS, "--prompt_style", "alpaca")
    one, other, turned, none = (
        run("lora", tmp_path / name, *words, *more) / "final"
        for name, more in (
            ("one", ("--tokenizer.add_tokens", "[<a>, <b>]")),
            ("other", ("--tokenizer.add_tokens", "[<a>, <c>]")),
            ("turned", ("--tokenizer.add_tokens", "[<b>, <a>]")),
            ("none", ()),
        )
    )
    for path, tokens in (
        (other, f"<a> ({known}), <c> ({known + 1})"),
        (turned, f"<b> ({known}), <a> ({known + 1})"),
        (none, "none"),
    ):
        line = forked.refuses(
            *("scripts/combine_lora.py", "--lora_path", one, path, "--out_dir", tmp_path / "sum"),
            cwd=tmp_path,
        )
        assert f"{path / 'lit_model.pth'}: the tokens that it adds are {tokens}, those of {one}" in line
    (other / "tokenizer.json").unlink()
    words = ("scripts/combine_lora.py", "--lora_path", one, other, "--out_dir", tmp_path / "sum")
    assert "its tokenizer is not beside it; which they are is not known" in forked.refuses(
        *words, cwd=tmp_path
    )


def test_an_adapter_with_tokens_is_merged_alone_and_at_strength_1(model_folder, run, tmp_path, forked):
    """Also where the base has rows to spare: two adapters may have different tokens in the same row,
    and the base has no value to take a part of."""
    base, _ = model_folder(5, True)
    words = ("--checkpoint_dir", base, *STEPS, "--prompt_style", "alpaca")
    one = run("lora", tmp_path / "one", *words, "--tokenizer.add_tokens", "<a>") / "final"
    two = run("lora", tmp_path / "two", *words, "--tokenizer.add_tokens", "<b>") / "final"
    none = run("lora", tmp_path / "none", *words) / "final"
    for paths, more in (
        ((one, two), ()),
        ((none, one), ()),
        ((one,), ("--strength", 0.5)),
        ((one,), ("--strength", 0)),
    ):
        words = ("scripts/merge_lora.py", "--lora_path", *paths, *more, "--out_dir", tmp_path / "sum")
        line = forked.refuses(*words, cwd=tmp_path)
        assert f"{one / 'lit_model.pth'}: adds tokens; such an adapter can only be merged alone" in line
    words = ("--source_model", base, "--lora_model", one, "--output", tmp_path / "merged.safetensors")
    line = forked.refuses("scripts/lora_merger.py", *words, "--allow_unmatched", cwd=tmp_path)
    assert f"{one}: adds tokens, which need its tokenizer; merge it with scripts/merge_lora.py" in line


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "token_rows is not part of an adapter"),  # what earlier versions say
        ({"ids": [9999], "num_rows": 10**12}, "do not fit model.embed_tokens.weight"),
        ({"ids": [1, 1], "num_rows": 400}, "must state different ids"),
        ({"ids": "x"}, "must state different ids"),
        ({"ids": [1, 2], "num_rows": 400}, "does not hold a row for each"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tokens, message, base, run, tmp_path):
    final = run("lora", tmp_path / "out", *STEPS, "--tokenizer.add_tokens", "<a>") / "final"
    content = open_torch(final / "lit_model.pth")
    described = {name: value for name, value in content["litlora"].items() if name != "tokens"}
    described |= {"tokens": tokens} if tokens else {}
    copies = {name: tensor.clone() for name, tensor in content["model"].items()}
    torch.save({"model": copies, "litlora": described}, final / "lit_model.pth")
    with pytest.raises(CheckpointError, match=message):
        load(final)


def test_settings_without_tokens_are_stored_as_before(run, tmp_path):
    out = run("lora", tmp_path / "out", *STEPS)
    assert "tokenizer" not in yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert "tokens" not in open_torch(out / "final/lit_model.pth")["litlora"]
    assert json.loads((out / "final/tokenizer.json").read_text())["added_tokens"][-1]["id"] == 0
