"""Adapters of mlx-lm are used in place: W + scale · (lora_a lora_b)^T."""

import json
import shutil

import pytest
import torch
from conftest import fails, random_adapter, succeeds
from families import save_folder
from safetensors.torch import load_file, save_file

from litlora.adapters.describe import describe
from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import CheckpointError
from litlora.settings import LoRAConfig

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def adapter(tmp_path, base):
    """The directory of an adapter as mlx-lm writes it."""
    directory = tmp_path / "mlx"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in LAYERS:
        out, size = open_checkpoint(base).tensors[f"{name}.weight"].shape
        tensors[f"{name}.lora_a"] = torch.randn(size, 4, generator=generator)
        tensors[f"{name}.lora_b"] = torch.randn(4, out, generator=generator)
    save_file(tensors, directory / "adapters.safetensors")
    config = {"model": str(base), "fine_tune_type": "lora", "num_layers": 2}
    config["lora_parameters"] = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def expected(base, adapter) -> dict[str, torch.Tensor]:
    tensors, found = load_file(adapter / "adapters.safetensors"), {}
    for name, W in open_checkpoint(base).tensors.items():
        layer = name.removesuffix(".weight")
        found[name] = W.double()
        if layer in LAYERS:
            found[name] += 20 * (tensors[f"{layer}.lora_a"].double() @ tensors[f"{layer}.lora_b"].double()).T
    return found


@pytest.mark.parametrize("file", ["", "adapters.safetensors"])
def test_it_is_merged_into_the_base_that_it_names(base, adapter, tmp_path, file):
    succeeds("scripts/merge_lora.py", "--lora_path", adapter / file, "--out_dir", tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out").tensors
    for name, wanted in expected(base, adapter).items():
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-4)
    assert merge_chain(resolve(adapter))[0].keys() == merged.keys()


def test_it_is_merged_into_a_models_files(base, adapter, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(base).tensors.items()}
    save_file(tensors, tmp_path / "base.safetensors")
    words = ["--source-model", tmp_path / "base.safetensors", "--lora-model", adapter]
    succeeds("scripts/lora_merger.py", *words, "--output", tmp_path / "out", "--output_dtype", "fp32")
    merged = load_file(tmp_path / "out.safetensors")
    for name, wanted in expected(base, adapter).items():
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-4)


def test_inspect_shows_it_with_and_without_its_base(base, adapter):
    shown = describe(adapter)
    assert shown["format"] == "MLX" and [layer["scale"] for layer in shown["layers"]] == [20.0, 20.0]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"model": "nobody/nothing"}))
    shown = describe(adapter)
    assert shown["format"] == "MLX" and shown["base"]["path"] == "nobody/nothing"
    assert [layer["scale"] for layer in shown["layers"]] == [20.0, 20.0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type 'full' is not supported, lora and dora are; fuse it"),
        ({"fine_tune_type": "dora"}, "has no lora_magnitude_vector, but adapter_config.json has use_dora"),
        ({"lora_parameters": None}, "lacks lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": 2.0, "alpha": 8}}, "states alpha"),
        ({"lora_parameters": {"rank": 4, "scale": 0}}, "scale is 0"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0}}, "says rank 8"),
    ],
    ids=str,
)
def test_what_would_mean_something_else_is_refused(adapter, changes, says):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(adapter)


@pytest.mark.parametrize("key", ["model.layers.0.mlp.up_proj.m", "x.weight"])
def test_tensors_of_other_kinds_are_refused(adapter, key):
    tensors = load_file(adapter / "adapters.safetensors")
    save_file(tensors | {key: torch.ones(4, 4)}, adapter / "adapters.safetensors")
    with pytest.raises(CheckpointError, match=f"{key}: only .* supported"):
        open_checkpoint(adapter)


def fused(W, name: str, tensors: dict, scale: float) -> torch.Tensor:
    """The weight of a layer as mlx-lm's `fuse` computes it."""
    a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
    is_embedding = name.endswith("embed_tokens")
    whole = W.double() + scale * (a @ b if is_embedding else (a @ b).T)
    if (m := tensors.get(f"{name}.m")) is None:
        return whole
    return (m.double() / whole.norm(dim=1))[:, None] * whole


@pytest.mark.slow
@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_and_dora_are_fused_as_in_mlx(is_dora, is_tied, tmp_path):
    base, tensors = make_base(tmp_path / "base", tie_word_embeddings=is_tied), {}
    for name in ("model.embed_tokens", *LAYERS):
        rows, columns = base[f"{name}.weight"].shape
        rows, columns = (columns, rows) if name.endswith("embed_tokens") else (rows, columns)
        tensors |= {f"{name}.lora_a": torch.randn(columns, 4), f"{name}.lora_b": torch.randn(4, rows)}
        if is_dora:
            tensors[f"{name}.m"] = torch.rand(len(base[f"{name}.weight"]))
    write_mlx(tmp_path, tensors, "dora" if is_dora else "lora")
    merged, _ = merge_chain(resolve(tmp_path / "mlx"))
    succeeds("scripts/merge_lora.py", "--lora_path", tmp_path / "mlx", "--out_dir", tmp_path / "out")
    words = ["--source-model", tmp_path / "base/model.safetensors", "--lora-model", tmp_path / "mlx"]
    succeeds("scripts/lora_merger.py", *words, "--output", tmp_path / "out", "--output_dtype", "fp32")
    in_files = load_file(tmp_path / "out.safetensors")
    assert merged.keys() - in_files.keys() <= {"lm_head.weight"}
    for name, W in base.items():
        layer = name.removesuffix(".weight")
        wanted = fused(W, layer, tensors, 2.5) if f"{layer}.lora_a" in tensors else W.double()
        for found in (merged, in_files):
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-5)
    if is_tied:  # MLX's as_linear computes with the same update
        head = merged.get("lm_head.weight", merged["model.embed_tokens.weight"])
        torch.testing.assert_close(head, merged["model.embed_tokens.weight"])


MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_experts_are_fused_as_in_mlx(family, tmp_path):
    settings = MOE | {"num_experts": 3} if family == "qwen2_moe" else {"num_local_experts": 3}
    base = make_base(tmp_path / "base", family, **settings)
    place = "mlp" if family == "qwen2_moe" else "block_sparse_moe"
    leaves = ("gate_proj", "down_proj") if family == "qwen2_moe" else ("w1", "w2")
    switch = f"model.layers.1.{place}"
    tensors, wanted = {}, {name: W.double() for name, W in base.items()}
    for leaf, theirs in zip(("gate_proj", "down_proj"), leaves, strict=True):
        rows, columns = base[f"{switch}.experts.0.{theirs}.weight"].shape
        a, b = torch.randn(3, 4, columns), torch.randn(3, rows, 4)
        tensors |= {f"{switch}.switch_mlp.{leaf}.lora_a": a, f"{switch}.switch_mlp.{leaf}.lora_b": b}
        for expert in range(3):
            change = 2.5 * b[expert].double() @ a[expert].double()
            wanted[f"{switch}.experts.{expert}.{theirs}.weight"] += change
    gate = {f"{switch}.gate.lora_a": torch.randn(16, 4), f"{switch}.gate.lora_b": torch.randn(4, 3)}
    wanted[f"{switch}.gate.weight"] = fused(base[f"{switch}.gate.weight"], f"{switch}.gate", gate, 2.5)
    write_mlx(tmp_path, tensors | gate, "lora")
    succeeds("scripts/merge_lora.py", "--lora_path", tmp_path / "mlx", "--out_dir", tmp_path / "merged")
    succeeds(
        *("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", tmp_path / "merged"),
        *("--out_dir", tmp_path / "hf"),
    )
    words = ["--source-model", tmp_path / "base/model.safetensors", "--lora-model", tmp_path / "mlx"]
    succeeds("scripts/lora_merger.py", *words, "--output", tmp_path / "out", "--output_dtype", "fp32")
    for file in (tmp_path / "out.safetensors", tmp_path / "hf/model.safetensors"):
        for name, tensor in load_file(file).items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-5)


def make_base(directory, family: str = "llama", **settings) -> dict[str, torch.Tensor]:
    """A random model of transformers in a folder, with a small tokenizer; its tensors."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes, intermediate_size=24, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))
    backend.add_special_tokens(["<eos>"])
    backend.save(str(directory / "tokenizer.json"))
    return load_file(directory / "model.safetensors")


def write_mlx(directory, tensors: dict[str, torch.Tensor], kind: str) -> None:
    (directory / "mlx").mkdir()
    save_file(tensors, directory / "mlx/adapters.safetensors")
    config = {"model": str(directory / "base"), "fine_tune_type": kind, "num_layers": 2}
    config["lora_parameters"] = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    (directory / "mlx/adapter_config.json").write_text(json.dumps(config))


def test_a_broken_config_is_one_line(adapter):
    (adapter / "adapter_config.json").write_text("[1]")
    assert "adapter_config.json" in fails("scripts/inspect_checkpoint.py", adapter)


def test_an_adapter_is_exported_with_one_rank_and_one_scale(base, tmp_path):
    layers = {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.self_attn.q_proj": 4}
    config = LoRAConfig(
        rank=4, alpha=8, targets=["q_proj"], rank_pattern={"model.layers.0.self_attn.q_proj": 2}
    )
    own = random_adapter(tmp_path / "own", base, config)
    words = ["--lora_path", own, "--format", "mlx", "--out_dir", tmp_path / "mlx"]
    succeeds("scripts/export_peft.py", *words)
    stated = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    parameters, tensors = stated["lora_parameters"], load_file(tmp_path / "mlx/adapters.safetensors")
    assert parameters["keys"] == ["self_attn.q_proj"] and parameters["rank"] == 4
    scale = parameters["scale"]
    for name, rank in layers.items():
        update = open_checkpoint(own).updates[name]
        assert update.rank == rank and tensors[f"{name}.lora_a"].shape == (update.A.size(1), 4)
        wanted = 8 / rank * update.B.double() @ update.A.double()
        found = scale * (tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double()).T
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    merged, wanted = (merge_chain(resolve(path))[0] for path in (tmp_path / "mlx", own))
    for name in wanted:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-5, atol=1e-5)


def export(own, tmp_path) -> dict:
    """What export_peft writes, and that it merges to what the adapter does; its config."""
    words = ["--lora_path", own, "--format", "mlx", "--out_dir", tmp_path / "exported"]
    succeeds("scripts/export_peft.py", *words)
    found, wanted = (merge_chain(resolve(path))[0] for path in (tmp_path / "exported", own))
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    return json.loads((tmp_path / "exported/adapter_config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "first"), [("lora", "embed_tokens"), ("dora", "q_proj")])
def test_embeddings_and_dora_are_exported(variant, first, tmp_path):
    make_base(tmp_path / "base", tie_word_embeddings=False)
    config = LoRAConfig(rank=4, alpha=8, targets=[first, "lm_head", "down_proj"], variant=variant)
    stated = export(random_adapter(tmp_path / "own", tmp_path / "base", config), tmp_path)
    name = "model.embed_tokens" if variant == "lora" else "self_attn.q_proj"
    assert sorted(stated["lora_parameters"]["keys"]) == sorted(["lm_head", "mlp.down_proj", name])
    assert stated["fine_tune_type"] == variant


@pytest.mark.slow
def test_what_a_tied_head_shares_decides_whether_it_is_exported(tmp_path):
    """What mlx-lm reads as both is written back; an update of the embedding alone is another thing."""
    base, rows = make_base(tmp_path / "base", tie_word_embeddings=True), "model.embed_tokens"
    tokens, width = base[f"{rows}.weight"].shape
    write_mlx(
        tmp_path, {f"{rows}.lora_a": torch.randn(tokens, 4), f"{rows}.lora_b": torch.randn(4, width)}, "lora"
    )
    assert export(tmp_path / "mlx", tmp_path)["lora_parameters"]["keys"] == [rows]
    config = LoRAConfig(rank=4, alpha=8, targets=["embed_tokens"])
    own = random_adapter(tmp_path / "own", tmp_path / "base", config)
    words = ["--lora_path", own, "--format", "mlx", "--out_dir", tmp_path / "not"]
    assert "the output head of this base has the embedding's update" in fails(
        "scripts/export_peft.py", *words
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_experts_are_exported(family, tmp_path):
    settings = MOE | {"num_experts": 3} if family == "qwen2_moe" else {"num_local_experts": 3}
    make_base(tmp_path / "base", family, **settings)
    targets = ["model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.experts.2.up_proj", "v_proj"]
    config = LoRAConfig(rank=4, alpha=8, targets=targets, rank_pattern={targets[0]: 2})
    stated = export(random_adapter(tmp_path / "own", tmp_path / "base", config), tmp_path)
    place = "mlp" if family == "qwen2_moe" else "block_sparse_moe"
    assert f"{place}.switch_mlp.up_proj" in stated["lora_parameters"]["keys"]
    stored = load_file(tmp_path / "exported/adapters.safetensors")
    a, b = (stored[f"model.layers.1.{place}.switch_mlp.up_proj.lora_{part}"] for part in "ab")
    assert a.shape[:2] == (3, 4) and b.shape[2] == 4 and not b[1].any() and b[2].any()


def test_what_mlx_cannot_hold_is_not_exported(base, tmp_path):
    config = LoRAConfig(rank=2, alpha=2, targets=["q_proj"], modules_to_save=["model.norm"])
    own = random_adapter(tmp_path / "own", base, config)
    words = ["--lora_path", own, "--format", "mlx", "--out_dir", tmp_path / "mlx"]
    assert "an MLX folder holds only LoRA and DoRA of the layers" in fails("scripts/export_peft.py", *words)
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("family", "target"), [("gpt-oss", r".*experts\.1\.up_proj"), ("deepseek-v3", "kv_b_proj")]
)
def test_what_mlx_calls_otherwise_is_not_exported(family, target, tmp_path, tokenizer_dir):
    save_folder(family, tmp_path / "base", vocab_size=400)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "base")
    own = random_adapter(tmp_path / "own", tmp_path / "base", LoRAConfig(rank=2, alpha=2, targets=[target]))
    words = ["--lora_path", own, "--format", "mlx", "--out_dir", tmp_path / "mlx"]
    assert "what mlx-lm calls it is not known here" in fails("scripts/export_peft.py", *words)
