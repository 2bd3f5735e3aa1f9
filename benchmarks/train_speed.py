"""LoRA training beside transformers + PEFT: useful tokens/s, peak memory, final loss, time to the
first step; on the CPU or a GPU.

python benchmarks/train_speed.py --model 75m --targets qv --rank 8 --seq 512 --rounds 3 python
benchmarks/train_speed.py --model llama-3.1-8b --targets all-linear --rank 16 --seq 4096 --lengths
full --micro_batch 1 python benchmarks/train_speed.py --rows ours --without supervised_logits

Every run is a process of its own, rounds are interleaved (ours, PEFT, ours, PEFT, ...), and a row
is its medians. All get the same weights (random, filled by name, on the device), the same adapter,
examples, steps, learning rates, optimizer and precision; what differs is how they compute. PEFT
cuts the examples of a step into padded micro-batches as they come. Tokens count once, padding
never; the time runs from the end of the warm-up steps to the end of the last one. Another Python
for the peer: --peer_python.
"""

import argparse
import importlib
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
LLAMA3 = {
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES = {  # in the words of a Hugging Face config.json
    "75m": {
        "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None,
    },
    "llama-3.2-1b": {
        **LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": {**LLAMA3["rope_scaling"], "factor": 32.0},
    },
    "llama-3.1-8b": {
        **LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "rope_scaling": {**LLAMA3["rope_scaling"], "factor": 8.0},
    },
}  # fmt: skip
COMMON = {"max_position_embeddings": 8192}
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LEARNING_RATE = 1e-3
SEED = 1337


# ---- what ours can do without, for --without


def all_logits() -> dict[str, Any]:
    """Logits and loss at every position, learned or not."""
    import torch.nn.functional as F

    from litlora.train.objective import SupervisedLoss

    def forward(self: Any, input_ids: Any, positions: Any, targets: Any, lengths: Any = None) -> Any:
        logits = self.model.logits(self.model.model(input_ids, lengths=lengths)).flatten(0, 1)  # (N, V)
        labels = targets.new_full((len(logits),), -100).index_copy(0, positions, targets)
        return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")

    SupervisedLoss.forward = forward
    return {}


def plain(module: str, *names: str) -> Callable[[], dict[str, Any]]:
    """Calls of these functions of a module of kernels run their plain twins, which are called
    plain_NAME."""

    def replace() -> dict[str, Any]:
        home = importlib.import_module(module)
        for name in names:
            fused, twin = getattr(home, name), getattr(home, f"plain_{name}")
            for other in [other for place, other in sys.modules.items() if place.startswith("litlora")]:
                if other.__dict__.get(name) is fused:  # at home, and where it was imported by name
                    setattr(other, name, twin)
        return {}

    return replace


ABLATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "packing": lambda: {"packing": False},
    "supervised_logits": all_logits,
    "fused_loss": plain("litlora.kernels.cross_entropy", "head_loss"),
    "fused_lora": plain("litlora.kernels.lora", "project", "gated_mlp"),
    "fused_norm": plain("litlora.kernels.norm", "rms_norm"),
    "fused_attention": plain("litlora.kernels.attention", "packed_attention"),
}
"""A name for --without -> what switches it off: it changes the library from outside and returns
other settings of the training."""


# ---- the same for all: weights, data, the clock


def weight_name(name: str) -> str:
    """A parameter's name in either program -> the same name."""
    for part in ("base_model.model.", ".base_layer", ".default", ".linear"):
        name = name.replace(part, "", 1)
    return name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")


def fill(model: Any) -> None:
    """The same random weights for the same names, made where they are used; A uniform as PEFT and
    ours draw it, B zero."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = weight_name(name)
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            if name.endswith("lora_A"):
                bound = parameter.size(1) ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("lora_B"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)


def make_examples(job: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt): a third is prompt; ids by a steep law, so that there is
    something to learn.

    alpaca: lengths log-normal about a median of 80, as instruction data has them, cut to --seq;
    full: all of --seq.
    """
    rng = random.Random(SEED)
    vocab_size, examples = SHAPES[job.model]["vocab_size"], []
    for _ in range(job.steps * job.global_batch):
        length = (
            job.seq
            if job.lengths == "full"
            else max(8, min(job.seq, round(rng.lognormvariate(math.log(80), 0.7))))
        )
        examples.append(([int(vocab_size * rng.random() ** 3) for _ in range(length)], length // 3))
    return examples


class Clock:
    """Times optimizer steps from outside, the same in both programs. Waits for the device only
    where a time is read."""

    def __init__(self, job: argparse.Namespace, device: Any) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.steps, self.first, self.warm, self.last = 0, math.nan, math.nan, math.nan
        self._job, self._device = job, device
        register_optimizer_step_post_hook(lambda *_: self._step())

    def _step(self) -> None:
        import torch

        self.steps += 1
        if self.steps not in (1, self._job.warmup, self._job.steps):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = time.time()
        if self.steps == 1:
            self.first = now - self._job.started
        if self.steps == self._job.warmup:
            self.warm = now
        if self.steps == self._job.steps:
            self.last = now

    def result(self, data: dict[str, Any], loss: float) -> dict[str, Any]:
        import torch

        assert self.steps == self._job.steps, (self.steps, self._job.steps)
        seconds = self.last - self.warm
        timed = [index for step in data["steps"][self._job.warmup : self._job.steps] for index in step]
        cuda = self._device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated()
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        lengths = [(len(data["examples"][index][0]), data["examples"][index][1]) for index in timed]
        return {
            "tokens_per_second": sum(length for length, _ in lengths) / seconds,
            "flops_per_second": sum(needed_flops(self._job, length, prompt) for length, prompt in lengths)
            / seconds,
            "peak": peak,
            "loss": loss,
            "first_step": self.first,
            "versions": f"torch {torch.__version__}, Python {sys.version.split()[0]}",
        }


def needed_flops(job: argparse.Namespace, length: int, prompt: int) -> float:
    """What an example cannot do without: products with the frozen layers forward and back, with the
    head where something is learned, attention below the diagonal, the adapters' three products. No
    weight gradient of what is frozen, no padding."""
    shape = SHAPES[job.model]
    C, inner, D = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * D, shape["num_key_value_heads"] * D
    sizes = {"q_proj": (C, q), "k_proj": (C, kv), "v_proj": (C, kv), "o_proj": (q, C), "gate_proj": (C, inner), "up_proj": (C, inner),
             "down_proj": (inner, C)}  # fmt: skip
    frozen = sum(rows * columns for rows, columns in sizes.values())
    adapters = sum(job.rank * sum(sizes[name]) for name in TARGETS[job.targets])
    layer = length * (4 * frozen + 6 * adapters) + 6 * length**2 * q
    return shape["num_hidden_layers"] * layer + 4 * (length - prompt) * C * shape["vocab_size"]


def pick_device(job: argparse.Namespace) -> Any:
    import torch

    return torch.device(
        "cuda"
        if job.device == "auto" and torch.cuda.is_available()
        else "cpu"
        if job.device == "auto"
        else job.device
    )


def dtype_of(job: argparse.Namespace) -> Any:
    import torch

    return torch.bfloat16 if job.precision == "bf16-true" else torch.float32


def build(make: Callable[[], Any], job: argparse.Namespace, device: Any) -> Any:
    """The model that `make` makes, in the precision asked for, on the device."""
    import torch

    torch.set_default_dtype(dtype_of(job))
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


# ---- the programs


def train_settings(job: argparse.Namespace) -> dict[str, Any]:
    """The fields of our TrainConfig, --without included."""
    settings = {
        "max_steps": job.steps, "global_batch_size": job.global_batch, "micro_batch_size": job.micro_batch, "max_seq_length": job.seq,
        "learning_rate": LEARNING_RATE, "warmup_steps": 0, "max_grad_norm": 0.0, "log_interval": job.last, "save_interval": 0,
        "checkpoint_activations": job.checkpoint_activations,
    }  # fmt: skip
    for name in job.without:
        settings |= ABLATIONS[name]()
    return settings


def plan(job: argparse.Namespace) -> list[list[int]]:
    """The examples of each step, by their indices, as our loop will take them."""
    from litlora.data.batches import plan_epoch
    from litlora.settings import TrainConfig
    from litlora.train.fit import pack_tokens

    config = TrainConfig(**train_settings(job))
    steps = plan_epoch(
        [len(ids) for ids, _ in make_examples(job)],
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        pack_tokens=pack_tokens(config),
        seed=SEED,
        longest_first=True,
    )
    return [sorted(index for micro in step for index in micro) for step in steps]


def run_ours(job: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    from litlora.config import ModelConfig, RopeScaling
    from litlora.data.examples import Example
    from litlora.lora import add_lora
    from litlora.model import GPT
    from litlora.settings import LoRAConfig, TrainConfig
    from litlora.train.fabric import Fabric
    from litlora.train.fit import fit
    from litlora.train.memory import checkpoint_activations
    from litlora.train.objective import SupervisedLoss

    device = pick_device(job)
    clock = Clock(job, device)
    data = {**data, "steps": plan(job)}  # without packing, it is another one
    shape = dict(SHAPES[job.model])
    scaling = shape.pop("rope_scaling")
    config = ModelConfig(
        **shape, **COMMON, norm_eps=1e-6, rope_scaling=RopeScaling(**scaling) if scaling else None
    )
    model = build(lambda: GPT(config), job, device)
    add_lora(model, LoRAConfig(rank=job.rank, alpha=2.0 * job.rank, targets=TARGETS[job.targets]))
    fill(model)
    checkpoint_activations(model, job.checkpoint_activations)
    fabric = Fabric(accelerator=device.type, devices=1)
    examples = [Example(array("i", ids), ((prompt, len(ids)),)) for ids, prompt in data["examples"]]
    with tempfile.TemporaryDirectory() as scratch:
        done = fit(
            fabric, SupervisedLoss(model), examples, [], TrainConfig(**train_settings(job)),
            seed=SEED, run_dir=Path(scratch), save=lambda *_: None, metrics=None,
        )  # fmt: skip
    tokens = sum(len(data["examples"][index][0]) for step in data["steps"][: job.steps] for index in step)
    assert done.tokens == tokens, (
        f"the loop took {done.tokens} tokens, the plan has {tokens}: plan() must be what fit does"
    )
    return clock.result(data, done.loss)


def run_peft(job: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    device = pick_device(job)
    clock = Clock(job, device)
    config = LlamaConfig.from_dict({**SHAPES[job.model], **COMMON, "rms_norm_eps": 1e-6, "use_cache": False})
    model = build(lambda: LlamaForCausalLM(config), job, device)
    lora = LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=0.0,
        target_modules=TARGETS[job.targets],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)  # its default: the adapter in fp32 on a bf16 base
    fill(model)
    if job.checkpoint_activations == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    total, learned = torch.zeros((), device=device), 0
    for number, step in enumerate(data["steps"][: job.steps]):
        for group in optimizer.param_groups:
            group["lr"] = data["learning_rates"][number]
        chosen = [data["examples"][index] for index in step]
        supervised = sum(len(ids) - prompt for ids, prompt in chosen)
        for start in range(0, len(chosen), job.micro_batch):
            micro = chosen[start : start + job.micro_batch]
            T = max(len(ids) for ids, _ in micro)
            ids, labels, mask = (
                torch.zeros(len(micro), T, dtype=torch.long),
                torch.full((len(micro), T), -100),
                torch.zeros(len(micro), T),
            )
            for row, (tokens, prompt) in enumerate(micro):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
                mask[row, : len(tokens)] = 1
            loss = model(
                input_ids=ids.to(device),
                attention_mask=mask.long().to(device),
                labels=labels.to(device),
                num_items_in_batch=supervised,
            ).loss
            loss.backward()
            if number >= job.steps - job.last:
                total += loss.detach() * supervised
        learned += supervised if number >= job.steps - job.last else 0
        optimizer.step()
        optimizer.zero_grad()
    return clock.result(data, float(total) / learned)


def run_ceiling(job: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """The rate of a large square matrix product in this precision: what a training step cannot
    exceed."""
    import torch

    device = pick_device(job)
    size = 8192 if device.type == "cuda" else 2048
    square, seconds = torch.randn(size, size, dtype=dtype_of(job), device=device), []
    for _ in range(12):
        started = time.perf_counter()
        (square @ square)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return {"flops_per_second": 2 * size**3 / statistics.median(seconds[2:])}


PROGRAMS = {"ours": run_ours, "peft": run_peft, "ceiling": run_ceiling}


# ---- the driver


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "program", nargs="?", choices=PROGRAMS, help="run one of them in this process, as the driver does"
    )
    parser.add_argument("--model", choices=SHAPES, default="75m")
    parser.add_argument("--seq", type=int, default=512, help="longest example, and pack, in tokens")
    parser.add_argument(
        "--lengths",
        choices=["alpaca", "full"],
        default="alpaca",
        help="of the examples: as instructions have them, or all of --seq",
    )
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--precision", choices=["bf16-true", "32-true"], default="bf16-true")
    parser.add_argument("--global_batch", type=int, default=16, help="examples a step learns from")
    parser.add_argument("--micro_batch", type=int, default=4, help="examples at a time")
    parser.add_argument("--checkpoint_activations", choices=["none", "full"], default="none")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones, at least 1")
    parser.add_argument(
        "--last", type=int, default=4, help="steps whose mean loss is the final one; divides --steps"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=["ours", "peft"], default=["ours", "peft"])
    parser.add_argument(
        "--without",
        nargs="*",
        choices=ABLATIONS,
        default=[],
        help="further rows: ours without one of these each",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    job = parser.parse_args()
    if not 1 <= job.warmup < job.steps or not 1 <= job.last <= job.steps or job.steps % job.last:
        parser.error("--warmup must be from 1 to below --steps, and --last must divide --steps")
    if job.global_batch % job.micro_batch:
        parser.error("--global_batch must be a multiple of --micro_batch")
    return job


def measure(program: str, without: list[str], job: argparse.Namespace, data: Path) -> dict[str, Any] | None:
    """One process; None, with its last line shown, if it failed (out of memory, perhaps)."""
    options = [f"--{name}={getattr(job, name)}" for name in ("model", "seq", "lengths", "targets", "rank", "precision", "global_batch",
               "micro_batch", "checkpoint_activations", "steps", "warmup", "last", "device")]  # fmt: skip
    options += ["--without", *without] if without else []
    words = [
        job.peer_python if program == "peft" else sys.executable,
        __file__,
        program,
        *options,
        f"--data={data}",
        f"--started={time.time()}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"{program} failed with status {done.returncode}: {reason}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    job = arguments()
    if job.program:
        data = json.loads(Path(job.data).read_text())
        print(json.dumps(PROGRAMS[job.program](job, data)))
        return
    sys.path.insert(0, str(REPO))
    from litlora.settings import TrainConfig
    from litlora.train.optim import lr_at

    whole = argparse.Namespace(**{**vars(job), "without": []})
    config = TrainConfig(**train_settings(whole))
    rows = {
        "ceiling": ("ceiling", []),
        **{name: (name, []) for name in job.rows},
        **{f"ours without {n}": ("ours", [n]) for n in job.without},
    }
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.json"
        rates = [lr_at(step, job.steps, config) for step in range(job.steps)]
        data.write_text(
            json.dumps({"examples": make_examples(job), "steps": plan(whole), "learning_rates": rates})
        )
        for _ in range(job.rounds):
            for name, (program, without) in rows.items():
                if (result := measure(program, without, job, data)) is not None:
                    taken[name].append(result)
    report(taken)


def report(taken: dict[str, list[dict[str, Any]]]) -> None:
    """A markdown table, medians and, of the speed, the range."""

    def middle(name: str, key: str) -> float:
        return statistics.median(result[key] for result in taken[name]) if taken[name] else math.nan

    ceiling = middle("ceiling", "flops_per_second")
    print(f"matmul ceiling: {ceiling / 1e12:.3f} TFLOP/s")
    print(
        "| row | useful tokens/s, median [min-max] | of the ceiling | peak GiB | loss, last steps | first step s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, results in taken.items():
        if name == "ceiling":
            continue
        speeds = [result["tokens_per_second"] for result in results] or [math.nan]
        print(
            f"| {name} | {statistics.median(speeds):,.0f} [{min(speeds):,.0f}-{max(speeds):,.0f}] "
            f"| {middle(name, 'flops_per_second') / ceiling:.1%} | {middle(name, 'peak') / 2**30:.2f} "
            f"| {middle(name, 'loss'):.4f} | {middle(name, 'first_step'):.1f} |"
        )
    for versions in sorted(
        {
            f"{name.split()[0]}: {result['versions']}"
            for name, results in taken.items()
            for result in results
            if "versions" in result
        }
    ):
        print(versions)


if __name__ == "__main__":
    main()
