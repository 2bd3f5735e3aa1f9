"""Made old_run_files: an early checkpoint of a LoRA run as litlora wrote it before state.pth named
weights by the model's own names, with the run's base, data and result.

Kept as a record; to repeat it, check out the commit before that change and run

    python tests/train/old_run_files/make.py DIRECTORY
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litlora.checkpoint import full_meta, write_checkpoint
from litlora.cli import parse
from litlora.config import ModelConfig
from litlora.model import GPT
from litlora.settings import FinetuneLoRA

sys.path.insert(0, str(Path(sys.modules["litlora"].__file__).parent.parent / "finetune"))
WORDS = (
    "--prompt_style plain --lora.rank 2 --lora.targets [q_proj,v_proj,down_proj] --train.max_steps 6 "
    "--train.global_batch_size 4 --train.micro_batch_tokens 40 --train.max_seq_length 64 "
    "--train.save_interval 4 --train.eval_interval 2 --train.log_interval 3 "
    "--precision 32-true --accelerator cpu"
)


def make(out: Path) -> None:
    out.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["a"], trainer)
    (out / "tokenizer").mkdir()
    backend.save(str(out / "tokenizer/tokenizer.json"))
    (out / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    weights = dict(GPT(config).bfloat16().named_parameters())
    write_checkpoint(out / "base", weights, full_meta(), config, sidecars_from=out / "tokenizer")
    shutil.rmtree(out / "tokenizer")
    records = [{"instruction": f"Say {n}.", "output": f"{n} " * (1 + n % 5)} for n in range(24)]
    (out / "records.json").write_text(json.dumps(records))

    import lora

    words = ["--checkpoint_dir", out / "base", "--data", "JSON", "--data.path", out / "records.json"]
    words += ["--data.val_fraction", 0.2, "--out_dir", out / "run", *WORDS.split()]
    lora.main(parse(FinetuneLoRA, [str(word) for word in words]))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
