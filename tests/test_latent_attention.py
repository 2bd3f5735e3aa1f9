"""Multi-head latent attention, beyond its parity with transformers (tests/formats/test_families.py)."""

import json
import shutil

import pytest
import torch
from conftest import succeeds
from families import save_folder
from safetensors.torch import load_file, save_file

from litlora.checkpoint import open_checkpoint
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.families.example import example_config
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT, KVCache


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_live_adapter_counts_where_one_token_is_computed(variant, tmp_path):
    """Which reads the weight of kv_b_proj and does not call it."""
    save_folder("deepseek-v3", tmp_path)
    source = open_checkpoint(tmp_path)
    model = GPT.from_tensors(source.config, source.tensors)
    ids = torch.randint(96, (1, 12))
    before = model(ids)
    add_lora(model, LoRAConfig(rank=4, targets=["kv_b_proj"], variant=variant))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))
    whole = model.eval()(ids)
    cache = KVCache(model.config, 1, 12, dtype=torch.float32, device=ids.device)
    pieces = torch.cat([model(piece, cache) for piece in ids.split([5, 1, 1, 1, 3, 1], dim=1)], dim=1)
    assert (whole - before).abs().max() > 0.1 and (pieces - whole).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_head_dim": None}, "must be set together"),
        ({"sliding_window": 4}, "sliding_window with kv_lora_rank"),
        ({"qk_norm": "head"}, "needs heads without norms"),
        ({"mscale_all_dim": 1.0}, "needs a rope_scaling with a factor"),
        ({"n_group": 3}, r"n_group \(3\) and topk_group \(1\) do not fit 4 experts"),
        ({"topk_group": None}, "n_group and topk_group must be set together"),
        ({"num_experts_per_tok": 3}, "more than the experts of topk_group"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(changes, message):
    facts = example_config("deepseek_v3").to_dict() | changes
    with pytest.raises(CheckpointError, match=message):
        ModelConfig(**facts)


@pytest.mark.slow
def test_a_full_fine_tune_keeps_what_corrects_the_router(tmp_path, tokenizer_dir, alpaca_file):
    """In fp32, whatever the precision, in a base in bf16; and so does its export."""
    base, run = tmp_path / "base", tmp_path / "run"
    save_folder("deepseek-v3", base, vocab_size=400, max_position_embeddings=256)
    tensors = load_file(base / "model.safetensors")
    tensors = {n: t if n.endswith("correction_bias") else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, base)
    words = [
        "--data",
        "JSON",
        "--data.path",
        alpaca_file,
        "--train.max_steps",
        2,
        "--precision",
        "bf16-mixed",
    ]
    succeeds("finetune/full.py", "--checkpoint_dir", base, "--out_dir", run, *words)
    succeeds(
        "scripts/convert_lit_checkpoint.py", "--checkpoint_dir", run / "final", "--out_dir", tmp_path / "hf"
    )
    after = load_file(tmp_path / "hf/model.safetensors")
    assert after.keys() == tensors.keys()
    kept = {name for name, tensor in tensors.items() if torch.equal(tensor, after[name])}
    corrections = {name for name in tensors if name.endswith("correction_bias")}
    assert corrections and corrections <= kept and len(kept) < len(tensors) / 2
    assert json.loads((tmp_path / "hf/config.json").read_text())["n_group"] == 2
