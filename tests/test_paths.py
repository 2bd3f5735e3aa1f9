"""A wrong path gets a line that says what is there and what would work."""

import json
from pathlib import Path

import pytest

from litlora.errors import CheckpointError, UserError
from litlora.paths import checkpoint_dir, output_dir, output_file
from litlora.train.run_directory import run_directory


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(path: object) -> str:
    with pytest.raises(CheckpointError) as raised:
        checkpoint_dir(path)
    return str(raised.value)


def touch(*names: str) -> None:
    for name in map(Path, names):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(json.dumps({"model_type": "llama", "peft_type": "LORA"}))


def test_a_name_of_the_hub():
    said = refusal("meta-llama/Llama-3.2-1B")
    assert "python scripts/download.py meta-llama/Llama-3.2-1B" in said
    assert "then use checkpoints/meta-llama/Llama-3.2-1B" in said
    touch("checkpoints/meta-llama/Llama-3.2-1B/config.json")
    touch("checkpoints/meta-llama/Llama-3.2-1B/model.safetensors")
    assert "did you mean checkpoints/meta-llama/Llama-3.2-1B?" in refusal("meta-llama/Llama-3.2-1B")
    for path in ("nowhere", "out/lora", "run/final", "a/b/c", "/a/b", "../a"):
        assert "hub" not in refusal(path)


def test_a_result_that_is_not_there_yet():
    assert "a run of finetune/lora.py or finetune/full.py writes it" in refusal("out/lora/alpaca/final")
    touch("out/step-000002/lit_model.pth", "out/step-000010/lit_model.pth")
    assert "its newest checkpoint is out/step-000010" in refusal("out/final")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("consolidated.00.pth", "its maker's own layout"),
        ("model_index.json", "is a diffusers pipeline"),
        ("onnx.onnx", "ONNX files"),
        ("tf_model.h5", "TensorFlow or Flax"),
        ("adapter_model.safetensors", "without its adapter_config.json"),
        ("model-00001-of-00002.safetensors", "no config.json"),
        ("tokenizer.json", "a tokenizer, but no weights"),
        ("data.parquet", "data goes to data"),
        ("thesis.tex", "it has no lit_model.pth and no config.json"),
        ("config.json", "has a config.json but no weights"),
    ],
)
def test_what_a_directory_is_instead(name, says):
    touch(f"it/{name}")
    assert says in refusal("it")


@pytest.mark.parametrize("inner", ["mine", "final", "snapshots/0123", "checkpoint-500"])
def test_the_directory_above_the_checkpoint(inner):
    touch(f"it/{inner}/adapter_config.json", f"it/{inner}/adapter_model.safetensors", "it/README.md")
    assert f"did you mean it/{inner}?" in refusal("it")


def test_many_checkpoints_in_one_directory():
    for number in range(12):
        touch(f"it/{number:02}/adapter_config.json", f"it/{number:02}/adapter_model.safetensors")
    assert "did you mean it/00 (or it/01, it/02, it/03, it/04, it/05, it/06 and 5 more)?" in refusal("it")


def test_a_file_instead_of_its_directory():
    touch("b/model.gguf", "b/config.json", "b/model.safetensors", "b/notes.txt", "style.safetensors")
    assert "lies beside another checkpoint" in refusal("b/model.gguf")
    assert refusal("b/notes.txt").endswith("a checkpoint directory is needed: b")
    assert "LoRA files of other tools are for scripts/lora_merger.py" in refusal("style.safetensors")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "prompt_style.yaml", "model.safetensors", "adapter_model.safetensors"]
)
def test_a_part_that_is_not_a_file_is_not_taken_for_missing(name):
    """Without it another file would be used, such as the base's tokenizer."""
    touch("model/config.json", "model/pytorch_model.bin")
    checkpoint_dir("model")
    part = Path("model") / name
    part.symlink_to("nowhere")
    assert refusal("model") == f"{part}: is a link that leads nowhere; copy the file, or remove the link"
    part.unlink()
    part.symlink_to(part.name)
    assert f"{part}: is a link that leads nowhere" in refusal("model")
    part.unlink()
    part.mkdir()
    assert f"{part}: it is a directory, not a file" in refusal("model")


def test_an_output_below_a_link_that_leads_nowhere():
    for link, target in (("circle", "circle"), ("gone", "nowhere")):
        Path(link).symlink_to(target)
        for path in (link, f"{link}/inner/deeper"):
            says = f"out_dir {path}: .*{link} is a link that leads nowhere; remove it"
            with pytest.raises(UserError, match=says):
                output_dir(path, overwrite=True, names=(), inputs=[Path()])
            with pytest.raises(UserError, match=says):
                run_directory(path, "out", overwrite=False, resume=None, inputs=[Path()])
            with pytest.raises(UserError, match=says.replace("out_dir", "output")):
                output_file(path, ("",), inputs=[Path()])
