"""One NVIDIA GPU: what is claimed of it, measured by one command that keeps a deadline.

    python benchmarks/gpu.py --deadline 480 --out gpu.jsonl
    python benchmarks/gpu.py --device cpu --models tiny --steps 8 --deadline 300

Each part prints a row of JSON when it ends, and adds it to --out; one that the deadline breaks off, that
fails or for which no time is left is named in a row of its own. In this order: the machine; the rate of a
matrix product and of a copy; gradients in bf16 and fp32 against float64; whether a training step waits for
the device; a layer of experts, at once and one by one;
training of each model, ours eager and compiled beside transformers + PEFT (`train_speed.py`,
interleaved); the first model on a base in nf4, beside PEFT with bitsandbytes, and in fp8; how many
tokens of context fit with a base in nf4, measured on two layers and extrapolated to all; the loss after
--steps steps of a small model in bf16, nf4 and fp8 beside fp32; decoding. Copy the rows to
benchmarks/LOG.md.
"""

import argparse
import json
import os
import signal
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
TRAINING = {
    "llama-3.1-8b": (4096, 4),
    "llama-3.2-1b": (4096, 8),
    "qwen2.5-0.5b": (4096, 8),
    "75m": (256, 2),
    "tiny": (64, 2),
}
"""Tokens of an example, and examples of a step, by model."""
NEW_TOKENS = 128
LAYERS, CONTEXTS, RANK = 2, (16, 32), 16
"""Of the measured context: layers, and its lengths in examples."""
GRACE = 2.0
"""Seconds after the deadline in which the rows of an ended program are read."""
USABLE = 0.95
"""Share of a GPU's memory that a context may fill."""
PARTS = ("machine", "ceiling", "right", "waits", "experts", "train", "quantised", "context", "loss", "decode")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deadline", type=float, default=480, help="seconds for everything")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=TRAINING, default=[*TRAINING][:3])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=200, help="of the losses that are compared")
    parser.add_argument("--out", type=Path, help="a file that gets the rows, too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    end, first = time.monotonic() + options.deadline, options.models[0]
    if options.here:  # a part in a process of its own
        print(json.dumps(context(first, options.device)))
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": lambda: machine(options.device),
        "ceiling": lambda: ceiling(options.device),
        "right": lambda: right(options.device),
        "waits": lambda: waits(options.device),
        "experts": lambda: experts(options.device),
    }
    for model in options.models:
        parts[f"train {model}"] = lambda model=model: train(model, options.device, end)
    small = "tiny" if first == "tiny" else "75m"
    parts |= {
        f"quantised {first}": lambda: quantised(first, options.device, end),
        f"context {first}": lambda: context_apart(first, options.device, end),
        f"loss {small}": lambda: losses(small, options.device, options.steps, end),
    }
    for model in options.models:
        parts[f"decode {model}"] = lambda model=model: decode(model, options.device)
    for name, part in parts.items():
        if name.split()[0] not in options.parts:
            continue
        started = time.monotonic()
        row = in_time(part, end) if started < end else {"left out": "no time was left"}
        line = json.dumps({"part": name, **row, "seconds": round(time.monotonic() - started, 1)})
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class Stopped(BaseException):
    """The deadline came. Not an Exception, which what is measured may catch."""


def in_time(part: Callable[[], dict[str, Any]], end: float) -> dict[str, Any]:
    """The row of a part, or why there is none: the deadline, at which it is broken off, or an error, which
    is that part's alone."""

    def stop(*_: Any) -> None:
        raise Stopped

    signal.signal(signal.SIGALRM, stop)
    # A part that is a program ends it by itself just before, and has what it printed.
    signal.setitimer(signal.ITIMER_REAL, max(0.0, end - time.monotonic()) + GRACE)
    try:
        return part()
    except Stopped:
        return {"stopped": "the deadline came"}
    except Exception as error:
        return {"failed": type(error).__name__, "errors": str(error).splitlines()[:3]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


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


def experts(device: str) -> dict[str, Any]:
    """A layer of experts with LoRA, forward and backward: seconds at once and one by one, and how far its
    outputs and the gradient of its input at once are from those one by one. On a GPU the sizes of
    Qwen3-30B-A3B, in bf16."""
    import torch

    from litlora.config import ModelConfig
    from litlora.lora import LoRAConfig, add_lora
    from litlora.model.experts import MixtureOfExperts

    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    width, size, count, tokens = (2048, 768, 128, 4096) if cuda else (64, 32, 16, 128)
    sizes = {"hidden_size": width, "moe_intermediate_size": size, "num_experts": count}
    facts = {**train_speed.COMMON, **train_speed.SHAPES["tiny"], **sizes}
    facts |= {"num_experts_per_tok": 8, "norm_topk_prob": True}
    torch.manual_seed(0)
    layer = MixtureOfExperts(ModelConfig(**facts)).to(dtype)
    add_lora(layer, LoRAConfig(rank=RANK, targets="experts"))
    for name, parameter in layer.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.01)
    layer.to(device).experts.lay_together()
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    found, seconds = {}, {}

    def step() -> None:
        x.grad = None
        y = layer(x)
        y.backward(torch.ones_like(y))
        found[layer.experts.at_once] = torch.cat([y.detach(), x.grad]).double()

    for at_once in (True, False):
        layer.experts.at_once = at_once
        seconds["at once" if at_once else "one by one"] = timed(step, device, rounds=5)
    apart = (found[True] - found[False]).norm() / found[False].norm()
    return {"experts": count, "tokens": tokens, **seconds, "relative distance": apart.item()}


def train(model: str, device: str, end: float) -> dict[str, Any]:
    """`train_speed.py`, LoRA of rank 16 on all linear layers: ours, compiled too, and PEFT."""
    return speeds(model, device, end, *(["--compile"] if device == "cuda" else []))


def quantised(model: str, device: str, end: float) -> dict[str, Any]:
    """The same on a base in few bits. Of a base in fp8 the bar is ours in bf16, in the row of `train`."""
    return speeds(model, device, end, "--rows", "--quantize", "nf4", "fp8", "--peer_quantize", "nf4")


def speeds(model: str, device: str, end: float, *words: str) -> dict[str, Any]:
    length, examples = TRAINING[model]
    sizes = ["--seq", str(length), "--lengths", "full", "--global_batch", str(examples), "--micro_batch", "1"]
    return rows_of(["--model", model, *sizes, "--steps", "8", "--last", "2", *words], device, end)


def losses(model: str, device: str, steps: int, end: float) -> dict[str, Any]:
    """The mean loss of the last tenth of the steps, in fp32 and otherwise, and how much more it is."""
    length, _ = TRAINING[model]
    last = max(1, steps // 10)
    words = ["--model", model, "--seq", str(length), "--steps", str(steps // last * last)]
    words += ["--last", str(last), "--rows", "ours"]
    exact = rows_of([*words, "--precision", "32-true"], device, end)
    others = ["--quantize", "nf4", "fp8", *(["--compile"] if device == "cuda" else [])]
    found = rows_of([*words, *others, "--precision", "bf16-true"], device, end)
    loss = {row["row"]: row["loss"] for row in found["rows"] if "loss" in row}
    (base,) = [row["loss"] for row in exact["rows"] if "loss" in row] or [None]
    more = {name: value / base - 1 for name, value in loss.items()} if base else {}
    beside = {name: found.get(name) or exact.get(name) for name in ("errors", "stopped")}
    return {"fp32": base, "otherwise": loss, "more than fp32": more, **beside}


def rows_of(words: list[str], device: str, end: float) -> dict[str, Any]:
    """The rows of `train_speed.py`, as far as it comes until the deadline."""
    adapter = ["--targets", "all-linear", "--rank", str(RANK), "--rounds", "1", "--device", device]
    precision = [] if device == "cuda" or "--precision" in words else ["--precision", "32-true"]
    said = output([train_speed.__file__, *words, *adapter, *precision, "--json"], end)
    return {**said, "rows": [json.loads(line) for line in said["rows"]]}


def output(words: list[str], end: float) -> dict[str, Any]:
    """The lines that a program prints, and the last of its errors; at the deadline it is ended."""
    seconds = max(1.0, end - time.monotonic())
    with subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its children are ended with it
    ) as process:
        try:
            said, errors = process.communicate(timeout=seconds)
            return {"rows": said.splitlines(), "errors": errors.splitlines()[-3:]}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return {"stopped": "the deadline came", "rows": said.splitlines()}


def context_apart(model: str, device: str, end: float) -> dict[str, Any]:
    """`context` in a process of its own: its memory is its own, and it can be ended."""
    words = [__file__, "--here", "--device", device, "--models", model]
    said = output(words, end)
    return json.loads(said["rows"][-1]) if said["rows"] else said


def context(model: str, device: str) -> dict[str, Any]:
    """Tokens of one example that fit into the memory of this device: a base in nf4, LoRA, block inputs
    offloaded. Measured on two layers at two lengths, and extrapolated: the inputs of all layers are in the
    host's memory, so more layers add no more than their weights."""
    import torch

    from litlora.config import ModelConfig, RopeScaling
    from litlora.frozen.linear import stored_weights
    from litlora.lora import LoRAConfig, add_lora
    from litlora.settings import TrainConfig
    from litlora.train.activations import ROWS, block_inputs, checkpoint_activations, offloading
    from litlora.train.arena import Arena
    from litlora.train.memory import DryRun, Trial
    from litlora.train.objective import SFT

    shape = dict(train_speed.SHAPES[model])
    layers, scaling = shape["num_hidden_layers"], shape.pop("rope_scaling")
    lengths = [count * TRAINING[model][0] for count in CONTEXTS]
    rope = RopeScaling(**scaling) if scaling else None
    config = ModelConfig(
        **shape | {"num_hidden_layers": LAYERS}, max_position_embeddings=lengths[-1], rope_scaling=rope
    )
    precision = "bf16-true" if device == "cuda" else "32-true"
    job = argparse.Namespace(precision=precision, quick=True, hold="nf4")
    gpt = train_speed.quantised_on(torch.device(device), config, job)
    add_lora(gpt, LoRAConfig(rank=RANK, targets=["all-linear"]))
    checkpoint_activations(gpt, "full", ROWS)
    arena = Arena(block_inputs(gpt, lengths[-1]), torch.device(device))
    objective = SFT(gpt.to(device), TrainConfig(), [lambda: offloading(gpt, arena)]).train()
    run, peaks = DryRun(objective, torch.device(device)), []
    for length in (lengths[0], *lengths):  # the first warms up
        batch = objective.batch([example_of(length, config.vocab_size)], torch.device(device))
        run.begin()
        peaks.append(run.peak(Trial(batch, [length], length - 1, packed=True)))
    del peaks[0]
    row = {"layers": LAYERS, "tokens": lengths, "peak beyond the weights": peaks}
    if None in peaks:
        return row | {"stopped": "out of memory"}
    a_token = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    inside = sum(weight.nbytes for weight in stored_weights(gpt).values())
    # Of an adapter: itself, its gradient and AdamW's two moments.
    inside += 4 * sum(p.nbytes for p in gpt.parameters() if p.requires_grad)
    weights = inside * layers // LAYERS + sum(p.nbytes for p in gpt.parameters() if not p.requires_grad)
    row |= {"bytes a token": a_token, "weights of all layers": weights, "extrapolated": f"to {layers} layers"}
    if device == "cuda" and a_token > 0:
        memory = torch.cuda.get_device_properties(0).total_memory
        for_tokens = USABLE * memory - weights - (peaks[0] - a_token * lengths[0])
        row["tokens that fit"] = fits = int(for_tokens / a_token)
        row["host memory for them"] = fits * (layers + 2) * config.hidden_size * gpt.like.dtype.itemsize
    return row


def example_of(length: int, vocab_size: int) -> Any:
    """One of so many random tokens, all learned but the first."""
    import torch

    from litlora.data.examples import Example

    ids = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    return Example(array("i", ids.tolist()), ((1, length),))


def decode(model: str, device: str) -> dict[str, Any]:
    """Greedy decoding of one sequence, waiting for each token, ahead of it, and by a compiled step:
    tokens/s, the share of the copy's bandwidth at which the weights are read, and how many of the tokens
    come before the first that is another one than in step."""
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

    def speed(**how: bool) -> tuple[float, list[int]]:
        engine = Engine(gpt, owns_model=True, **how)

        def answer(count: int) -> list[int]:
            return [*engine.generate(prompt, Sampling(max_new_tokens=count))]

        def seconds(count: int) -> float:  # after the first round, the prompt is not computed again
            return timed(lambda: answer(count), device, rounds=1)

        return (NEW_TOKENS - 1) / (seconds(NEW_TOKENS) - seconds(1)), answer(NEW_TOKENS)

    found = {"in step": speed(ahead=False), "ahead": speed(ahead=True)}
    if device == "cuda":
        found["compiled"] = speed(compiled=True)
    embedding = 0 if config.tie_word_embeddings else gpt.model.embed_tokens.weight.nbytes
    read = sum(parameter.nbytes for parameter in gpt.parameters()) - embedding
    rate = ceiling(device)["bandwidth"] / 2
    return {
        "tokens per second": {how: speed for how, (speed, _) in found.items()},
        "share of bandwidth": {how: read * speed / rate for how, (speed, _) in found.items()},
        "tokens before another than in step": {
            how: alike(ids, found["in step"][1]) for how, (_, ids) in found.items()
        },
    }


def alike(ids: list[int], others: list[int]) -> int:
    """How many tokens two answers begin with alike."""
    return next((n for n, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other), len(ids))


if __name__ == "__main__":
    main()
