"""Write the directories beside this file with the code of litlora 00480d6, by its own commands, and
what it computes from them. See README.md for how to run it."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litlora.checkpoint import full_meta, open_checkpoint, write_checkpoint
from litlora.config import ModelConfig
from litlora.load import load
from litlora.model import GPT

SIZES = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
IDS = torch.arange(20).view(1, 20) * 7 % 257
DATA = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(12)]
TRAIN = [
    *"--data JSON --data.path data.json --data.val_fraction 0.2 --prompt_style plain".split(),
    *"--train.max_steps 4 --train.learning_rate 0.05 --train.max_seq_length 96".split(),
    *"--train.save_interval 0 --accelerator cpu".split(),
]


def write_tokenizer(directory: Path) -> None:
    """The 256 bytes and <|endoftext|>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["text"], trainer)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def command(old: Path, script: str, *words: str) -> None:
    subprocess.run([sys.executable, str(old / script), *words], check=True)


def main(old: Path) -> None:
    Path("data.json").write_text(json.dumps(DATA))
    write_tokenizer(Path("tokenizer"))
    torch.manual_seed(0)
    config = ModelConfig(**SIZES)
    tensors = dict(GPT(config).named_parameters())
    write_checkpoint(Path("base"), tensors, full_meta(), config, sidecars_from=Path("tokenizer"))
    lora = ["--lora.rank", "2", "--lora.targets", "all-linear"]
    command(old, "finetune/lora.py", "--checkpoint_dir", "base", "--out_dir", "run", *TRAIN, *lora)
    Path("run/final").rename("adapter")
    more = ["--lora.rank", "4", "--lora.rslora", "true", "--lora.rank_pattern", '{"v_proj": 2}']
    more += ["--lora.alpha_pattern", '{"q_proj": 3.0}', "--lora.modules_to_save", '["model.norm"]']
    command(old, "finetune/lora.py", "--checkpoint_dir", "adapter", "--out_dir", "run2", *TRAIN, *more)
    Path("run2/final").rename("second")
    command(old, "scripts/merge_lora.py", "--lora_path", "adapter", "--out_dir", "merged")
    logits, fingerprints = {}, {}
    for name in ("base", "adapter", "second", "merged"):
        fingerprints[name] = open_checkpoint(Path(name)).fingerprint
        with torch.no_grad():
            logits[name] = load(Path(name)).model(IDS)[:, -2:].contiguous()
    save_file(logits, "logits.safetensors")
    Path("fingerprints.json").write_text(json.dumps(fingerprints, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
