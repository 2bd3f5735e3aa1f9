"""The model card in every exported folder: what it says is what the run stored, and its code runs."""

import csv
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import random_adapter
from families import save_folder

from litlora.card import Use, card
from litlora.checkpoint import resolve
from litlora.hub import ORIGIN_FILE
from litlora.lora import LoRAConfig
from litlora.paths import CARD_FILE, GGUF_NAMES, HF_NAMES, MLX_NAMES, PEFT_NAMES

FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
SETTINGS = """\
# data: 30 examples of 40
checkpoint_dir: /home/jane/secret/base
data: {class_path: Files, init_args: {path: "hf://someone/poems@v1/train", val_fraction: 0.1}}
train: {epochs: 2, learning_rate: 0.0031, optimizer: adamw}
lora: {rank: 8, targets: qv}
prompt_style: /home/jane/secret/own|er.jinja
seed: 7
"""
METRICS = "step,epoch,loss,val_loss,seconds\n1,0,2.5,,1\n2,0,,1.75,2\n3,1,1.25,,3\n4,1,,1.5,4\n5,1,1.125,"


def code(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_a_card_says_what_is_stored_and_nothing_of_the_machine(tmp_path, base, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: gentle\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n"
    )
    (base / ".cache/huggingface").mkdir(parents=True)
    final = random_adapter(tmp_path / "my-run/final", base, LoRAConfig(rank=4, targets=("q_proj", "v_proj")))
    (final / "hyperparameters.yaml").write_text(SETTINGS)
    (tmp_path / "my-run/metrics.csv").write_text(METRICS)
    use = Use("peft", "as a PEFT folder", "print(1)", is_adapter=True)
    text = card(resolve(final), use)
    facts = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": f"{tmp_path.name}/base",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "gentle",
        "license_link": f"https://huggingface.co/{tmp_path.name}/base/blob/main/LICENSE",
        "tags": ["litlora", "lora"],
        "datasets": ["someone/poems"],
    }
    assert yaml.safe_load(FRONT.match(text)[1]) == facts
    assert "| base | `base` |" in text, "the name of a home directory is its owner's"
    said = [
        "# my-run",
        f"`{resolve(base).base.fingerprint}`",
        "fine-tuned with LoRA of rank 4 on q_proj, v_proj, as a PEFT folder.",
        "| licence of the base | other, gentle, LICENSE |",
        "| data | Files, hf://someone/poems@v1/train, 30 examples of 40 |",
        "| train.learning_rate | 0.0031 |",
        "| prompt_style | `secret/own?er.jinja` |",
        # The last row of metrics.csv is not whole.
        "4 steps; training loss 2.5000 at first and 1.2500 at the end",
        "validation loss 1.5000 at best and 1.5000 at the end; 4 s. Losses",
        "```python\nprint(1)\n```",
    ]
    assert [line for line in said if line not in text] == []
    assert str(tmp_path) not in text and "jane" not in text
    # What a download noted, or whoever exports says, is more than a directory's name.
    (base / ORIGIN_FILE).write_text("someone/llama")
    said = {}
    for named in (None, "their/base"):
        text = card(resolve(final), replace(use, base_model=named, is_adapter=named is None))
        said[named] = yaml.safe_load(FRONT.match(text)[1])
    assert said[None] == facts | {
        "base_model": "someone/llama",
        "license_link": "https://huggingface.co/someone/llama/blob/main/LICENSE",
    }
    named = said["their/base"]
    assert (named["base_model"], named["base_model_relation"]) == ("their/base", "finetune")
    # The hub's own reader; names that it has none of are left out.
    (base / ORIGIN_FILE).unlink()
    (final / "hyperparameters.yaml").write_text(SETTINGS.replace("someone/poems@v1", "someone/gedichte-ä"))
    (base / ".cache").rename(base / ".other")
    read = pytest.importorskip("huggingface_hub").ModelCard(card(resolve(final), use)).data
    assert (read.base_model, read.datasets, read.license_link) == (None, None, None)
    assert (read.library_name, read.pipeline_tag, read.tags) == (
        "peft",
        "text-generation",
        ["litlora", "lora"],
    )


def test_what_nothing_says_is_not_said(base):
    # Each export can replace a folder that it wrote, the card in it too.
    assert all(CARD_FILE in names for names in (HF_NAMES, PEFT_NAMES, MLX_NAMES, GGUF_NAMES))
    (base / "LICENSE").write_text("Be kind.")
    for facts in ("license: [odd", "date: 2024-13-45", f"a: {'[' * 2000}"):
        (base / "README.md").write_text(f"---\n{facts}\n---\n")
        text = card(resolve(base), Use("transformers", "as a Hugging Face folder", ""))
        assert "| licence of the base | its folder holds LICENSE |" in text
    assert "Nothing beside the weights says how they were trained." in text
    assert yaml.safe_load(FRONT.match(text)[1]) == {
        **{"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["litlora"]}
    }


@pytest.mark.slow
def test_the_code_in_the_card_of_a_run_runs(tmp_path, tokenizer_dir, alpaca_file, forked):
    base: Path = tmp_path / "someone/base"
    save_folder("llama", base, vocab_size=400, max_position_embeddings=512)
    for file in tokenizer_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    words = ["--checkpoint_dir", base, "--data", "JSON", "--data.path", alpaca_file, "--out_dir", "run"]
    words += ["--data.val_fraction", 0.2, "--train.max_steps", 2, "--train.log_interval", 1]
    forked.succeeds("finetune/lora.py", *words, "--prompt_style", "alpaca", cwd=tmp_path)
    final = tmp_path / "run/final"
    words = ("--lora_path", final, "--base_model", base, "--out_dir", "peft")
    forked.succeeds("scripts/export_peft.py", *words, cwd=tmp_path)
    words = ("--checkpoint_dir", final, "--out_dir", "hf")
    forked.succeeds("scripts/convert_lit_checkpoint.py", *words, cwd=tmp_path)
    # The folder is replaced as a whole, with its card.
    forked.succeeds("scripts/convert_lit_checkpoint.py", *words, "--overwrite", "true", cwd=tmp_path)
    with (tmp_path / "run/metrics.csv").open() as file:
        losses = [f"{float(row['loss']):.4f}" for row in csv.DictReader(file) if row["loss"]]
    answers = []
    for folder in ("hf", "peft"):
        text = (tmp_path / folder / "README.md").read_text()
        assert f"training loss {losses[0]} at first and {losses[-1]} at the end" in text
        program = code(text).replace("max_new_tokens=100", "max_new_tokens=8, do_sample=False")
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path / folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1] and "### Response:" in answers[0]
