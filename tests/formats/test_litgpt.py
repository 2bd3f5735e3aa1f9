"""litgpt's directories: files that litgpt 0.5.13 wrote (`litgpt_files/make.py`) give the logits
that it computed."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import CheckpointError
from litlora.load import attach_adapter, build

FILES = Path(__file__).parents[1] / "litgpt_files"
FULL = ("llama", "llama_old", "qwen", "pythia", "pythia_old", "gemma", "mixtral")
ADAPTERS = ("llama_lora", "pythia_lora")


def difference(directory: Path, model: torch.nn.Module) -> float:
    expected = load_file(directory / "logits.safetensors")
    with torch.no_grad():
        return (model.eval()(expected["tokens"]) - expected["logits"]).abs().max().item()


@pytest.mark.parametrize("name", FULL)
def test_a_full_directory_gives_litgpts_logits(name):
    chain = resolve(FILES / name)
    assert not chain.notices
    assert difference(FILES / name, build(chain.config, chain.base.tensors, chain.base)) < 2e-5


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_litgpts_logits_merged_and_live(name, tmp_path, monkeypatch):
    monkeypatch.chdir(
        tmp_path
    )  # the base is found beside the adapter, although its path was stored as it was typed
    chain = resolve(FILES / name)
    assert len(chain.adapters) == 1 and "by shape alone" in chain.notices[0]
    tensors, config = merge_chain(chain)
    assert difference(FILES / name, build(config, tensors, chain.base)) < 2e-5
    model = build(chain.config, chain.base.tensors, chain.base)
    attach_adapter(model, chain.top)
    assert difference(FILES / name, model) < 2e-5
    base = FILES / name.removesuffix("_lora")
    assert difference(FILES / name, build(chain.config, chain.base.tensors, chain.base)) > 0.01
    assert resolve(FILES / name, base_dir=base).base.directory == base


def test_a_merged_model_is_used_only_if_it_is_no_older_than_the_adapter_beside_it(tmp_path):
    import os

    directory = Path(shutil.copytree(FILES / "llama_lora", tmp_path / "final"))
    shutil.copyfile(FILES / "llama" / "lit_model.pth", directory / "lit_model.pth")
    os.utime(directory / "lit_model.pth", (1, 1))
    assert open_checkpoint(directory, base_dir=FILES / "llama").kind == "adapter"
    os.utime(directory / "lit_model.pth")
    assert open_checkpoint(directory).kind == "full"


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("llama_lora", "hyperparameters.yaml", {"lora_r": 4}, "do not form an update of rank 4"),
        (
            "llama_lora",
            "hyperparameters.yaml",
            {"lora_key": True},
            "do not form an update of rank 3 of 3 layer",
        ),
        ("llama_lora", "hyperparameters.yaml", {"lora_r": None}, "lacks lora_r"),
        (
            "llama_lora",
            "hyperparameters.yaml",
            {"checkpoint_dir": "nowhere"},
            "'nowhere' is not a directory here",
        ),
        ("llama", "model_config.yaml", {"latent_attention": {"q_lora_rank": 4}}, "latent_attention"),
        ("llama", "model_config.yaml", {"rope_interleave": True}, "rope_interleave"),
        (
            "llama",
            "model_config.yaml",
            {"rope_adjustments": {"factor": 2, "beta_fast": 32, "beta_slow": 1}},
            "rope_adjustments with",
        ),
        ("llama", "model_config.yaml", {"n_head": None}, "n_head is missing"),
        ("llama", "model_config.yaml", {"n_query_groups": 4}, "attn.qkv has shape"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name, file, change, message, tmp_path):
    directory = Path(shutil.copytree(FILES / name, tmp_path / name))
    values = yaml.safe_load((directory / file).read_text()) | change
    (directory / file).write_text(
        yaml.safe_dump(
            {key: value for key, value in values.items() if value is not None or key not in change}
        )
    )
    with pytest.raises(CheckpointError, match=message):
        base_dir = FILES / "llama" if name == "llama_lora" and "checkpoint_dir" not in change else None
        resolve(directory, base_dir=base_dir)


def test_a_tensor_that_the_base_has_no_place_for_is_named(tmp_path):
    directory = Path(shutil.copytree(FILES / "llama_lora", tmp_path / "final"))
    with pytest.raises(CheckpointError, match=r"no place for .*h\.1\.attn\.qkv"):
        shutil.copytree(FILES / "mixtral", tmp_path / "llama")  # one layer only
        resolve(directory, base_dir=tmp_path / "llama")
