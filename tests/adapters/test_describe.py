"""What a checkpoint is, for every kind; a missing or wrong base is reported, and is never fatal."""

import json
import shutil

import pytest
import torch
from conftest import QUICKSTART, fails, random_adapter, succeeds, tiny_config
from foreign import LITGPT, write_peft
from safetensors.torch import save_file
from test_checkpoint import write_adapter
from test_merge import merge

from litlora.adapters.describe import describe, table
from litlora.adapters.factored import norm
from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import CheckpointError
from litlora.formats.lora_files import Update
from litlora.lora import LoRAConfig


def test_the_norm_of_an_update_needs_no_update():
    for shape in ((7, 5, 3), (40, 50, 8), (3, 3, 3)):
        B, A = torch.randn(shape[0], shape[2]), torch.randn(shape[2], shape[1])
        assert norm(Update(A, B, -1.5)) == pytest.approx(
            (1.5 * B.double() @ A.double()).norm().item(), rel=1e-9
        )


@pytest.mark.parametrize("tied", [False, True])
def test_every_layer_beside_the_weights_it_was_trained_on(tmp_path, make_checkpoint, tied):
    """In a chain, those are the base and the inner adapters together."""
    base = make_checkpoint("base", tie_word_embeddings=tied, dtype=torch.bfloat16)
    first = write_adapter(tmp_path / "first", base, targets=["q_proj"] if tied else ["q_proj", "lm_head"])
    second = write_adapter(
        tmp_path / "second", first, seed=2, targets=["q_proj", "lm_head"], modules_to_save=["model.norm"]
    )
    found = describe(second)
    assert found["problems"] == [] and found["base"] == {
        "path": str(first),
        "found": True,
        "matches": True,
        "wanted": open_checkpoint(first).fingerprint,
        "fingerprint": open_checkpoint(first).fingerprint,
    }
    assert found["chain"] == [str(base), str(first), str(second)]
    W, merged = merge_chain(resolve(first))[0], merge_chain(resolve(second))[0]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 4
    tensors = open_checkpoint(second).tensors
    for name, layer in layers.items():
        before = (
            W.get(f"{name}.weight", W["model.embed_tokens.weight"])
            if name != "model.norm.weight"
            else W[name]
        )
        if name == "model.norm.weight":
            delta = tensors[name].double() - before.double()
        else:
            delta = 8 * tensors[f"{name}.lora_B"].double() @ tensors[f"{name}.lora_A"].double()
        assert layer["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert layer["weight_norm"] == pytest.approx(before.double().norm().item(), rel=1e-2)
        assert layer["relative"] == pytest.approx(layer["delta_norm"] / layer["weight_norm"])
        assert layer["shape"] == list(before.shape) and layer["rank"] == (
            None if name == "model.norm.weight" else 2
        )
    everything = sum(layer["delta_norm"] ** 2 for layer in layers.values()) ** 0.5
    assert found["total"]["delta_norm"] == pytest.approx(everything)
    assert merged.keys() >= W.keys()


def test_a_full_checkpoint(base, tmp_path):
    found = describe(base / "lit_model.pth")
    opened = open_checkpoint(base)
    assert (found["kind"], found["format"], found["family"]) == ("full", "litlora", "llama")
    assert found["fingerprint"] == opened.fingerprint and found["dtypes"] == {
        "float32": sum(t.numel() for t in opened.tensors.values())
    }
    assert found["model"] == tiny_config().to_dict() and found["tokenizer"]
    adapter = write_adapter(tmp_path / "adapter", base)
    merge(tmp_path / "merged", adapter)
    assert describe(tmp_path / "merged")["merged_from"] == {
        "chain": open_checkpoint(adapter).fingerprint,
        "unchanged_since": True,
    }


def test_a_missing_base_is_reported(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    shutil.move(base, tmp_path / "moved")
    found = describe(adapter)
    assert not found["base"]["found"] and found["base"]["matches"] is None
    assert "is not a checkpoint directory; name the base" in found["problems"][0]
    assert all(layer["delta_norm"] > 0 and layer["relative"] is None for layer in found["layers"])
    assert "NOT FOUND" in "\n".join(table(found)) and "PROBLEM" in "\n".join(table(found))
    assert describe(adapter, base_dir=tmp_path / "moved")["base"]["matches"]


def test_a_base_that_does_not_match_is_reported(tmp_path, base, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", base)
    make_checkpoint("base", seed=7)
    found = describe(adapter)
    assert found["base"]["found"] and found["base"]["matches"] is False
    assert "not the base that" in found["problems"][0] and "DOES NOT MATCH" in "\n".join(table(found))
    make_checkpoint("base", intermediate_size=96)
    found = describe(adapter)
    assert any(
        "updates model.layers.0.mlp.gate_proj as 64 x 32; the base has (96, 32)" in problem
        for problem in found["problems"]
    )
    told = {layer["name"]: layer["relative"] is not None for layer in found["layers"]}
    assert told["model.layers.0.self_attn.q_proj"] and not told["model.layers.0.mlp.gate_proj"]


def test_a_peft_adapter_with_and_without_its_base(tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    adapter = write_peft(tmp_path / "peft", base)
    found = describe(adapter)
    assert (found["kind"], found["format"], found["base"]["matches"]) == ("adapter", "PEFT", None)
    assert "by shape alone" in found["notices"][0] and found["total"]["relative"] > 0
    shutil.move(base, tmp_path / "moved")
    alone = describe(adapter)
    assert "only what its own files tell" in alone["problems"][0] and not alone["base"]["found"]
    assert alone["total"]["delta_norm"] == pytest.approx(found["total"]["delta_norm"], rel=1e-6)
    assert alone["lora"]["alpha"] == [4] and any("alpha 4" in line for line in table(alone))
    assert describe(adapter, base_dir=tmp_path / "moved")["total"] == found["total"]


def test_litgpt_with_and_without_its_base(tmp_path):
    shutil.copytree(LITGPT / "llama", tmp_path / "llama")
    shutil.copytree(LITGPT / "llama_lora", tmp_path / "final")
    full, adapter = (
        describe(tmp_path / "llama"),
        describe(tmp_path / "final/lit_model.pth.lora", base_dir=tmp_path / "llama"),
    )
    assert (full["kind"], full["format"]) == ("full", "litgpt")
    assert (adapter["kind"], adapter["format"], adapter["problems"]) == ("adapter", "litgpt", [])
    assert adapter["total"]["relative"] > 0
    shutil.rmtree(tmp_path / "llama")
    alone = describe(tmp_path / "final")
    assert (
        alone["kind"] == "adapter" and "only what its own files tell" in alone["problems"][0] and table(alone)
    )


def test_a_lora_file_of_another_tool(tmp_path):
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    tensors = {
        "lora_unet_x.lora_down.weight": A,
        "lora_unet_x.lora_up.weight": B,
        "lora_unet_x.alpha": torch.tensor(2.0),
        "odd": A + 1,
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = describe(tmp_path / "x.safetensors")
    [layer] = found["layers"]
    assert layer["delta_norm"] == pytest.approx((B @ A / 2).norm().item(), rel=1e-5)
    assert found["problems"] == ["unrecognised keys: odd"]


def test_the_command_prints_a_table_or_json(tmp_path, base):
    said = succeeds("scripts/inspect_checkpoint.py", QUICKSTART).stdout
    assert (
        said.startswith(f"{QUICKSTART}: full, litlora\n") and open_checkpoint(QUICKSTART).fingerprint in said
    )
    adapter = write_adapter(tmp_path / "adapter", base)
    shutil.rmtree(base)
    printed = json.loads(succeeds("scripts/inspect_checkpoint.py", "--json", adapter).stdout)
    assert printed == describe(adapter, option=lambda name: f"--{name}")
    assert "name the base with --base_checkpoint_dir" in printed["problems"][0]


def test_anything_but_a_checkpoint_is_an_error(tmp_path, base):
    assert "no such directory" in fails("scripts/inspect_checkpoint.py", tmp_path / "nowhere")
    (tmp_path / "note.safetensors").write_text("hello")
    (base / "lit_model.pth").write_text("hello")
    for path in (tmp_path / "note.safetensors", base):
        with pytest.raises(CheckpointError, match="broken"):
            describe(path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_a_problem_without_a_size(tmp_path, make_checkpoint, value):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base"))
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    name = next(iter(content["model"]))
    content["model"][name][0, 0] = value
    torch.save(content, adapter / "lit_model.pth")
    said = json.loads(
        succeeds("scripts/inspect_checkpoint.py", adapter, "--json").stdout,
        parse_constant=lambda word: pytest.fail(word),
    )
    assert f"{name} holds values that are not finite" in said["problems"][0]
    assert said["layers"][0]["delta_norm"] is said["total"]["delta_norm"] is said["total"]["relative"] is None
    assert f"PROBLEM  {adapter}" in succeeds("scripts/inspect_checkpoint.py", adapter).stdout


def test_a_stand_in_is_found_through_an_adapter_of_another_format(tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    foreign = write_peft(tmp_path / "peft", base)
    second = write_adapter(tmp_path / "second", foreign)
    base.rename(tmp_path / "moved")
    found = describe(second, base_dir=tmp_path / "moved")
    assert found["base"]["matches"] and found["base"]["path"] == str(foreign) and not found["problems"]


def test_a_base_that_is_there_is_found_though_the_tensors_do_not_fit(tmp_path, make_checkpoint):
    """By the adapter's own word, and by the setting."""
    base = make_checkpoint("base", num_hidden_layers=1)
    adapter = write_peft(tmp_path / "peft", base)
    other = write_peft(tmp_path / "other", "somewhere/else")
    for found in (describe(adapter), describe(other, base_dir=base)):
        assert "the base has no place for model.layers.1.self_attn.q_proj" in found["problems"][0]
        assert (found["base"]["path"], found["base"]["found"]) == (str(base), True)
        assert not any("NOT FOUND" in line for line in table(found))
    assert describe(other)["base"] == {
        **{"path": "somewhere/else", "found": False, "wanted": None, "fingerprint": None, "matches": None}
    }


def test_the_table_shortens_long_lists(tmp_path, base):
    found = describe(random_adapter(tmp_path / "an_adapter", base, LoRAConfig(rank=2)))
    found["lora"] |= {
        "targets": [f"layers.{n}.q_proj" for n in range(30)],
        "rank_pattern": {f"layers.{n}": 3 for n in range(9)},
    }
    (line,) = (line for line in table(found) if line.startswith("lora "))
    assert "layers.7.q_proj and 22 more" in line and "layers.7: 3 and 1 more}" in line
