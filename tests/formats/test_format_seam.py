"""A format that the library does not know: once it is in FORMATS, every command reads it."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, tune

from litlora.adapters.describe import describe, table
from litlora.checkpoint import open_checkpoint, resolve
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats import FORMATS, Format, Outline
from litlora.formats.full import FullModel
from litlora.load import load
from litlora.lora import Adapter, LoRAConfig, Update
from litlora.paths import checkpoint_dir
from litlora.settings import Chat, MergeLoRA

IDS = torch.arange(20).view(1, 20)


class Arrays(Format):
    """`arch.json` and `weights.npz`, an array for each tensor under our names."""

    name = "arrays"

    def detect(self, directory):
        if not (directory / "arch.json").is_file():
            return False
        if not (directory / "weights.npz").is_file():
            raise CheckpointError(f"{directory}: has arch.json, but no weights.npz")
        return True

    def open(self, directory, find_base):
        file = directory / "weights.npz"
        tensors = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
        config = ModelConfig(**json.loads((directory / "arch.json").read_text()))
        return FullModel(directory, file, tensors, config).checked()


class ArraysAdapter(Format):
    """`lora.npz`, with A and B of one layer, and the name of its base in `base.txt`."""

    name = "arrays adapter"

    def detect(self, directory):
        return (directory / "lora.npz").is_file()

    def open(self, directory, find_base):
        name = (directory / "base.txt").read_text()
        layer = find_base(name, Path(name) if Path(name).is_dir() else None).config and "lm_head"
        update = self.update(directory)
        return Adapter(
            LoRAConfig(rank=2, alpha=2, targets=[layer]), {layer: update}, file=directory / "lora.npz"
        )

    def update(self, directory):
        stored = np.load(directory / "lora.npz")
        return Update(torch.from_numpy(stored["A"]), torch.from_numpy(stored["B"]))

    def outline(self, directory):
        update, base = self.update(directory), (directory / "base.txt").read_text()
        tensors = {"A": update.A, "B": update.B}
        return Outline(self.name, directory / "lora.npz", tensors, base, {"rank": 2}, {"lm_head": update})


@pytest.fixture
def arrays(base, tmp_path):
    """A directory of the toy format that holds the same model as `base`."""
    added = [Arrays(), ArraysAdapter()]
    FORMATS.extend(added)
    model = open_checkpoint(base)
    directory = tmp_path / "arrays"
    directory.mkdir()
    np.savez(directory / "weights.npz", **{name: tensor.numpy() for name, tensor in model.tensors.items()})
    (directory / "arch.json").write_text(json.dumps(model.config.to_dict()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, directory / name)
    yield directory
    for format in added:
        FORMATS.remove(format)


@pytest.fixture
def arrays_adapter(arrays, tmp_path):
    directory = tmp_path / "arrays_adapter"
    directory.mkdir()
    np.savez(directory / "lora.npz", A=np.ones((2, 32), "float32"), B=np.full((400, 2), 0.01, "float32"))
    (directory / "base.txt").write_text(str(arrays))
    return directory


def logits(directory, **options):
    with torch.no_grad():
        return load(directory, **options).model(IDS)


def command(script, settings):
    runpy.run_path(str(REPO / script))["main"](settings)


def test_it_is_the_same_model(arrays, base):
    assert open_checkpoint(arrays).fingerprint == open_checkpoint(base).fingerprint
    assert torch.equal(logits(arrays), logits(base))


def test_it_is_a_base_to_train_on_to_chat_with_and_to_merge_into(arrays, alpaca_file, tmp_path, capsys):
    tune("lora", arrays, alpaca_file, tmp_path / "run")
    adapter = tmp_path / "run/final"
    assert resolve(adapter).directories == [arrays, adapter]
    live = logits(adapter, live=True)
    assert not torch.equal(live, logits(arrays))
    capsys.readouterr()
    command("scripts/merge_lora.py", MergeLoRA(lora_path=[str(adapter)], out_dir=str(tmp_path / "merged")))
    assert "verified" in capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "merged"), live, atol=1e-5, rtol=1e-5)
    for directory in (arrays, adapter):
        words = {"prompt": "the fox", "max_new_tokens": 2, "accelerator": "cpu"}
        command("chat/base.py", Chat(checkpoint_dir=str(directory), **words))


def test_it_is_trained_whole(arrays, alpaca_file, tmp_path):
    tune("full", arrays, alpaca_file, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run/final").kind == "full"
    assert not torch.equal(logits(tmp_path / "run/final"), logits(arrays))


def test_it_is_described(arrays):
    found = describe(arrays)
    assert (found["kind"], found["format"], found["family"]) == ("full", "arrays", "llama")
    assert found["bytes"] == (arrays / "weights.npz").stat().st_size and found["problems"] == []
    assert table(found)[0] == f"{arrays}: full, arrays"


def test_a_missing_part_is_named(arrays):
    (arrays / "weights.npz").unlink()
    for use in (checkpoint_dir, open_checkpoint, resolve, describe):
        with pytest.raises(CheckpointError, match="arrays: has arch.json, but no weights.npz"):
            use(arrays)


def test_an_adapter_of_it_is_read_beside_its_base(arrays, arrays_adapter):
    chain = resolve(arrays_adapter)
    assert chain.directories == [arrays, arrays_adapter] and "by shape alone" in chain.notices[0]
    expected = logits(arrays_adapter, live=True)
    torch.testing.assert_close(logits(arrays_adapter), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(expected, logits(arrays))


def test_an_adapter_of_it_tells_what_it_can_when_its_base_is_missing(arrays, arrays_adapter, tmp_path):
    arrays.rename(tmp_path / "moved")
    found = describe(arrays_adapter)
    assert (found["format"], found["lora"], found["base"]["path"]) == (
        "arrays adapter",
        {"rank": 2},
        str(arrays),
    )
    assert "only what its own files tell" in found["problems"][0] and found["total"]["delta_norm"] > 0
    assert describe(arrays_adapter, base_dir=tmp_path / "moved")["total"]["relative"] > 0
