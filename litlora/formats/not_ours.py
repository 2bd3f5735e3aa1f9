"""What a path that is not a checkpoint directory is instead, and what to do about it. Torch-free."""

import re
from pathlib import Path

WITHIN = ("final", "*", "snapshots/*")
"""Where a checkpoint lies in a directory that is mistaken for it: a run's result, a named adapter,
a snapshot in the hub's cache."""
KINDS = (
    (
        ("model_index.json",),
        "is a diffusers pipeline, not a language model; scripts/lora_merger.py and "
        "scripts/lora_extractor.py work on its safetensors files",
    ),
    (
        ("consolidated.*.pth", "consolidated*.safetensors", "params.json"),
        "holds a model in its maker's own layout; use its Hugging Face folder, with config.json and "
        "model*.safetensors",
    ),
    (("*.onnx",), "holds ONNX files, which are not read; use the Hugging Face folder of the model"),
    (
        ("tf_model.h5", "flax_model.msgpack"),
        "holds weights of TensorFlow or Flax, which are not read; use *.safetensors or pytorch_model*.bin",
    ),
    (
        ("adapter_model.safetensors", "adapter_model.bin"),
        "holds a PEFT adapter without its adapter_config.json; copy that file too",
    ),
    (
        ("*.safetensors", "pytorch_model*.bin"),
        "holds weights, but no config.json, which says what model they are; copy that file too (LoRA "
        "files are for scripts/lora_merger.py)",
    ),
    (("*.distcp", ".metadata"), "holds the shards of a training run; save the model from that run first"),
    (("tokenizer.json", "tokenizer.model"), "holds a tokenizer, but no weights; copy the model too"),
    (
        ("*.jsonl", "*.parquet", "*.csv"),
        "holds data, not a model; data goes to {data}",
    ),
)
"""(patterns of file names, what such a directory is), the first that matches counts."""


def instead(directory: Path, data: str) -> str | None:
    """What a directory without a format is; None if it is nothing known. `data` names the setting
    for data."""
    for patterns, what in KINDS:
        if any(next(directory.glob(pattern), None) for pattern in patterns):
            return what.format(data=data)
    return None


def inner_directories(directory: Path) -> list[Path]:
    """Directories in which the checkpoint may lie that was meant, the likeliest first."""
    found = [path for pattern in WITHIN for path in sorted(directory.glob(pattern)) if path.is_dir()]
    return list(dict.fromkeys(found))


def hub_name(path: Path) -> str | None:
    """The path as the name of a repository on the hub, OWNER/NAME, if it looks like one."""
    text = path.as_posix()
    part = r"[A-Za-z0-9][\w.-]*"
    is_name = re.fullmatch(rf"(?!out/|checkpoints/){part}/(?!final$|step-){part}", text)
    return text if is_name and not path.parent.is_dir() else None
