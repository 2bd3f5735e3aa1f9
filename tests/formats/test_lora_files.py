"""LoRA files of other tools: an update means what its own tool takes it for, and is written back as
it was read."""

import json

import pytest
import torch
from conftest import random_adapter, succeeds
from safetensors.torch import load_file, save_file
from torch import nn

from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError
from litlora.formats.lora_files import LoRAFile, Update, read_lora, write_lora
from litlora.settings import LoRAConfig
from litlora.storage.atomic import replacing_file
from litlora.storage.tensors import SafetensorsWriter


def delta(update: Update) -> torch.Tensor:
    """What is added to the weight."""
    return update.added_to(torch.zeros(update.shape))


def pair(module: str, rank: int = 3, parts=("lora_down", "lora_up")) -> dict[str, torch.Tensor]:
    return {
        f"{module}.{parts[0]}.weight": torch.randn(rank, 10),
        f"{module}.{parts[1]}.weight": torch.randn(8, rank),
    }


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 10), "out": nn.Linear(10, 6)})
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(6)


@pytest.fixture(
    params=[{}, {"use_rslora": True}, {"rank_pattern": {"block.out": 2}, "alpha_pattern": {"conv": 9}}],
    ids=str,
)
def peft_folder(request, tmp_path):
    """(folder, the model that PEFT saved it from)"""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["embed", "block.proj", "block.out", "conv"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=targets,
        modules_to_save=["norm"],
        init_lora_weights=False,
        **request.param,
    )
    model = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        model.base_model.model.norm.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_peft_folder_adds_what_peft_adds(peft_folder):
    folder, model = peft_folder
    for path in (folder, folder / "adapter_model.safetensors"):
        lora = read_lora(path)
        assert len(lora.updates) == 4
        for name, update in lora.updates.items():
            wanted = model.get_submodule(name).get_delta_weight("default")
            assert update.shape == wanted.shape
            torch.testing.assert_close(delta(update), wanted)
        assert torch.equal(lora.whole["base_model.model.norm.weight"], torch.full((6,), 2.0))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_loads_what_is_written_back(peft_folder, tmp_path):
    peft = pytest.importorskip("peft")
    folder, model = peft_folder
    lora = read_lora(folder)
    write_lora(tmp_path / "again", lora, torch.float32)
    assert (
        load_file(tmp_path / "again/adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )
    again = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "again"))
    for name in lora.updates:
        torch.testing.assert_close(
            again.get_submodule(name).get_delta_weight("default"), delta(lora.updates[name])
        )
    assert torch.equal(again.base_model.model.norm.modules_to_save["default"].weight, torch.full((6,), 2.0))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_alpha_counts_and_is_written_back(tmp_path, suffix):
    tensors = pair("lora_unet_a_b") | {
        "lora_unet_a_b.alpha": torch.tensor(1.5),
        "lora_unet_c.diff": torch.randn(4),
    }
    file = tmp_path / f"kohya{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    lora = read_lora(file)
    update = lora.updates["lora_unet_a_b"]
    assert update.scale == 0.5 and lora.alpha
    wanted = 0.5 * tensors["lora_unet_a_b.lora_up.weight"] @ tensors["lora_unet_a_b.lora_down.weight"]
    torch.testing.assert_close(delta(update), wanted)
    write_lora(tmp_path / "again.safetensors", lora, torch.float32)
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("parts", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_a_format_without_alpha_keeps_its_spelling_and_has_the_scale_in_b(tmp_path, parts):
    save_file(pair("diffusion_model.x", parts=parts), tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    update = lora.updates["diffusion_model.x"]
    assert update.scale == 1
    write_lora(
        tmp_path / "b.safetensors",
        LoRAFile(lora.path, {"x": Update(update.A, update.B, 0.3)}, parts=lora.parts),
        torch.float32,
    )
    assert load_file(tmp_path / "b.safetensors").keys() == {f"x.{parts[0]}.weight", f"x.{parts[1]}.weight"}
    torch.testing.assert_close(delta(read_lora(tmp_path / "b.safetensors").updates["x"]), 0.3 * delta(update))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4.0, 301.7, 1e9, 1e-9])
def test_an_alpha_beyond_the_dtype_is_stored_in_fp32_and_the_factors_stay(tmp_path, alpha, dtype):
    A, B = torch.randn(3, 4).to(dtype), torch.randn(4, 3).to(dtype)
    write_lora(
        tmp_path / "a.safetensors", LoRAFile(tmp_path, {"x": Update(A, B, alpha / 3)}, alpha=True), dtype
    )
    assert load_file(tmp_path / "a.safetensors")["x.alpha"].dtype == (dtype if alpha == 4 else torch.float32)
    stored = read_lora(tmp_path / "a.safetensors").updates["x"]
    assert (
        stored.scale == pytest.approx(alpha / 3, rel=1e-7)
        and torch.equal(stored.A, A)
        and torch.equal(stored.B, B)
    )


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_8_bits_are_read_as_16_exactly(tmp_path, kind):
    tensors = {name: tensor.to(kind) for name, tensor in pair("x").items()}
    save_file(tensors, tmp_path / "a.safetensors")
    update = read_lora(tmp_path / "a.safetensors").updates["x"]
    for part, name in ((update.A, "x.lora_down.weight"), (update.B, "x.lora_up.weight")):
        assert part.dtype == torch.float16 and torch.equal(part.float(), tensors[name].float())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"x.lora_up.weight": torch.ones(4, 2)}, "only one of its two factors"),
        (
            {"x.lora_up.weight": torch.ones(4, 2), "x.lora_down.weight": torch.ones(3, 4)},
            "do not form an update",
        ),
        (
            {"x.lora_up.weight": torch.ones(4, 0), "x.lora_down.weight": torch.ones(0, 4)},
            "do not form an update",
        ),
        (
            {"x.lora_up.weight": torch.ones(0, 2), "x.lora_down.weight": torch.ones(2, 4)},
            "do not form an update",
        ),
        (
            {"x.lora_up.weight": torch.ones(4, 2), "x.lora_down.weight": torch.ones(2, 0)},
            "do not form an update",
        ),
        ({"x.lora_up.weight": torch.ones(4), "x.lora_down.weight": torch.ones(4)}, "do not form an update"),
        (
            {"x.lora_up.weight": torch.ones(4, 2, 3, 3), "x.lora_down.weight": torch.ones(2, 4, 3, 3)},
            "do not form an update",
        ),
        (
            {"x.lora_up.weight": torch.ones(4, 2).int(), "x.lora_down.weight": torch.ones(2, 4).int()},
            "do not form an update",
        ),
        ({**pair("x"), "x.alpha": torch.tensor(float("nan"))}, "x.alpha must be"),
        ({**pair("x"), "x.alpha": torch.ones(3)}, "x.alpha must be"),
        ({**pair("x"), "y.alpha": torch.tensor(1.0)}, "y.alpha: unrecognised key"),
        ({"other": torch.ones(3)}, "other: unrecognised key"),
        ({}, "holds no tensors"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=says) as raised:
        read_lora(tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(raised.value) and "\n" not in str(raised.value)


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path):
    save_file(pair("base_model.model.x", 3, ("lora_A", "lora_B")), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(CheckpointError, match="has rank 3"):
        read_lora(tmp_path)


def test_the_writer_writes_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.arange(3),
        "b": torch.tensor(1.5),
        "ü": torch.randn(2, 0),
        "c": torch.randn(3, 5).bfloat16().T,
    }
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, [*tensors, "never added"]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert (
        all(torch.equal(read, tensors[name]) for name, read in load_file(file).items())
        and load_file(file).keys() == tensors.keys()
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_file(file) as staging:
        staging.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]
    with replacing_file(file) as staging:
        staging.write_text("new")
    assert file.read_text() == "new" and [*tmp_path.iterdir()] == [file]


def test_litloras_own_adapter_is_read_with_its_scale(tmp_path, base):
    config = LoRAConfig(rank=2, alpha=10, targets=["q_proj"])
    adapter = random_adapter(tmp_path / "own", base, config)
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(base).tensors.items()}
    save_file(tensors, tmp_path / "base.safetensors")
    for path in (adapter, adapter / "lit_model.pth"):
        words = ["--source-model", tmp_path / "base.safetensors", "--lora-model", path]
        words += ["--output", tmp_path / "out", "--output_dtype", "fp32"]
        said = succeeds("scripts/lora_merger.py", *words)
        assert f"was trained on {base}; whether the model is that one is not checked here" in str(said)
        merged = load_file(tmp_path / "out.safetensors")
        for name, W in tensors.items():
            wanted, layer = W.double(), name.removesuffix(".weight")
            if update := open_checkpoint(adapter).updates.get(layer):
                wanted = wanted + 5 * update.B.double() @ update.A.double()
            torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="is a full model"):
        read_lora(base)
