"""gpt-oss as it is released: experts in MXFP4, kept in 4 bits, and everything that is made of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails, succeeds
from families import save_folder
from safetensors.torch import load_file, save_file

from litlora.checkpoint import open_checkpoint
from litlora.frozen.few_bits import Quantized
from litlora.frozen.linear import stored_weights
from litlora.load import load
from litlora.lora import LoRAConfig, add_lora

transformers = pytest.importorskip("transformers")
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS = 4


@pytest.fixture
def stored(tmp_path, tokenizer_dir) -> Path:
    """A folder in MXFP4; `plain` beside it has the values that transformers gives it, in bf16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    directory = tmp_path / "stored"
    sizes = {"intermediate_size": 64, "vocab_size": 400, "max_position_embeddings": 256, "dtype": "bfloat16"}
    save_folder("gpt-oss", directory, **sizes)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, directory)
    plain = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        count, width, out = packed.pop(name).shape
        blocks = torch.randint(256, (count, out, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, blocks.shape[:-1], dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    shutil.copytree(directory, tmp_path / "plain")
    save_file(plain, tmp_path / "plain/model.safetensors", {"format": "pt"})
    save_file(packed, directory / "model.safetensors", {"format": "pt"})
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"quantization_config": SETTINGS}))
    return directory


def test_experts_stay_in_4_bits_and_give_what_their_values_give(stored):
    plain = stored.with_name("plain")
    ours, dense = open_checkpoint(stored), open_checkpoint(plain)
    few = [tensor for tensor in ours.tensors.values() if isinstance(tensor, Quantized)]
    assert len(few) == 3 * EXPERTS * ours.config.num_hidden_layers
    in_file = {n: t for n, t in load_file(stored / "model.safetensors").items() if t.dtype == torch.uint8}
    assert sum(one.nbytes for one in few) == sum(tensor.nbytes for tensor in in_file.values())
    assert ours.fingerprint == dense.fingerprint and ours.tensors.keys() == dense.tensors.keys()

    ids, found = torch.arange(20)[None] * 7 % 300, []
    for directory in (stored, plain):
        torch.manual_seed(1)
        model = load(directory, dense=[]).model
        assert len(stored_weights(model)) == (len(few) if directory == stored else 0)
        add_lora(model, LoRAConfig(rank=4, alpha=8, targets="all-linear"))
        model = model.float()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model(ids).logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len([name for name in found[0] if ".experts." in name]) == 2 * len(few)
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-4, rtol=1e-4)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").float()
    with torch.no_grad():
        assert (load(stored).model.float()(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.slow
def test_every_command_takes_it(stored, tmp_path, alpaca_file):
    run, words = (
        tmp_path / "run",
        ["--data", "JSON", "--data.path", alpaca_file, "--train.max_seq_length", 64],
    )
    words += ["--prompt_style", "plain", "--precision", "32-true", "--lora.targets", "all-linear"]
    words += ["--train.save_interval", 2, "--train.max_steps", 4, "--lora.rank", 4]
    start = ("finetune/lora.py", "--checkpoint_dir", stored, "--out_dir", run)
    said = succeeds(*start, *words).stdout
    assert "4 bits (mxfp4) and dequantised to bfloat16" in said
    assert f"{4 * EXPERTS} experts.gate_proj" in said and f"{4 * EXPERTS} experts.down_proj" in said
    whole = torch.load(run / "final/lit_model.pth", weights_only=True)["model"]
    shutil.rmtree(run / "final")
    succeeds(*start, *words, "--resume", run / "step-000002")
    again = torch.load(run / "final/lit_model.pth", weights_only=True)["model"]
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)

    merged, back, peft = tmp_path / "merged", tmp_path / "back", tmp_path / "peft"
    said = succeeds("scripts/merge_lora.py", "--lora_path", run / "final", "--out_dir", merged).stdout
    assert "verified" in said and "results hold these values, not the bits" in said
    asked = ("--prompt", "the fox", "--temperature", 0, "--max_new_tokens", 8)
    places = (run / "final", merged)
    assert len({succeeds("chat/base.py", "--checkpoint_dir", place, *asked).stdout for place in places}) == 1
    succeeds("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", merged, "--out_dir", back)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    names = load_file(stored.with_name("plain") / "model.safetensors").keys()
    assert load_file(back / "model.safetensors").keys() == names
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(back).float(), torch.randint(400, (1, 24))
    with torch.no_grad():
        assert (model(ids).logits - load(merged).model.float()(ids)).abs().max() <= 1e-4
    succeeds("scripts/export_peft.py", "--lora_path", run / "final", "--out_dir", peft)
    assert (
        "mlp.experts.gate_up_proj"
        in json.loads((peft / "adapter_config.json").read_text())["target_parameters"]
    )


@pytest.mark.slow
def test_what_is_wrong_with_its_experts_is_said_in_one_line(stored):
    file = stored / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    asked = ("chat/base.py", "--checkpoint_dir", stored, "--prompt", "x")
    assert "down_proj" in fails(*asked)
    fewer = {part: tensors[part][:3].clone() for part in (name, name.replace("blocks", "scales"))}
    save_file({**tensors, **fewer}, file, {"format": "pt"})
    assert "experts.0.down_proj.weight has shape (24, 64); the architecture needs" in fails(*asked)
