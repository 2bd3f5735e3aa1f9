r"""A base that stays in its file (--stream_base) beside the same base in memory: processor time and
seconds of a step, peak memory, and whether all gradients are the same to the bit.

    python benchmarks/stream_speed.py --base /tmp/base --dtype fp32 --rounds 3
    python benchmarks/stream_speed.py --base /tmp/base --dtype fp32 --disk
    python benchmarks/stream_speed.py --base /tmp/base --dtype fp32 --what decode

The base is made in --base if it is not there: random weights with the proportions of Llama 3.2, by
default 605 M parameters in blocks (24 layers, hidden 1,536). Its copies run side by side as processes
of their own, which take turns step by step, so that what else the machine does meets both alike. A
step is forward and backward of a pack with LoRA on q and v, and activations computed again; for
decode it is one token of an answer. --disk runs the streamed row alone, and drops every page of the
file from the page cache as it is released: each pass then reads the disk.

Peak memory is VmHWM, the most that was ever resident, pages of the mapped file included: a process
whose VmHWM stays below a limit would also run in a control group of that limit.
"""

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
ROWS = ("memory", "streamed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="directory of the base; made if absent")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the file")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="of the computation; default: --dtype")
    parser.add_argument("--what", choices=["train", "decode"], default="train")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=512, help="of a pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = args.precision or args.dtype
    return args


def make_base(args: argparse.Namespace) -> None:
    """Random weights, written a tensor at a time."""
    import torch

    from litlora.checkpoint import write_full
    from litlora.config import ModelConfig
    from litlora.model import GPT

    config = ModelConfig(
        vocab_size=32000, hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 192, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    dtype = dtype_of(args.dtype)
    names = dict(GPT.without_weights(config).named_parameters())
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(p.shape, dtype=dtype)
        if p.dim() == 1
        else torch.empty(p.shape, dtype=dtype).normal_(std=0.02, generator=generator)
        for name, p in names.items()
    }
    quickstart = REPO / "checkpoints/litlora/quickstart"  # its tokenizer, whose ids are small
    write_full(args.base, weights, config, sidecars_from=[quickstart])


def dtype_of(name: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


# ---- a row: answers each line of its input by one step


def run_row(args: argparse.Namespace) -> None:
    import torch

    from litlora.checkpoint import resolve
    from litlora.load import load_chain
    from litlora.train.precision import cast

    if args.disk:
        drop_from_cache(args.base / "lit_model.pth")
    loaded = load_chain(resolve(args.base), stream=args.row == "streamed")
    model = loaded.model
    cast(model, dtype_of(args.precision))
    step = (trainer if args.what == "train" else decoder)(model, args)
    facts = {"loaded": status("VmHWM:"), "anonymous": status("RssAnon:")}
    if loaded.stream is not None:
        size = 2 * loaded.stream.nbytes + loaded.stream.head_bytes
        facts |= {"speed": loaded.stream.speed, "bytes": size}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        digest = step()
        result = {
            "seconds": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "digest": digest,
            "peak": status("VmHWM:"),
            "threads": torch.get_num_threads(),
        }
        print(json.dumps(result), flush=True)


def trainer(model: Any, args: argparse.Namespace) -> Any:
    import torch

    from litlora.data.batches import Batch
    from litlora.lora import LoRAConfig, add_lora
    from litlora.settings import TrainConfig
    from litlora.train.activations import checkpoint_activations
    from litlora.train.objective import SFT

    torch.manual_seed(0)
    add_lora(model, LoRAConfig(targets="qv"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.02)
    checkpoint_activations(model.train(), "full")
    objective, n = SFT(model, TrainConfig()), args.tokens
    ids = torch.randint(0, model.config.vocab_size, (1, n))
    batch = Batch(ids, torch.arange(n // 2, n - 1), ids[0, n // 2 + 1 :], [n])

    def step() -> str:
        loss, _ = objective(batch)
        loss.backward()
        digest = hashlib.sha256(loss.detach().numpy().tobytes())
        for parameter in model.parameters():
            if parameter.grad is not None:
                digest.update(parameter.grad.numpy().tobytes())
                parameter.grad = None
        return digest.hexdigest()

    return step


def decoder(model: Any, args: argparse.Namespace) -> Any:
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling

    tokens = Engine(model).generate([1, 2, 3], Sampling(max_new_tokens=args.rounds + 4))
    return lambda: str(next(tokens))


def drop_from_cache(file: Path) -> None:
    """Drop a file from the page cache now, and each of its pages as it is released."""
    from litlora.storage import pages

    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    maps = []

    def release(tensor: Any) -> None:
        kept(tensor)
        if not maps:
            for line in Path("/proc/self/maps").read_text().splitlines():
                words = line.split(maxsplit=5)
                if len(words) == 6 and words[5] == str(file):
                    first, last = (int(word, 16) for word in words[0].split("-"))
                    maps.append((first, last, int(words[2], 16)))
        address = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        for first, last, offset in maps:
            if first <= address < last:
                start = offset + address - first
                os.posix_fadvise(handle, start, tensor.nbytes + mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)

    kept, pages.release = pages.release, release
    from litlora import streaming
    from litlora.frozen import streamed

    streaming.release = streamed.release = release


def status(field: str) -> int:
    """A field of the process's status, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


# ---- the driver


def main() -> None:
    args = arguments()
    if not args.base.is_dir():
        # In a process of its own, whose memory is gone afterwards.
        if (child := os.fork()) == 0:
            make_base(args)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, "the base could not be made"
        ctypes.CDLL(None).sync()
    if args.row:
        run_row(args)
        return
    size = (args.base / "lit_model.pth").stat().st_size
    rows = {row: start(row) for row in (ROWS[1:] if args.disk else ROWS)}
    facts = {row: json.loads(process.stdout.readline()) for row, process in rows.items()}
    print(facts, flush=True)
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    warmup = int(args.what == "decode")  # whose first step is the prompt
    for turn in range(args.rounds + warmup):
        for row, process in rows.items():
            process.stdin.write("step\n")
            process.stdin.flush()
            result = json.loads(process.stdout.readline())
            if turn >= warmup:
                results[row].append(result)
                print(f"{row}: {result['seconds']:.2f} s, processor {result['processor']:.2f} s", flush=True)
    for process in rows.values():
        process.stdin.close()
        process.wait()
    report(args, size, facts, results)


def start(row: str) -> subprocess.Popen:
    words = [sys.executable, __file__, *sys.argv[1:], "--row", row]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def report(args: argparse.Namespace, size: int, facts: dict, results: dict) -> None:
    speed = facts["streamed"]["speed"] / 1e9
    print(
        f"{args.what}, file {args.dtype} of {size / 1e9:.2f} GB, a quarter of it {size / 4 / 2**20:.0f} MiB; "
        f"computed in {args.precision}, {args.tokens} tokens; read at {speed:.2f} GB/s when loaded"
    )
    median = {}
    for row, found in results.items():
        median[row] = {
            name: statistics.median(one[name] for one in found) for name in ("seconds", "processor")
        }
        peak = max(one["peak"] for one in found) / 2**20
        print(
            f"{row:9} {median[row]['seconds']:.2f} s, processor {median[row]['processor']:.2f} s, "
            f"peak {peak:,.0f} MiB ({peak * 2**20 / size:.2f} of the file), {found[0]['threads']} threads"
        )
    if not args.disk:
        shares = [a["processor"] / b["processor"] for a, b in zip(*results.values(), strict=True)]
        walls = [a["seconds"] / b["seconds"] for a, b in zip(*results.values(), strict=True)]
        equal = all(a["digest"] == b["digest"] for a, b in zip(*results.values(), strict=True))
        print(
            f"speed beside memory: {statistics.median(shares):.3f} by processor time, "
            f"{statistics.median(walls):.3f} by the clock; bits {'equal' if equal else 'DIFFER'}"
        )


if __name__ == "__main__":
    main()
