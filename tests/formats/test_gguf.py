"""GGUF files as a base: the logits are those of transformers' own reading of the same file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails, succeeds
from families import save_folder
from safetensors.torch import load_file

from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError
from litlora.formats.gguf import MODEL_TYPES, NAMES, NAMES_IN
from litlora.frozen.quantized import QuantizedWeight
from litlora.load import load

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
METADATA = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}


def write(file: Path, family: str, folder: Path, kind: str = "Q8_0") -> None:
    """A Hugging Face folder as llama.cpp's converter writes it, matrices of blocks in `kind`."""
    config = json.loads((folder / "config.json").read_text())
    kinds = {model_type: name for name, model_type in MODEL_TYPES.items()} | {"mixtral": "llama"}
    architecture = kinds[config["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    for key, name in METADATA.items():
        if isinstance(config.get(name), int):
            writer.add_uint32(f"{architecture}.{key}", config[name])
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_float32(f"{architecture}.rope.freq_base", rope.get("rope_theta", 10000.0))
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            writer.add_float32(f"{architecture}.{name}", config[name])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_uint32(f"{architecture}.rope.dimension_count", head)
    if experts := config.get("num_experts", config.get("num_local_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    names: dict[str, str] = {}
    for theirs, hf in (NAMES | NAMES_IN.get(config["model_type"], {})).items():
        names.setdefault(hf, theirs)
    for name, tensor in stacked(load_file(folder / "model.safetensors")).items():
        module, _, leaf = name.rpartition(".")
        prefix, module = "", module
        if module.startswith("model.layers."):
            number, module = module.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            tensor = tensor.view(-1, 2, head // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and module.endswith("norm"):
            tensor = tensor + 1
        data, raw = tensor.float().numpy(), None
        if tensor.ndim >= 2 and kind != "F32" and not module.endswith(ROUTERS):
            raw = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(data, raw)
        writer.add_tensor(f"{prefix}{names[module]}.{leaf}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ROUTERS = ("mlp.gate", "block_sparse_moe.gate")


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with those of all experts of a block as one, and no axis of a single row."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        if ".experts.0." in name:
            one = (name.replace(".experts.0.", f".experts.{number}.") for number in range(len(tensors)))
            of_all = [tensors[each] for each in one if each in tensors]
            found[name.replace(".experts.0.", ".experts.N.")] = torch.stack(of_all)
    return {name: tensor.squeeze() for name, tensor in found.items()}


def saved(family: str, directory: Path) -> Path:
    head = {"gemma": 16, "gemma2": 16, "gemma3": 16, "qwen3": 128}
    extra = {"head_dim": head[family]} if family in head else {}
    extra |= {"query_pre_attn_scalar": 16} if family in ("gemma2", "gemma3") else {}
    extra |= {"use_sliding_window": False} if family == "qwen2" else {}
    extra |= {"attention_bias": False} if family == "gemma" else {}
    extra |= {"mlp_only_layers": []} if family == "qwen2-moe" else {}
    extra |= {"decoder_sparse_step": 1, "head_dim": 16} if family == "qwen3-moe" else {}
    extra |= {"moe_intermediate_size": 32} if family in ("qwen2-moe", "qwen3-moe") else {}
    extra |= {"shared_expert_intermediate_size": 64} if family == "qwen2-moe" else {}
    save_folder(family, directory, **SIZES, **extra)
    return directory


MOE = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", *MOE])
def test_a_file_is_the_model_that_it_was_made_from(family, tmp_path):
    folder = saved(family, tmp_path / "hf")
    (tmp_path / "gguf").mkdir()
    write(tmp_path / "gguf/model.gguf", family, folder, "F32")
    ours, model = open_checkpoint(tmp_path / "gguf/model.gguf"), open_checkpoint(folder)
    theirs, facts = ours.config.to_dict(), model.config.to_dict()
    assert {n: v for n, v in theirs.items() if facts.get(n) != v} == {}
    assert theirs.keys() == facts.keys() and ours.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor.float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "Q8_0"),
        ("llama", "Q4_0"),
        ("llama", "F16"),
        ("qwen2", "Q8_0"),
        ("phi3", "Q8_0"),
        ("qwen2-moe", "Q8_0"),
        ("qwen3-moe", "Q4_0"),
    ],
)
def test_logits_are_those_of_transformers(family, kind, tmp_path, tokenizer_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, place = saved(family, tmp_path / "hf"), tmp_path / "gguf"
    shutil.copytree(tokenizer_dir, place)
    write(place / "model.gguf", family, folder, kind)
    model = load(place, dense=[]).model
    blocks = [one for one in model.modules() if isinstance(one, QuantizedWeight)]
    assert bool(blocks) == (kind != "F16")
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    assert model.lm_head.weight.dtype == dtype
    ids = torch.arange(40)[None] * 7 % 300
    config = AutoConfig.from_pretrained(place, gguf_file="model.gguf")
    if "moe" in family:  # transformers does not read the widths
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            setattr(config, name, getattr(model.config, name))
    theirs = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", config=config, dtype=dtype)
    if family == "phi3":  # transformers does not read the window
        theirs.config.sliding_window = model.config.sliding_window
    exact = AutoModelForCausalLM.from_config(theirs.config, dtype=torch.float32).eval()
    exact.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model.float()(ids), exact(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_every_command_takes_a_file(family, tmp_path, tokenizer_dir, alpaca_file):
    place, run = tmp_path / "gguf", tmp_path / "run"
    shutil.copytree(tokenizer_dir, place)
    write(place / "model.gguf", family, saved(family, tmp_path / "hf"), "Q8_0")
    words = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_seq_length", 64]
    words += ["--prompt_style", "plain", "--train.max_steps", 2, "--out_dir", run]
    said = succeeds("finetune/lora.py", "--checkpoint_dir", place / "model.gguf", *words).stdout
    assert "stored in 8 bits (Q8_0, GGUF) and dequantised to bfloat16" in said
    merged = tmp_path / "merged"
    said = succeeds("scripts/merge_lora.py", "--lora_path", run / "final", "--out_dir", merged).stdout
    assert "verified" in said
    succeeds("chat/base.py", "--checkpoint_dir", run / "final", "--prompt", "the fox", "--max_new_tokens", 4)
    said = json.loads(succeeds("scripts/inspect_checkpoint.py", place, "--json").stdout)
    assert "Q8_0" in said["dtypes"]


def cut_short(file: Path) -> Path:
    file.write_bytes(b"GGUF")
    return file


def test_damaged_files_are_refused_in_one_line(tmp_path):
    place = tmp_path / "gguf"
    place.mkdir()
    file = place / "model.gguf"
    write(file, "llama", saved("llama", tmp_path / "hf"), "Q8_0")
    whole = file.read_bytes()
    for size in (0, 3, 10, 40, 300, 2000, len(whole) // 2, len(whole) - 400):
        file.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match="model.gguf: .*(not a usable GGUF file|the end of the file)"
        ) as refused:
            open_checkpoint(place)
        assert "axis" not in str(refused.value), "numpy's words"
    assert "not a usable GGUF file" in fails("scripts/inspect_checkpoint.py", cut_short(tmp_path / "a.gguf"))
    file.write_bytes(whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_Q.weight"))
    with pytest.raises(CheckpointError, match="attn_Q.weight, which the architecture does not have"):
        open_checkpoint(place)
    file.write_bytes(whole)
    (place / "other.gguf").write_bytes(whole)
    with pytest.raises(CheckpointError, match="holds model.gguf and other.gguf; keep one GGUF file"):
        open_checkpoint(place)
