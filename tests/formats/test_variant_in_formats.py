"""A variant of LoRA that the library does not know: our format holds it, every other refuses it by
name."""

import runpy
import shutil

import pytest
import torch
from conftest import REPO, random_adapter
from torch import nn

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import CheckpointError
from litlora.load import build, load
from litlora.lora import VARIANTS, LoRAConfig, Variant
from litlora.settings import Chat, CombineLoRA, ExportPEFT, MergeLoRA, ResizeLoRA

IDS = torch.arange(20).view(1, 20)


class Gained(Variant):
    """W' = W + s · diag(g) B A, with a learned gain g for each output."""

    name = "gained"
    extra = ("lora_gain",)

    def start(self, layer):
        super().start(layer)
        layer.lora_gain = nn.Parameter(torch.ones(layer.out_features, dtype=layer.lora_B.dtype))

    def change(self, update, before, rows):
        gain = update.extra["lora_gain"][rows, None].to(before.dtype)
        return gain * super().change(update, before, rows)


@pytest.fixture(autouse=True)
def gained():
    VARIANTS["gained"] = Gained()
    yield
    VARIANTS.pop("gained", None)


@pytest.fixture
def adapter(base, tmp_path):
    config = LoRAConfig(rank=2, variant="gained", modules_to_save=["model.norm"])
    return random_adapter(tmp_path / "adapter", base, config)


def command(script, settings):
    runpy.run_path(str(REPO / script))["main"](settings)


def test_the_file_holds_what_the_variant_adds(adapter):
    opened = open_checkpoint(adapter)
    assert opened.config.variant == opened.settings["variant"] == "gained"
    assert all(update.extra["lora_gain"].shape == update.shape[:1] for update in opened.updates.values())
    stored = torch.load(adapter / "lit_model.pth", weights_only=True)["model"]
    assert stored.keys() == opened.tensors.keys()
    assert sum(name.endswith(".lora_gain") for name in stored) == len(opened.updates) == 14


def test_live_and_merged_in_memory_and_on_disk_agree(adapter, base, tmp_path, capsys):
    with torch.no_grad():
        live = load(adapter, live=True).model(IDS)
        tensors, config = merge_chain(resolve(adapter))
        merged = build(config, tensors, open_checkpoint(base)).eval()(IDS)
        plain = load(base).model(IDS)
    torch.testing.assert_close(merged, live, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-2)
    command("scripts/merge_lora.py", MergeLoRA(lora_path=[str(adapter)], out_dir=str(tmp_path / "merged")))
    said = capsys.readouterr().out
    assert "verified" in said and "not verified" not in said
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "merged").model(IDS), merged)
    assert open_checkpoint(tmp_path / "merged").answers_to(open_checkpoint(adapter).fingerprint)


def test_chat_uses_it(adapter, tmp_path, capsys):
    command("scripts/merge_lora.py", MergeLoRA(lora_path=[str(adapter)], out_dir=str(tmp_path / "merged")))
    capsys.readouterr()
    answers = []
    for directory in (adapter, tmp_path / "merged"):
        words = {"prompt": "the fox", "max_new_tokens": 8, "temperature": 0.0, "accelerator": "cpu"}
        command("chat/base.py", Chat(checkpoint_dir=str(directory), **words))
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("scripts/export_peft.py", lambda paths, out: ExportPEFT(lora_path=paths[0], out_dir=out)),
        ("scripts/resize_lora.py", lambda paths, out: ResizeLoRA(lora_path=paths[0], out_dir=out, rank=1)),
        ("scripts/combine_lora.py", lambda paths, out: CombineLoRA(lora_path=paths, out_dir=out)),
    ],
    ids=["export", "resize", "combine"],
)
def test_what_cannot_hold_it_refuses_it_by_its_name(script, settings, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="variant gained"):
        command(script, settings([str(adapter), str(copy)], str(tmp_path / "out")))
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_of_an_unknown_variant_is_refused_by_its_name(adapter):
    del VARIANTS["gained"]
    with pytest.raises(CheckpointError, match=r"adapter/lit_model\.pth: .*variant gained: .*lora"):
        open_checkpoint(adapter)


def test_a_missing_tensor_of_the_variant_is_named(adapter):
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    name = next(name for name in content["model"] if name.endswith(".lora_gain"))
    del content["model"][name]
    torch.save(content, adapter / "lit_model.pth")
    with pytest.raises(CheckpointError, match=rf"{name.rpartition('.')[0]} has no lora_gain"):
        open_checkpoint(adapter)


def test_a_tensor_that_the_variant_does_not_have_is_named(adapter):
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    del content["litlora"]["lora"]["variant"]
    torch.save(content, adapter / "lit_model.pth")
    with pytest.raises(CheckpointError, match="has lora_gain, which no update of the kind lora has"):
        open_checkpoint(adapter)


def test_an_unknown_setting_in_a_file_is_refused_by_its_name(adapter):
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    content["litlora"]["lora"]["use_something_new"] = True
    torch.save(content, adapter / "lit_model.pth")
    with pytest.raises(CheckpointError, match=r"adapter/lit_model\.pth: .*use_something_new"):
        open_checkpoint(adapter)
