"""Adapters of other formats in the real commands: chat, merge, fine-tuning on them, export."""

import json
import shutil

import pytest
import torch
from conftest import fails, succeeds
from foreign import LITGPT, write_peft
from safetensors.torch import load_file, save_file

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, resolve
from litlora.load import load


@pytest.mark.slow
def test_a_peft_adapter_is_taken_wherever_one_of_ours_is(base, alpaca_file, tmp_path):
    adapter = write_peft(tmp_path / "peft", base)
    said = succeeds("chat/base.py", "--checkpoint_dir", adapter, "--prompt", "the fox", "--max_new_tokens", 3)
    assert "taken as its base by shape alone" in said.stderr
    merged = succeeds(
        "scripts/merge_lora.py",
        "--lora_path",
        adapter / "adapter_model.safetensors",
        "--out_dir",
        tmp_path / "merged",
    )
    assert "taken as its base by shape alone" in merged.stdout
    expected, _ = merge_chain(resolve(adapter))
    result = open_checkpoint(tmp_path / "merged")
    assert all(torch.equal(result.tensors[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "merged/tokenizer.json").is_file()

    train = "--train.max_steps 2 --train.max_seq_length 128 --prompt_style plain".split()
    lora = ["--lora.rslora", "true", "--lora.rank", 4, "--lora.rank_pattern", '{"k_proj": 2}']
    more = ["--data", "JSON", "--data.path", alpaca_file, "--lora.modules_to_save", '["model.norm"]']
    tuned = succeeds(
        "finetune/lora.py", "--checkpoint_dir", adapter, "--out_dir", tmp_path / "run", *train, *lora, *more
    )
    assert "by shape alone" in tuned.stdout
    chain = resolve(tmp_path / "run/final")
    assert chain.directories == [base, adapter, tmp_path / "run/final"]
    assert {tensor.size(0) for name, tensor in chain.top.tensors.items() if name.endswith("lora_A")} == {2, 4}
    assert not torch.equal(chain.top.tensors["model.norm.weight"], chain.base.tensors["model.norm.weight"])
    repeat = succeeds(
        "finetune/lora.py", "--config", tmp_path / "run/hyperparameters.yaml", "--out_dir", tmp_path / "again"
    )
    assert repeat.returncode == 0
    again = open_checkpoint(tmp_path / "again/final")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in chain.top.tensors.items())

    assert "is an adapter itself" in fails(
        "scripts/export_peft.py", "--lora_path", tmp_path / "run/final", "--out_dir", tmp_path / "out"
    )
    export = ("scripts/export_peft.py", "--lora_path", adapter, "--out_dir", tmp_path / "out")
    assert "no such family; there are" in fails(*export, "--model_type", "nonsense")
    assert "is a full model" in fails(
        "scripts/export_peft.py", "--lora_path", base, "--out_dir", tmp_path / "out"
    )
    succeeds(*export, "--base_model", "someone/model")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "out", adapter))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_old_torch_file_of_peft_is_read(base, tmp_path):
    adapter = write_peft(tmp_path / "peft", base)
    expected = open_checkpoint(adapter).tensors
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in open_checkpoint(adapter).tensors.items()
    )


def test_a_base_that_is_not_here_is_asked_for(base, tmp_path):
    adapter = write_peft(tmp_path / "peft", "someone/model")
    error = fails("chat/base.py", "--checkpoint_dir", adapter, "--prompt", "x")
    assert "its base 'someone/model' is not a directory here" in error and "--base_checkpoint_dir" in error
    succeeds(
        "chat/base.py",
        "--checkpoint_dir",
        adapter,
        "--base_checkpoint_dir",
        base,
        "--prompt",
        "x",
        "--max_new_tokens",
        1,
    )
    succeeds(
        "scripts/merge_lora.py",
        "--lora_path",
        adapter,
        "--checkpoint_dir",
        base,
        "--out_dir",
        tmp_path / "merged",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector, but adapter_config.json has use_dora"),
        ({"lora_bias": True}, "has no lora_B.bias, but adapter_config.json has lora_bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base's weights"),
        ({"init_lora_weights": "loftq"}, "changed the base's weights as well; merge it in PEFT"),
        ({"init_lora_weights": "lora-xy"}, "'lora-xy' is not known here"),
        ({"target_parameters": ["mlp.gate.bias"]}, "target_parameters 'mlp.gate.bias' is not supported"),
        ({"trainable_token_indices": [1]}, "has rows of single tokens, but .*safetensors has none"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"r": 4}, "do not form an update of rank 4"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0, which no adapter can have"),
        ({"rank_pattern": {"(": 3}}, "does not close a group"),
    ],
)
def test_a_peft_setting_that_cannot_be_expressed_is_refused_by_name(changes, message, base, tmp_path):
    with pytest.raises(Exception, match=message) as caught:
        open_checkpoint(write_peft(tmp_path / "peft", base, **changes))
    assert type(caught.value).__name__ == "CheckpointError"


def test_settings_that_change_nothing_are_no_reason_to_refuse(base, tmp_path):
    plain = open_checkpoint(write_peft(tmp_path / "plain", base))
    more = {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0, "something_new": None, "use_newer": False}
    found = open_checkpoint(write_peft(tmp_path / "more", base, **more, newer_pattern={}, newer_list=[]))
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in found.tensors.items())
    assert found.config == plain.config


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", "lora_A or lora_B, but not both"),
        (
            "base_model.model.model.layers.0.mlp.nowhere.weight",
            "no place for model.layers.0.mlp.nowhere.weight",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "q_proj has lora_magnitude_vector, but adapter_config.json no use_dora",
        ),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "adapter_model.safetensors has rows of single tokens, but adapter_config.json has none",
        ),
    ],
)
def test_a_tensor_without_a_place_is_named(key, message, base, tmp_path):
    adapter = write_peft(tmp_path / "peft", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, key: torch.ones(3, 32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(Exception, match=message) as caught:
        open_checkpoint(adapter)
    assert type(caught.value).__name__ == "CheckpointError"


def test_an_adapter_of_another_base_is_refused(base, make_checkpoint, tmp_path):
    with pytest.raises(Exception, match="no place for model.layers.1.self_attn.q_proj"):
        open_checkpoint(write_peft(tmp_path / "peft", make_checkpoint("shallow", num_hidden_layers=1)))
    with pytest.raises(Exception, match="updates model.layers.0.self_attn.q_proj as 32 x 32; the base has"):
        merge_chain(resolve(write_peft(tmp_path / "other", make_checkpoint("wide", hidden_size=64))))


def test_a_circle_of_adapters_is_shown(tmp_path):
    write_peft(tmp_path / "a", tmp_path / "b")
    write_peft(tmp_path / "b", tmp_path / "a")
    with pytest.raises(Exception, match="a -> .*b -> .*a: the chain of adapters runs in a circle"):
        open_checkpoint(tmp_path / "a")


def test_a_litgpt_run_is_merged_by_the_command(tmp_path):
    shutil.copytree(LITGPT / "llama", tmp_path / "llama")
    shutil.copytree(LITGPT / "llama_lora", tmp_path / "final")
    done = succeeds(
        "scripts/merge_lora.py",
        "--lora_path",
        tmp_path / "final/lit_model.pth.lora",
        "--out_dir",
        tmp_path / "merged",
    )
    assert "by shape alone" in done.stdout
    expected = load_file(LITGPT / "llama_lora/logits.safetensors")
    merged = resolve(tmp_path / "merged")
    from litlora.load import build

    with torch.no_grad():
        logits = build(merged.config, merged.base.tensors, merged.base)(expected["tokens"])
    assert (logits - expected["logits"]).abs().max() < 2e-5


def test_a_litgpt_directory_with_a_tokenizer_is_loaded(tmp_path, tokenizer_dir):
    shutil.copytree(LITGPT / "llama", tmp_path / "llama")
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, tmp_path / "llama" / file.name)
    loaded = load(tmp_path / "llama")
    assert loaded.prompt_style.name == "alpaca"  # litgpt's prompt_style.yaml
    assert any("have no row in the embedding" in notice for notice in loaded.chain.notices)
