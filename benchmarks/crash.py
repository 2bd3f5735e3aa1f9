"""Kill a training run again and again, and check that nothing is ever lost.

    python benchmarks/crash.py [--kills 200] [--seed 0]

A tiny model trains with a checkpoint at every step, in a process that is killed (SIGKILL): either
after a random time, or at a random file operation in its run directory, so that the moments within
a save are covered too. After every kill, nothing incomplete has a final name, every checkpoint
opens, the newest is not older than before, and the next process continues from it. A run that
finishes must be, to the bit, the run that was never killed: in its result and its metrics. The
program prints counts, and exits with status 1 at the first failure.
"""

import argparse
import csv
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from litlora.checkpoint import open_checkpoint, write_full
from litlora.cli import parse
from litlora.config import ModelConfig
from litlora.model import GPT
from litlora.paths import FINAL, STATE_FILE, WEIGHTS_FILE
from litlora.settings import FinetuneLoRA
from litlora.storage.tensors import open_torch
from litlora.train.run_directory import step_directories, step_of

REPO = Path(__file__).parent.parent
QUICKSTART = REPO / "checkpoints/litlora/quickstart"
sys.path.insert(0, str(REPO / "finetune"))
lora = importlib.import_module("lora")
importlib.import_module("litlora.train.run")


def make_inputs(scratch: Path) -> None:
    """A base of random weights with a real tokenizer, and training records."""
    torch.manual_seed(0)
    facts = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = ModelConfig(
        vocab_size=open_checkpoint(QUICKSTART).config.vocab_size,
        head_dim=8,
        max_position_embeddings=128,
        **facts,
    )
    write_full(scratch / "base", dict(GPT(config).named_parameters()), config, sidecars_from=[QUICKSTART])
    records = [{"instruction": f"Say {n}.", "output": f"{n} " * (1 + n % 5)} for n in range(24)]
    (scratch / "records.json").write_text(json.dumps(records))


def train(scratch: Path, out: Path) -> None:
    """One process of the run: it continues from the newest checkpoint, if there is one."""
    words = (
        f"--checkpoint_dir {scratch}/base --data JSON --data.path {scratch}/records.json "
        f"--data.val_fraction 0.1 --out_dir {out} --resume auto --lora.rank 2 --lora.dropout 0.2 "
        "--train.micro_batch_size 2 --train.global_batch_size 4 --train.epochs 2 "
        "--train.save_interval 1 --train.log_interval 2 --train.eval_interval 5 --accelerator cpu"
    )
    lora.main(parse(FinetuneLoRA, words.split()))


def count_operations(below: Path, act: Callable[[int], None]) -> None:
    """Call act(1), act(2), ... before each operation of this process on files below a directory. It
    cannot be undone."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in (
            "open",
            "os.rename",
            "os.mkdir",
            "os.remove",
            "os.rmdir",
            "os.truncate",
            "shutil.rmtree",
            "shutil.copyfile",
        ):
            if str(arguments[0]).startswith(str(below)):
                seen += 1
                act(seen)

    sys.addaudithook(hook)


def child(scratch: Path, out: Path, *, die_at: int | None = None) -> int:
    """Start the run in a process of its own; returns its id. With `die_at` it kills itself before the
    file operation of that number."""
    if pid := os.fork():
        return pid
    with (scratch / "log.txt").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if die_at:
        count_operations(
            out, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == die_at else None
        )
    status = 1
    try:
        train(scratch, out)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(pid: int, log: Path) -> bool:
    """Whether a child finished, or was killed. Anything else is a failure."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a process ended with status {status}:\n{log.read_text()[-2000:]}"
    return status == 0


def check(out: Path) -> int:
    """Check that everything in a run's directory with a final name is complete; returns the step of
    the newest checkpoint, 0 for none."""
    whole = set()
    for path in out.iterdir() if out.exists() else ():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            content = open_checkpoint(path)
            assert all(tensor.isfinite().all() for tensor in content.tensors.values())
            whole.add(frozenset(file.name for file in path.iterdir()) - {STATE_FILE})
            assert path.name == FINAL or open_torch(path / STATE_FILE)["position"]["step"] == step_of(path)
    assert len(whole) <= 1, f"the checkpoints do not hold the same files: {whole}"
    steps = [step_of(path) for path in step_directories(out)]
    return 10**6 if (out / FINAL).exists() else max(steps, default=0)


def compare(out: Path, expected: Path) -> None:
    """Check that every byte of the result and all metrics but the times are as expected."""
    assert (out / FINAL / WEIGHTS_FILE).read_bytes() == (expected / FINAL / WEIGHTS_FILE).read_bytes(), (
        f"{out}: a different result"
    )
    rows, theirs = (
        list(csv.DictReader((directory / "metrics.csv").read_text().splitlines()))
        for directory in (out, expected)
    )
    for row in (*rows, *theirs):
        del row["seconds"], row["tokens_per_second"]
    assert rows == theirs, f"{out}: different metrics"
    left = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert not left, f"{out}: left behind {left}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, counts = random.Random(arguments.seed), Counter()
    torch.set_num_threads(1)  # a process with more threads cannot be forked safely
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_inputs(scratch)
        started = time.monotonic()
        assert ended(child(scratch, scratch / "expected"), scratch / "log.txt")
        whole = time.monotonic() - started
        number, newest = 0, 0
        while counts["kills"] < arguments.kills or newest:
            out = scratch / f"run{number}"
            # Once there were enough kills, the last run may finish. Loading takes longer than a
            # step, so most random times lie after it.
            sparing = counts["kills"] >= arguments.kills
            by_time = rng.random() < 0.5
            pid = child(scratch, out, die_at=None if sparing or by_time else rng.randint(1, 60))
            if by_time and not sparing:
                time.sleep(rng.uniform(0.2, 0.9) * whole)
                os.kill(pid, signal.SIGKILL)
            if ended(pid, scratch / "log.txt"):
                compare(out, scratch / "expected")
                counts["runs that finished"] += 1
                number, newest = number + 1, 0
                continue
            counts["kills"] += 1
            counts["kills after a random time" if by_time else "kills at a file operation"] += 1
            left = [path.name for path in out.glob(".*")]
            counts["kills that left something incomplete"] += bool(left)
            found = check(out)
            assert found >= newest, f"{out}: the newest checkpoint was step {newest}, and now is {found}"
            counts["kills after which there was a checkpoint to continue from"] += found > 0
            newest = found
        print(", ".join(f"{name}: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
