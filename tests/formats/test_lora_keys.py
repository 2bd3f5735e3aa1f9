"""However a LoRA file spells its factors, they are the same update, and are written back as they
were read."""

import pytest
import torch
from conftest import succeeds
from safetensors.torch import load_file, save_file

from litlora.adapters.apply import match
from litlora.errors import CheckpointError
from litlora.formats.lora_files import read_lora, write_lora

A, B = torch.randn(3, 10), torch.randn(8, 3)


def pair(key: str, down: str = "down", up: str = "up") -> tuple[str, str]:
    return key.format(down), key.format(up)


SPELLINGS = {
    "x.y": pair("x.y.lora_{}.weight"),
    "transformer.x.y": pair("transformer.x.y.lora_{}.default_0.weight", "A", "B"),
    "base_model.model.x.y": pair("base_model.model.x.y.lora_{}.default_0.weight", "A", "B"),
    "x.q": pair("x.q.lora_{}", "A", "B"),
    "unet.x.proj": pair("unet.x.proj.lora.{}.weight"),
    "text_encoder.x.fc1": pair("text_encoder.x.fc1.lora_linear_layer.{}.weight"),
    # what diffusers.utils.state_dict_utils makes of the names that the first diffusers wrote
    "unet.x.attn1.to_q": pair("unet.x.attn1.processor.to_q_lora.{}.weight"),
    "x.attn2.to_out.0": pair("x.attn2.processor.to_out_lora.{}.weight"),
    "text_encoder.x.self_attn.out_proj": pair("text_encoder.x.self_attn.to_out_lora.{}.weight"),
    "text_encoder.x.self_attn.q_proj": pair("text_encoder.x.self_attn.to_q_lora.{}.weight"),
}


@pytest.mark.parametrize("layer", SPELLINGS)
def test_every_spelling_is_read_and_written_back(tmp_path, layer):
    down, up = SPELLINGS[layer]
    save_file({down: A, up: B}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.updates.keys() == {layer}
    assert torch.equal(lora.updates[layer].A, A) and torch.equal(lora.updates[layer].B, B)
    write_lora(tmp_path / "b.safetensors", lora, torch.float32)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == {down, up} and torch.equal(again[down], A) and torch.equal(again[up], B)


def test_one_file_may_spell_its_layers_in_several_ways(tmp_path):
    tensors = {key: (A if key == keys[0] else B).clone() for keys in SPELLINGS.values() for key in keys}
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.updates.keys() == SPELLINGS.keys()
    write_lora(tmp_path / "b.safetensors", lora, torch.float32)
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()


def test_two_adapters_in_one_file_are_refused_by_name(tmp_path):
    tensors = {
        f"x.{layer}.lora_{part}.{name}.weight": factor.clone()
        for layer, name in (("q", "one"), ("v", "two"))
        for part, factor in (("A", A), ("B", B))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 2 adapters \(one, two\); save each to a file"):
        read_lora(tmp_path / "a.safetensors")


def test_factors_without_weight_in_a_torch_file_are_refused(tmp_path):
    torch.save({"model": {"x.lora_A": A, "x.lora_B": B}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="store the scale elsewhere; name the adapter's directory"):
        read_lora(tmp_path / "a.pth")


def test_files_of_two_spellings_are_combined(tmp_path):
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "a.safetensors")
    other = {"x.lora_down.weight": A + 1, "x.lora_up.weight": B - 1, "x.alpha": torch.tensor(6.0)}
    save_file(other, tmp_path / "b.safetensors")
    for first, second, keys in (
        ("a", "b", {"x.lora_A.weight", "x.lora_B.weight"}),
        ("b", "a", set(other)),
    ):
        files = [tmp_path / f"{name}.safetensors" for name in (first, second)]
        succeeds("scripts/combine_lora.py", "--lora_path", *files, "--out_dir", tmp_path / first)
        file = tmp_path / first / f"{first}.safetensors"
        assert load_file(file).keys() == keys
        total = read_lora(file).updates["x"].product().double()
        wanted = B.double() @ A.double() + 2 * (B.double() - 1) @ (A.double() + 1)
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("layers.0.q", "model.layers.0.q"), ("model.layers.0.q", "layers.0.q")])
def test_a_decoder_with_and_without_its_head_are_the_same_layers(tmp_path, names):
    key, name = names
    save_file(
        {f"base_model.model.{key}.lora_A.weight": A, f"base_model.model.{key}.lora_B.weight": B},
        tmp_path / "a.safetensors",
    )
    model = {f"{name}.weight": torch.zeros(8, 10)}
    found, unmatched = match([(read_lora(tmp_path / "a.safetensors"), 1.0)], model)
    assert found.keys() == {f"{name}.weight"} and not unmatched


def test_factors_of_a_kernel_of_1_fit_a_linear_layer(tmp_path):
    save_file(
        {"x.lora_down.weight": A[:, :, None, None], "x.lora_up.weight": B[:, :, None, None]},
        tmp_path / "a.safetensors",
    )
    save_file({"x.weight": torch.zeros(8, 10)}, tmp_path / "base.safetensors")
    words = ["--source-model", tmp_path / "base.safetensors", "--lora-model", tmp_path / "a.safetensors"]
    succeeds("scripts/lora_merger.py", *words, "--output", tmp_path / "out", "--output_dtype", "fp32")
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["x.weight"], B @ A)
