"""The memory of each process of a run on a CPU, sampled while it runs.

    python benchmarks/resident_memory.py DIR --devices 1 2 4 [OPTION OF finetune/lora.py ...]
    python benchmarks/resident_memory.py DIR --load nf4 nf4-dq int8 fp8

DIR gets a base of random weights in fp32, of 520 MiB in 8 blocks, and an adapter on all its linear
layers. Of each run, with fsdp where there are several devices, it prints the most
that a process held at once: in memory of its own, and in pages of files, which all processes of a
machine share. With --load it trains nothing: it loads the base, in bf16, with its blocks in few bits,
and prints what that added to a process, and what it took meanwhile.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
QUICKSTART = REPO / "checkpoints/litlora/quickstart"
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 2048}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
STEPS = ("--train.max_steps", 2, "--train.global_batch_size", 4, "--train.micro_batch_tokens", 128)
STEPS += (
    "--train.max_seq_length",
    128,
    "--data.max_examples",
    8,
    "--train.save_interval",
    0,
    "--data.val_fraction",
    0,
    "--prompt_style",
    "plain",
)
STEPS += ("--train.checkpoint_activations", "full", "--precision", "32-true", "--accelerator", "cpu")
KINDS = ("nf4", "nf4-dq", "int8", "fp8")
"""What --load takes."""


def make_base(directory: Path, dtype: str = "float32") -> None:
    import torch

    from litlora.checkpoint import write_full
    from litlora.config import ModelConfig
    from litlora.model import GPT

    torch.manual_seed(0)
    config = ModelConfig(**SHAPE, max_position_embeddings=1024, tie_word_embeddings=True)
    model = GPT(config).to(getattr(torch, dtype))
    write_full(directory, dict(model.named_parameters()), config, sidecars_from=[QUICKSTART])


def make_adapter(directory: Path, base: Path) -> None:
    import torch

    from litlora.checkpoint import Beside, reference_to, resolve, write_adapter
    from litlora.load import load
    from litlora.lora import LoRAConfig, adapter_of, add_lora
    from litlora.prompts import load_style

    chain, model = resolve(base), load(base).model
    config = LoRAConfig(targets="all-linear")
    for name in add_lora(model, config):
        torch.nn.init.normal_(model.get_submodule(name).lora_B, std=0.01)
    adapter = dataclasses.replace(adapter_of(model, config), base=reference_to(chain.top, directory))
    style = load_style(base)
    write_adapter(directory, adapter, chain.config, sidecars_from=chain.sources, beside=Beside(style))


def started(words: list[object]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(REPO / "finetune/lora.py"), *map(str, words)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ranks_of(pid: int) -> dict[int, int]:
    """{rank: process} of a run that is started by this process."""
    found = {0: pid}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"LOCAL_RANK="):
                found[int(entry.partition(b"=")[2])] = int(child)
    return found


def held(pid: int) -> tuple[int, int]:
    """The KiB of a process's own memory, and of pages of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return sizes["RssAnon:"], sizes["RssFile:"]


def peaks(words: list[object]) -> dict[int, list[int]]:
    """{rank: the most KiB of its own, and of files} of a run."""
    process, most = started(words), {}
    while process.poll() is None:
        try:
            for rank, pid in ranks_of(process.pid).items():
                most[rank] = [max(pair) for pair in zip(most.get(rank, (0, 0)), held(pid), strict=True)]
        except (OSError, KeyError):  # one of them has just ended
            continue
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return most


def load_once(base: Path, kind: str) -> None:
    """Print what loading the base in `kind` takes, in KiB, as JSON; for a process of its own."""
    from litlora.frozen.linear import stored_weights
    from litlora.load import load

    load(QUICKSTART, quantize=kind)  # what is imported, and kept, once
    before, most, ended = held(os.getpid()), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], sum(held(os.getpid())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load(base, quantize=kind)
    ended.set()
    watcher.join()
    after, weights = held(os.getpid()), stored_weights(loaded.model).values()
    print(
        json.dumps(
            {
                "own": after[0] - before[0],
                "files": after[1] - before[1],
                "peak": most[0] - sum(before),
                "tensors": sum(weight.nbytes for weight in weights) // 1024,
                "bf16": sum(weight.shape.numel() for weight in weights) * 2 // 1024,
            }
        )
    )


def report_loading(base: Path, kinds: list[str]) -> None:
    print("| blocks in | tensors, MiB | own memory | of bf16's | own and pages of files | peak |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        words = [sys.executable, __file__, str(base), "--load_once", kind]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        done = subprocess.run(words, stdout=subprocess.PIPE, env=environment, check=True)
        found = json.loads(done.stdout)
        mib = {name: f"{size / 1024:.1f}" for name, size in found.items()}
        print(
            f"| {kind} | {mib['tensors']} | {mib['own']} | {found['own'] / found['bf16']:.3f} "
            f"| {(found['own'] + found['files']) / 1024:.1f} | {mib['peak']} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--load", nargs="+", choices=KINDS, help="load the base in these kinds, and train nothing"
    )
    parser.add_argument("--load_once", help=argparse.SUPPRESS)
    settings, options = parser.parse_known_args()
    if settings.load_once:
        load_once(settings.directory, settings.load_once)
        return
    if settings.load:
        base = settings.directory / "base-bf16"
        if not base.exists():
            make_base(base, "bfloat16")
        report_loading(base, settings.load)
        return
    base, adapter = settings.directory / "base", settings.directory / "adapter"
    if not base.exists():
        make_base(base)
    if not adapter.exists():
        make_adapter(adapter, base)
    for name, place, more in (
        ("the program, on a base of 3 MiB", QUICKSTART, ()),
        ("base", base, ()),
        ("base in nf4", base, ("--quantize", "nf4")),
        ("base with an adapter", adapter, ()),
    ):
        for devices in settings.devices:
            out = settings.directory / "out"
            words = ["--checkpoint_dir", place, "--out_dir", out, *STEPS, *more, "--devices", devices]
            found = peaks([*words, *(("--strategy", "fsdp") if devices > 1 else ()), *options])
            shutil.rmtree(out)
            own, files = (
                ", ".join(f"{found[rank][part] / 1024:.0f}" for rank in sorted(found)) for part in (0, 1)
            )
            print(f"{name}, {devices} processes: own MiB {own}; files MiB {files}", flush=True)


if __name__ == "__main__":
    main()
