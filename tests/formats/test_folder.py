"""litlora/formats/folder.py: which files a model consists of."""

import json

import pytest

from litlora.errors import CheckpointError
from litlora.formats.folder import files_beside, model_files


@pytest.fixture
def folder(tmp_path):
    """A function that makes empty files, and indexes of the shards that begin alike."""

    def make(*names: str):
        for name in names:
            text = ""
            if name.endswith(".index.json"):
                stem = name.removesuffix(".safetensors.index.json")
                shards = [other for other in names if other.startswith(f"{stem}-")]
                text = json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}})
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
META = "consolidated.safetensors"
MISTRAL = ("consolidated-00001-of-00001.safetensors", "consolidated.safetensors.index.json")


@pytest.mark.parametrize("beside", [(META,), MISTRAL, ("extra.safetensors",)])
def test_an_index_decides(folder, beside):
    path = folder(INDEX, *SHARDS, *beside)
    files = model_files(path, "safetensors", "source_model")
    assert [file.name for file in files] == [*SHARDS]
    assert [file.name for file in files_beside(path, "safetensors", files)] == [beside[0]]


@pytest.mark.parametrize(
    "names",
    [
        (*SHARDS, META),
        (META, "model.safetensors"),
        (*SHARDS, "model.safetensors"),
        (*SHARDS, "other-00001-of-00002.safetensors"),
        (INDEX, *SHARDS, "model.safetensors"),
        ("a.safetensors.index.json", "a-1.safetensors", "b.safetensors.index.json", "b-1.safetensors"),
    ],
)
def test_two_copies_of_the_weights_are_refused(folder, names):
    with pytest.raises(CheckpointError, match="are two sets of weights; keep one of them"):
        model_files(folder(*names), "safetensors", "source_model")


def test_without_an_index_all_files_are_one_model(folder):
    names = ["a.safetensors", "b.safetensors", *SHARDS]
    files = model_files(folder(*names), "safetensors", "source_model")
    assert [file.name for file in files] == names
    assert model_files(folder("consolidated.00.pth"), "pytorch", "source_model")
