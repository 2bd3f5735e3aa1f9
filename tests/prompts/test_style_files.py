"""A style that a run was given travels with its result: to chat, merge, further runs and exports."""

import functools
import json
from functools import partial

import pytest
import yaml
from made_tokenizers import CONTROL, write_tokenizer

from litlora.load import load
from litlora.stop_tokens import stops_of

transformers = pytest.importorskip("transformers")

STEPS = ("--train.max_steps", 2)


@pytest.fixture
def succeeds(forked, tmp_path):
    """What a command prints."""
    return partial(forked.succeeds, cwd=tmp_path)


@pytest.fixture
def chat_base(base, tmp_path):
    """The base with a tokenizer that has ChatML's tokens."""
    write_tokenizer(tmp_path / "tokenizer", "byte-level", CONTROL["chatml"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    return base


def test_a_built_in_style_travels_with_the_result(chat_base, run, succeeds, tmp_path, capsys):
    first = run("lora", tmp_path / "first", "--prompt_style", "chatml", "--train.save_interval", 1, *STEPS)
    said = capsys.readouterr().out
    assert "prompt style: chatml (as set)" in said and "into pieces" not in said
    assert yaml.safe_load((first / "hyperparameters.yaml").read_text())["prompt_style"] == "chatml"
    for place in (first / "step-000001", first / "final"):
        assert (place / "prompt_style.yaml").read_text() == "name: chatml\nstyle: template\n"
        assert "<|im_start|>" in (place / "chat_template.jinja").read_text()
    second = run("lora", tmp_path / "second", "--checkpoint_dir", first / "final", *STEPS)
    assert "prompt style: chatml (the model was trained with it)" in capsys.readouterr().out
    succeeds("scripts/merge_lora.py", "--lora_path", second / "final", "--out_dir", tmp_path / "merged")
    for place in (second / "final", tmp_path / "merged"):
        loaded = load(place)
        assert loaded.prompt_style.title == "chatml"
        assert loaded.prompt_style.render("a", "") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        assert loaded.tokenizer.token(stops_of([place])[-1]) == "<|im_end|>"
    succeeds(
        "scripts/convert_lit_checkpoint.py",
        "--checkpoint_dir",
        tmp_path / "merged",
        "--out_dir",
        tmp_path / "hf",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == loaded.prompt_style.render("a", "")
    named = json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"]
    assert theirs.convert_tokens_to_ids("<|im_end|>") in named
    said = succeeds(
        *(
            "chat/base.py",
            "--checkpoint_dir",
            second / "final",
            "--system",
            "Be brief.",
            "--accelerator",
            "cpu",
        )
    )
    assert "| prompt style chatml (the model was trained with it) |" in said and "system: Be brief." in said


def test_a_file_is_the_style_and_a_run_resumes_with_it(base, run, tmp_path, capsys):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}")
    words = ("--prompt_style", file, "--train.save_interval", 1)
    out = run("lora", tmp_path / "out", *words, "--train.max_steps", 2, stop_after=1)
    run("lora", out, *words, "--train.max_steps", 2, "--resume", "auto")
    assert "resumed" in capsys.readouterr().out
    assert load(out / "final").prompt_style.render("a", "") == "user: a\n"


def test_a_wrong_style_is_refused_before_anything_is_loaded(base, forked, tmp_path):
    refuses = functools.partial(forked.refuses, cwd=tmp_path)
    line = refuses("finetune/lora.py", "--checkpoint_dir", base, "--prompt_style", "chat-ml")
    assert "--prompt_style chat-ml: no such style; there are alpaca, plain, template, chatml, llama3" in line
    line = refuses("chat/base.py", "--checkpoint_dir", base, "--prompt_style", tmp_path / "no.jinja")
    assert line.endswith("no.jinja: no such file\n")
    line = refuses("chat/base.py", "--checkpoint_dir", base, "--system", "Be brief.", "--accelerator", "cpu")
    assert "--system: the prompt style plain has no place for a system message; --prompt_style chatml" in line


def test_an_exported_adapter_asks_as_its_training_did(base, run, succeeds, tmp_path):
    out = run("lora", tmp_path / "out", *STEPS)
    succeeds("scripts/export_peft.py", "--lora_path", out / "final", "--out_dir", tmp_path / "peft")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "peft")
    asked = theirs.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert asked == load(out / "final").prompt_style.render("a", "")
