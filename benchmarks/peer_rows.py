r"""Print our rows for a benchmark driver that runs every program as a black box, next to LitGPT,
PEFT and TRL.

    python benchmarks/peer_rows.py > ours.json
    python3 run.py --work W --bin PEERS/bin --rows ours.json \
        --only 'train/bf16-qv/(ours|peft-loop|trl-padding-free)'

The driver creates `{work}` (a Llama of 74.7 M parameters and 992 Alpaca records) and fills in
`{out}` and `{scratch}`. Each row trains rank 8 with 4 examples a step, cut to 512 tokens, for as
many steps as the peers' rows.
"""

import json
import shlex
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STEP = r"step (?P<i>\d+)/\d+ \| loss (?P<loss>[\d.]+|nan) \| lr \S+ \| (?P<tokens>\d+) tokens"


def train(targets: str, steps: int, checkpoint: str, precision: str = "bf16-true", pack: int = 512) -> dict:
    settings = {
        "checkpoint_dir": checkpoint,
        "precision": precision,
        "data": "JSON",
        "data.path": "{work}/data/train_ordered.json",
        "data.val_fraction": 0,
        "out_dir": "{out}",
        "lora.targets": targets,
        "lora.dropout": 0.05,
        "train.global_batch_size": 4,
        "train.max_seq_length": 512,
        "train.micro_batch_tokens": pack,  # the peers' micro-batch of 4 has up to 2,048
        "train.max_steps": steps,
        "train.warmup_steps": 5,
        "train.weight_decay": 0.01,
        "train.max_grad_norm": 0,
        "train.min_lr_ratio": 0,
        "train.log_interval": 1,
        "train.save_interval": 0,
    }
    words = [
        sys.executable,
        str(REPO / "finetune/lora.py"),
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    return {
        "cmd": shlex.join(words),
        "step_re": STEP,
        "warmup": 5 if steps == 45 else 3,
        "fresh": ["{out}"],
        "size": {"adapter_bytes": "{out}/final/lit_model.pth"},
    }


def merge(setting: str) -> dict:
    lora = f"{{scratch}}/train-{setting}-ours/final/lit_model.pth"
    words = [sys.executable, str(REPO / "scripts/merge_lora.py"), "--lora_path", lora, "--out_dir", "{out}"]
    return {"cmd": shlex.join(words), "fresh": ["{out}"], "size": {"merged_bytes": "{out}/lit_model.pth"}}


def generate(checkpoint: str) -> dict:
    script, adapter = str(REPO / "benchmarks/generate_speed.py"), "{scratch}/train-bf16-qv-ours/final"
    words = [sys.executable, script, "--checkpoint_dir", checkpoint, "--adapter_dir", adapter]
    kept = {"tok_s": "[\\d.]+ s ([\\d.]+) tok/s", "prefill_ms": ".* prefill ([\\d.]+) ms"}
    keep = {
        f"{name}_{what}": f"GEN {name} {regex}"
        for name in ("base", "adapter")
        for what, regex in kept.items()
    }
    return {"cmd": shlex.join(words), "keep": keep}


def main() -> None:
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else "{work}/hf"
    rows = {
        "train": {
            "bf16-qv": train("qv", 45, checkpoint),
            "bf16-all": train("all-linear", 13, checkpoint),
            "fp32-qv": train("qv", 9, checkpoint, "32-true", pack=1024),
        },
        "generate": {"bf16": generate(checkpoint)},
        "merge": {"bf16-qv": merge("bf16-qv"), "bf16-all": merge("bf16-all")},
    }
    print(json.dumps({"ours": rows}, indent=1))


if __name__ == "__main__":
    main()
