"""What litlora wrote before it was refactored is read with the same result: see
written_before/README.md."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import succeeds
from safetensors.torch import load_file

from litlora.adapters.describe import describe
from litlora.checkpoint import open_checkpoint, resolve
from litlora.load import load

BEFORE = Path(__file__).parent / "written_before"
IDS = torch.arange(20).view(1, 20) * 7 % 257
FINGERPRINTS = json.loads((BEFORE / "fingerprints.json").read_text())
# Each where its adapter finds its base: two directories up.
PLACES = {"base": "base", "adapter": "run/adapter", "second": "run/run/second", "merged": "merged"}
LINKS = {
    "base": ["base"],
    "adapter": ["base", "adapter"],
    "second": ["base", "adapter", "second"],
    "merged": ["merged"],
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("live", [False, True])
def test_a_checkpoint_gives_the_logits_that_it_gave(name, live):
    loaded = load(BEFORE / PLACES[name], live=live)
    with torch.no_grad():
        logits = loaded.model(IDS)[:, -2:]
    torch.testing.assert_close(logits, load_file(BEFORE / "logits.safetensors")[name], atol=1e-5, rtol=1e-5)
    assert [place.name for place in loaded.chain.directories] == LINKS[name]
    assert loaded.chain.notices == []
    assert (loaded.prompt_style and loaded.prompt_style.name) == (None if name == "base" else "plain")


@pytest.mark.parametrize("name", LINKS)
def test_a_checkpoint_keeps_its_fingerprint_and_has_no_problem(name):
    assert open_checkpoint(BEFORE / PLACES[name]).fingerprint == FINGERPRINTS[name]
    found = describe(BEFORE / PLACES[name])
    assert found["problems"] == [] and found["fingerprint"] == FINGERPRINTS[name]


def test_a_merged_model_answers_for_its_chain():
    assert open_checkpoint(BEFORE / "merged").answers_to(FINGERPRINTS["adapter"])
    on_merged = resolve(BEFORE / PLACES["second"], base_dir=BEFORE / "merged")
    assert [place.name for place in on_merged.directories] == ["merged", "second"]


def test_merging_again_gives_the_same_weights_and_training_goes_on_from_them(tmp_path):
    for place in PLACES.values():
        shutil.copytree(BEFORE / place, tmp_path / place, dirs_exist_ok=True)
    merge = ["scripts/merge_lora.py", "--lora_path", "run/adapter", "--out_dir", "again"]
    assert "verified" in succeeds(*merge, cwd=tmp_path).stdout
    assert open_checkpoint(tmp_path / "again").fingerprint == FINGERPRINTS["merged"]
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 8))
    data = ["--data", "JSON", "--data.path", "data.json", "--data.val_fraction", 0.25]
    words = ["--train.max_steps", 1, "--train.save_interval", 0, "--accelerator", "cpu"]
    train = ["finetune/lora.py", "--checkpoint_dir", "run/run/second", "--out_dir", "out"]
    succeeds(*train, *data, *words, cwd=tmp_path)
    links = [place.name for place in resolve(tmp_path / "out/final").directories]
    assert links == ["base", "adapter", "second", "final"]
