"""Does fine-tuning teach the quickstart model to answer? Exact match on the held-out instructions,
with all settings at their defaults.

    python benchmarks/quickstart_quality.py
    python benchmarks/quickstart_quality.py --json result.json --keep out/quality

It runs `finetune/lora.py`, `scripts/merge_lora.py` and `finetune/full.py` as a user does. Then it
gives every held-out instruction to the base, the live adapter, the merged model and the full model,
and compares their greedy answers letter by letter. The training sample asks nothing about the
entities of these instructions; the base has only read statements about them. The second turn gives
each instruction again after another one and its right answer, as in a chat.

The exit status is 1 if a bar is missed: base at most 5%, LoRA at least 80% and trained within two
minutes, merged equal to live in every answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HELDOUT_FILE = ROOT / "litlora" / "data" / "alpaca_sample_heldout.json"
MAX_NEW_TOKENS = 48
BASE_AT_MOST = 0.05
LORA_AT_LEAST = 0.80
LORA_SECONDS = 120.0


def run(*arguments: str) -> float:
    """Run one of the repository's commands; returns its seconds, the start of the process
    included."""
    start = time.perf_counter()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }  # installed or not
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=sys.stderr, env=environment)
    return time.perf_counter() - start


def answers(
    directory: Path, records: list[dict[str, str]], *, live: bool = False, second_turn: bool = False
) -> list[str]:
    """The greedy answers of a checkpoint; with `second_turn`, to the second of two questions."""
    from litlora.load import load
    from litlora.prompts import STYLES
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling

    loaded = load(directory, live=live)
    style = loaded.prompt_style or STYLES["alpaca"]
    tokenizer, engine = loaded.tokenizer, Engine(loaded.model, owns_model=True)

    def encoded(record: dict[str, str]) -> list[int]:
        return tokenizer.encode(style.render(record["instruction"], record["input"]), begin=True)

    texts = []
    for i, record in enumerate(records):
        history: list[int] = []
        if second_turn:
            first = records[(i * 7 + 3) % len(records)]
            history = [*encoded(first), *tokenizer.encode(first["output"]), tokenizer.eos_id]
        ids = engine.generate(
            history + encoded(record),
            Sampling(max_new_tokens=MAX_NEW_TOKENS),
            stop_ids=tokenizer.stop_ids,
        )
        texts.append(tokenizer.decode(list(ids)))
    return texts


def accuracy(given: list[str], records: list[dict[str, str]]) -> float:
    """Fraction of the answers that are right to the letter."""
    return sum(text == record["output"] for text, record in zip(given, records, strict=True)) / len(records)


def measure(keep: Path, seed: int | None) -> dict[str, Any]:
    """Train, merge, ask; returns the figures and the wrong answers of the live adapter."""
    from litlora.settings import QUICKSTART

    records = json.loads(HELDOUT_FILE.read_text(encoding="utf-8"))
    seeded = [] if seed is None else ["--seed", str(seed)]
    lora, merged, full = keep / "lora", keep / "merged", keep / "full"
    seconds = {
        "lora": run("finetune/lora.py", "--out_dir", str(lora), *seeded),
        "merge": run(
            "scripts/merge_lora.py",
            "--lora_path",
            str(lora / "final" / "lit_model.pth"),
            "--out_dir",
            str(merged),
        ),
        "full": run("finetune/full.py", "--out_dir", str(full), *seeded),
    }
    base_answers = answers(ROOT / QUICKSTART, records)
    live_answers = answers(lora / "final", records, live=True)
    merged_answers = answers(merged, records)
    full_answers = answers(full / "final", records)
    return {
        "records": len(records),
        "cores": os.cpu_count(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "exact_match": {
            "base": accuracy(base_answers, records),
            "lora_live": accuracy(live_answers, records),
            "lora_merged": accuracy(merged_answers, records),
            "full": accuracy(full_answers, records),
            "lora_second_turn": accuracy(answers(merged, records, second_turn=True), records),
        },
        "merged_differs_from_live": sum(a != b for a, b in zip(live_answers, merged_answers, strict=True)),
        "wrong": [
            {**record, "given": text}
            for text, record in zip(live_answers, records, strict=True)
            if text != record["output"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument(
        "--keep", type=Path, help="train in this new directory and keep it; default: a temporary one"
    )
    parser.add_argument("--seed", type=int, help="seed of the training; default: the commands' own")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure((args.keep or Path(scratch)).absolute(), args.seed)
    exact, seconds = result["exact_match"], result["seconds"]
    print(f"held-out instructions: {result['records']}, greedy, exact match; {result['cores']} cores")
    for name, share in exact.items():
        print(f"{name:18s} {share:6.1%}")
    print(f"answers in which merged differs from live: {result['merged_differs_from_live']}")
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    kept = (
        exact["base"] <= BASE_AT_MOST
        and exact["lora_live"] >= LORA_AT_LEAST
        and result["merged_differs_from_live"] == 0
        and seconds["lora"] <= LORA_SECONDS
    )
    print("bars kept" if kept else "A BAR IS MISSED")
    raise SystemExit(not kept)


if __name__ == "__main__":
    main()
