"""One NVIDIA GPU: what is claimed of it, measured by one command that keeps a deadline.

    python benchmarks/gpu.py --deadline 480 --out gpu.jsonl
    python benchmarks/gpu.py --device cpu --models 75m --deadline 120

Each part prints a row of JSON when it ends, and adds it to --out; a part for which too little time is
left is named in a row of its own. In this order: the machine; the rate of a matrix product and of a
copy; gradients in bf16 and fp32 against float64; whether a training step waits for the device;
training of each model, ours eager and compiled beside transformers + PEFT (`train_speed.py`,
interleaved); decoding. Copy the rows to benchmarks/LOG.md.
"""

import argparse
import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import train_speed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TRAINING = {"llama-3.1-8b": (4096, 4), "llama-3.2-1b": (4096, 8), "qwen2.5-0.5b": (4096, 8), "75m": (256, 2)}
"""Tokens of an example, and examples of a step, by model."""
NEW_TOKENS = 128
PARTS = ("machine", "ceiling", "right", "waits", "train", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deadline", type=float, default=480, help="seconds for everything")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=TRAINING, default=[*TRAINING][:3])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="a file that gets the rows, too")
    options = parser.parse_args()
    end = time.monotonic() + options.deadline
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": lambda: machine(options.device),
        "ceiling": lambda: ceiling(options.device),
        "right": lambda: right(options.device),
        "waits": lambda: waits(options.device),
    }
    for model in options.models:
        parts[f"train {model}"] = lambda model=model: train(model, options.device, end)
    for model in options.models:
        parts[f"decode {model}"] = lambda model=model: decode(model, options.device)
    for name, part in parts.items():
        if name.split()[0] not in options.parts:
            continue
        started = time.monotonic()
        row = part() if started < end else {"left out": "no time was left"}
        line = json.dumps({"part": name, **row, "seconds": round(time.monotonic() - started, 1)})
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def machine(device: str) -> dict[str, Any]:
    import torch

    row = {"torch": torch.__version__, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        row |= {"name": properties.name, "memory": properties.total_memory, "driver": driver}
        row |= {"cuda": torch.version.cuda, "processors": properties.multi_processor_count}
    return row


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def timed(compute: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """The median of some rounds, in seconds, after two that warm up."""
    seconds = []
    for _ in range(rounds + 2):
        wait(device)
        started = time.perf_counter()
        compute()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


def ceiling(device: str) -> dict[str, Any]:
    """A large product of random matrices, in bf16 on a GPU, in FLOP/s, and a copy in bytes/s, read and
    written."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    square = torch.randn(size, size, device=device, dtype=dtype)
    target = torch.empty_like(square)
    return {
        "flops": 2 * size**3 / timed(lambda: torch.mm(square, square, out=target), device),
        "bandwidth": 2 * square.nbytes / timed(lambda: target.copy_(square), device),
    }


def waits(device: str) -> dict[str, Any]:
    """Training steps of a small Llama, eager and compiled, in which CUDA raises for whatever makes the
    host wait; the first steps, which compile and allocate, may. On a CPU the steps run unwatched."""
    return {name: _watched_steps(device, compiled=name == "compiled") for name in ("eager", "compiled")}


def _watched_steps(device: str, *, compiled: bool, unwatched: int = 4, watched: int = 8) -> str:
    import torch

    from litlora.config import ModelConfig
    from litlora.data.examples import Example
    from litlora.lora import LoRAConfig, add_lora
    from litlora.model import GPT
    from litlora.report.sinks import Sinks
    from litlora.settings import TrainConfig
    from litlora.train.checkpoints import EarlyCheckpoints
    from litlora.train.compile import compile_blocks, compile_head
    from litlora.train.fit import Data, Trainer
    from litlora.train.interrupts import Interrupts
    from litlora.train.objective import SFT
    from litlora.train.parallel import Parallel

    model = GPT(ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )).to(torch.bfloat16 if device == "cuda" else torch.float32)  # fmt: skip
    add_lora(model, LoRAConfig(targets=["all-linear"]))
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 300, (8 * (unwatched + watched),), generator=generator).tolist()
    data = [
        Example(array("i", torch.randint(0, 512, (n,), generator=generator).tolist()), ((10, n),))
        for n in lengths
    ]
    config = TrainConfig(
        max_steps=unwatched + watched, global_batch_size=8, micro_batch_tokens=600, log_interval=1,
        save_interval=0, compile=compiled,
    )  # fmt: skip
    objective = SFT(model.to(device), config)
    if compiled:
        compile_blocks(model)
        compile_head(objective)
    checkpoints = EarlyCheckpoints(Path("nowhere"), lambda *_: None, keep=1, newest=None, prunes=False)
    trainer = Trainer(
        Parallel(device),
        objective,
        Data(data, []),
        config,
        checkpoints,
        sink=Sinks(),
        interrupts=Interrupts(),
    )
    step, is_gpu = trainer.train_step, device == "cuda"

    def watch(*arguments: Any) -> None:
        if is_gpu and trainer.at.step >= unwatched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(*arguments)
        finally:
            if is_gpu:
                torch.cuda.set_sync_debug_mode("default")

    trainer.train_step = watch
    try:
        done = trainer.fit()
    except RuntimeError as error:
        return f"waits in step {trainer.at.step + 1}: {str(error).splitlines()[0]}"
    return f"{done.steps - unwatched} steps {'without a wait' if is_gpu else 'unwatched'}"


def right(device: str) -> dict[str, Any]:
    """The largest relative distance of a gradient from that of float64 on the CPU, over all layers."""
    import torch

    from litlora.config import ModelConfig
    from litlora.data.batches import collate
    from litlora.data.examples import Example
    from litlora.lora import LoRAConfig, add_lora
    from litlora.model import GPT
    from litlora.train.objective import SFT

    config = ModelConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (100, 57, 33)]
    batch = collate(
        [Example(array("i", one), ((10, len(one)),)) for one in ids], mask_prompt=True, packed=True
    )

    def gradients(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = GPT(config).double()
        add_lora(model, LoRAConfig(), torch.float64)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.05)
        model = model.to(device, dtype)
        moved = type(batch)(*(part.to(device) for part in batch[:3]), *batch[3:])
        SFT(model)(moved)[0].backward()
        found = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        return {name: gradient.double().cpu() for name, gradient in found}

    exact = gradients(torch.float64, "cpu")
    return {
        str(dtype): max(
            float((gradient - exact[name]).norm() / exact[name].norm())
            for name, gradient in gradients(dtype, device).items()
        )
        for dtype in (torch.float32, torch.bfloat16)
    }


def train(model: str, device: str, end: float) -> dict[str, Any]:
    """`train_speed.py`'s own lines, LoRA of rank 16 on all linear layers."""
    length, examples = TRAINING[model]
    words = [
        sys.executable,
        train_speed.__file__,
        "--model",
        model,
        "--targets",
        "all-linear",
        "--rank",
        "16",
    ]
    words += [
        "--seq",
        str(length),
        "--lengths",
        "full",
        "--global_batch",
        str(examples),
        "--micro_batch",
        "1",
    ]
    words += ["--steps", "8", "--last", "2", "--rounds", "1", "--device", device]
    words += ["--compile"] if device == "cuda" else ["--precision", "32-true"]
    try:
        seconds = max(1.0, end - time.monotonic())
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout.decode() if stopped.stdout else ""
        return {"stopped": "the deadline came", "rows": said.splitlines()}
    return {"rows": done.stdout.splitlines(), "errors": done.stderr.splitlines()[-3:]}


def decode(model: str, device: str) -> dict[str, Any]:
    """Greedy decoding of one sequence: tokens/s, and the share of the copy's bandwidth at which the
    weights are read."""
    import torch

    from litlora.config import ModelConfig, RopeScaling
    from litlora.model import GPT
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling

    shape = dict(train_speed.SHAPES[model])
    scaling = shape.pop("rope_scaling")
    config = ModelConfig(
        **shape, **train_speed.COMMON, rope_scaling=RopeScaling(**scaling) if scaling else None
    )
    job = argparse.Namespace(precision="bf16-true" if device == "cuda" else "32-true", quick=True)
    gpt = train_speed.build(lambda: GPT(config), job, torch.device(device)).eval()
    train_speed.fill(gpt, job)
    prompt = list(range(1, 65))

    def seconds(count: int) -> float:
        engine = Engine(gpt, owns_model=True)  # a new one has computed no beginning of the prompt yet
        return timed(lambda: list(engine.generate(prompt, Sampling(max_new_tokens=count))), device, rounds=1)

    speed = (NEW_TOKENS - 1) / (seconds(NEW_TOKENS) - seconds(1))
    embedding = 0 if config.tie_word_embeddings else gpt.model.embed_tokens.weight.nbytes
    read = sum(parameter.nbytes for parameter in gpt.parameters()) - embedding
    return {
        "tokens per second": speed,
        "share of bandwidth": read * speed / (ceiling(device)["bandwidth"] / 2),
    }


if __name__ == "__main__":
    main()
