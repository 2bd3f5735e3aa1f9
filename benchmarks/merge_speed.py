"""How much time and memory a merge takes, compared with `cp` of the base's file and with the merges
of others.

    python benchmarks/merge_speed.py [--size small|medium|large|huge|head] [--rounds 3]
        [--peers PYTHON]

It creates a Llama of random bf16 weights and a rank-8 adapter on all linear layers, once, in a
temporary directory on the disk that TMPDIR names. Each row is a process of its own, timed from
outside until its result is on the disk (`sync -f`). The rounds are interleaved, and medians are
printed. The page cache holds the base before every row. `--peers` is a Python that has peft and
transformers: their row loads the Hugging Face folder, merges and saves. The first figure of peak
memory is that of the process's own (anonymous) pages, sampled every 10 ms. The second includes
mapped files, which stay in memory as long as nothing else needs it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from litlora.checkpoint import reference_to, write_adapter, write_full
from litlora.lora import Adapter, adapter_of
from litlora.lora.adapter import parse_tensors

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

SIZES = {  # hidden, intermediate, layers, vocabulary, layers to adapt
    "small": (512, 1408, 12, 32_000, "all-linear"),  # 71 M parameters, 143 MB
    "medium": (2048, 5632, 13, 32_000, "all-linear"),  # 0.8 B, 1.6 GB
    "large": (2048, 5632, 32, 32_000, "all-linear"),  # 1.8 B, 3.6 GB
    "huge": (3072, 8192, 25, 128_256, "all-linear"),  # 3.6 B, 7.2 GB
    "head": (8192, 1024, 1, 131_072, ["lm_head", "q_proj"]),  # an output head of 2.1 GB
}
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out)
"""


def make(directory: Path, size: str) -> None:
    """Create base/ and adapter/ of random weights. A large matrix repeats a random block, because its
    values do not matter here."""
    import torch

    from litlora.checkpoint import open_checkpoint
    from litlora.config import ModelConfig
    from litlora.lora import LoRAConfig, add_lora
    from litlora.model import GPT
    from litlora.settings import QUICKSTART

    hidden, intermediate, layers, vocabulary, targets = SIZES[size]
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    block = torch.randn(1 << 22)

    def weight(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        flat = (block * shape[-1] ** -0.5).bfloat16().repeat(-(-shape.numel() // len(block)))
        return flat[: shape.numel()].view(shape)

    model = GPT.without_weights(config)
    tensors = {name: weight(parameter.shape) for name, parameter in model.named_parameters()}
    write_full(directory / "base", tensors, config, sidecars_from=[REPO / QUICKSTART])
    del tensors
    lora = LoRAConfig(rank=8, targets=targets)
    add_lora(model, lora)
    tensors = {
        name: torch.randn(t.shape) * (t.size(1) ** -0.5 if name.endswith("A") else 0.01)
        for name, t in adapter_of(model, lora).tensors.items()
    }
    reference = reference_to(open_checkpoint(directory / "base"), directory / "adapter")
    adapter = Adapter(lora, *parse_tensors(tensors, lora), reference)
    write_adapter(directory / "adapter", adapter, config, sidecars_from=[REPO / QUICKSTART])


def run(command: list[str], directory: Path) -> tuple[float, float, float]:
    """(seconds until the result is on the disk, peak MiB of anonymous pages, of all pages)."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH")))),
    }
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL)
    own = 0
    while True:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            own = max(
                own, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0
            )
        except (OSError, TypeError):
            pass
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    subprocess.run(["sync", "-f", str(directory)], check=True)
    return time.perf_counter() - started, own / 1024, usage.ru_maxrss / 1024


def commands(place: Path, out: Path, peers: str | None) -> dict[str, list[str]]:
    """The rows of the table: a name -> the command that writes `out`."""
    adapter = str(place / "adapter")
    ours = [sys.executable, "scripts/merge_lora.py", "--lora_path", adapter, "--out_dir", str(out)]
    rows = {
        "cp": ["cp", str(place / "base/lit_model.pth"), str(out)],
        "ours, --verify false": [*ours, "--verify=false"],
        "ours": ours,
    }
    if peers:
        hf, peft = str(place / "hf"), str(place / "peft")
        convert = [
            "scripts/convert_lit_checkpoint.py",
            f"--checkpoint_dir={place / 'base'}",
            f"--out_dir={hf}",
        ]
        export = ["scripts/export_peft.py", f"--lora_path={adapter}", f"--out_dir={peft}"]
        for words in (convert, export):
            run([sys.executable, *words], place)
        rows["PEFT"] = [peers, "-c", PEFT, hf, peft, str(out)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="a Python with peft and transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        subprocess.run([sys.executable, __file__, "--make", str(place), args.size], check=True)
        base, out = place / "base/lit_model.pth", place / "out"
        rows = commands(place, out, args.peers)
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
        for _ in range(args.rounds):
            for name, command in rows.items():
                for file in (base, *(place / "hf").glob("*.safetensors")):
                    subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
                taken[name].append(run(command, place))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        print(f"base: {base.stat().st_size:,} bytes")
    report(taken)


def report(taken: dict[str, list[tuple[float, float, float]]]) -> None:
    print("| merge | seconds, median [min-max] | times cp | own MiB | with mapped files MiB |")
    print("|---|---|---|---|---|")
    copying = statistics.median(seconds for seconds, _, _ in taken["cp"])
    for name, results in taken.items():
        seconds, own, everything = zip(*results, strict=True)
        middle = statistics.median(seconds)
        row = [
            name,
            f"{middle:.2f} [{min(seconds):.2f}-{max(seconds):.2f}]",
            f"{middle / copying:.2f}",
            f"{max(own):.0f}",
            f"{max(everything):.0f}",
        ]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
