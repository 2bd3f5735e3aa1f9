r"""LoRA training compared with transformers + PEFT: useful tokens/s, peak memory, final loss, time to
the first step; on the CPU or a GPU.

    python benchmarks/train_speed.py --model 75m --targets qv --rank 8 --seq 512 --rounds 3
    python benchmarks/train_speed.py --model llama-3.1-8b --targets all-linear --rank 16 \
        --seq 4096 --lengths full --micro_batch 1
    python benchmarks/train_speed.py --rows ours --without supervised_logits
    python benchmarks/train_speed.py --rows ours --quantize nf4 int8 --stream
    python benchmarks/train_speed.py --model llama-3.2-1b --targets all-linear --quick
    python benchmarks/train_speed.py --rows ours --compile

Every run is a process of its own. The rounds are interleaved (ours, PEFT, ours, PEFT, ...), and a
row shows the medians of its runs; every run prints a line when it ends. All runs get the same weights
(random, filled by name, on the device), the same adapter, examples, steps, learning rates, optimizer
and precision; only the way they compute differs. PEFT divides the examples of a step into padded
micro-batches in the order in which they come. --quantize and --stream add rows of ours, whose base is
read from a file, on a GPU quantised there; --peer_quantize adds one of PEFT on a base that bitsandbytes
quantised. --quick takes few short steps once, and weights that repeat every 2^20 values, for a
billion parameters on two cores. A token counts once and padding never. The time runs from the end of
the warm-up steps to the end of the last step. --peer_python names another Python for the peer.
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
SHAPES = {  # with the names of a Hugging Face config.json
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "rope_scaling": None,
    },
    "75m": {
        "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "rope_scaling": None,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
        "rope_theta": 1000000.0, "rope_scaling": None,
    },
    "llama-3.2-1b": {
        **LLAMA3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_scaling": {**LLAMA3["rope_scaling"], "factor": 32.0},
    },
    "llama-3.1-8b": {
        **LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_scaling": {**LLAMA3["rope_scaling"], "factor": 8.0},
    },
}  # fmt: skip
COMMON = {"max_position_embeddings": 8192}
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LEARNING_RATE = 1e-3
SEED = 1337


# ---- what --without can switch off


def all_logits() -> dict[str, Any]:
    """Logits and loss at every position, learned or not."""
    import torch.nn.functional as F

    from litlora.kernels.buckets import bucketed
    from litlora.train.objective import SFT

    def loss(self: Any, batch: Any) -> Any:
        like = self.model.model.embed_tokens.weight
        ids, lengths, _ = bucketed(batch.input_ids, batch.lengths, batch.positions, like)
        hidden = self.model.model(ids, lengths=lengths)[:, : batch.input_ids.size(1)]
        logits = self.model.logits(hidden).flatten(0, 1)  # (N, V)
        labels = batch.targets.new_full((len(logits),), -100)
        labels = labels.index_copy(0, batch.positions, batch.targets)
        return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum"), {}

    SFT.loss = loss
    return {}


def plain(module: str, *names: str) -> Callable[[], dict[str, Any]]:
    """Replaces functions of a kernel module by their plain twins, which are called plain_NAME."""

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
"""A name for --without -> a function that switches it off: it changes the library from outside and
returns training settings to change."""


# ---- the same for all: weights, data, the clock


def weight_name(name: str) -> str:
    """A parameter's name in either program -> the same name."""
    for part in ("base_model.model.", ".base_layer", ".default", ".linear"):
        name = name.replace(part, "", 1)
    return name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")


REPEATED = 2**20
"""With --quick, weights repeat after so many values: drawing a billion takes half a minute."""
QUICK = {"rounds": 1, "steps": 3, "warmup": 1, "last": 1, "global_batch": 4, "seq": 256}


def fill(model: Any, job: argparse.Namespace) -> None:
    """The same random weights for the same names, created on the device; A is uniform, as PEFT and
    litlora draw it, and B is zero."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():  # what bitsandbytes quantised
                continue
            name = weight_name(name)
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            if name.endswith("lora_A"):
                bound = parameter.size(1) ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.endswith("lora_B"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif job.quick and parameter.numel() > REPEATED:
                drawn = parameter.new_empty(REPEATED).normal_(std=0.02, generator=generator)
                for part in parameter.view(-1).split(REPEATED):
                    part.copy_(drawn[: len(part)])
            else:
                parameter.normal_(std=0.02, generator=generator)


def make_examples(job: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt): a third is prompt. The ids follow a steep distribution, so that
    there is something to learn.

    alpaca: log-normal lengths with a median of 80, as in instruction data, cut to --seq;
    full: every length is --seq.
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
    """Times optimizer steps from outside, the same way in both programs. It waits for the device
    only where it reads a time."""

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
    """The FLOPs that an example needs: the products with the frozen layers forward and backward, with
    the head where something is learned, attention below the diagonal, and the adapters' three
    products. Neither weight gradients of frozen layers nor padding count."""
    shape = SHAPES[job.model]
    C, inner, D = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * D, shape["num_key_value_heads"] * D
    sizes = {
        "q_proj": (C, q), "k_proj": (C, kv), "v_proj": (C, kv), "o_proj": (q, C),
        "gate_proj": (C, inner), "up_proj": (C, inner), "down_proj": (inner, C),
    }  # fmt: skip
    frozen = sum(rows * columns for rows, columns in sizes.values())
    adapters = sum(job.rank * sum(sizes[name]) for name in TARGETS[job.targets])
    layer = length * (4 * frozen + 6 * adapters) + 6 * length**2 * q
    return shape["num_hidden_layers"] * layer + 4 * (length - prompt) * C * shape["vocab_size"]


def pick_device(job: argparse.Namespace) -> Any:
    import torch

    if job.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(job.device)


def dtype_of(job: argparse.Namespace) -> Any:
    import torch

    return torch.bfloat16 if job.precision == "bf16-true" else torch.float32


def build(make: Callable[[], Any], job: argparse.Namespace, device: Any) -> Any:
    """The model that `make` creates, in the precision of the job, on the device."""
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
        "max_steps": job.steps, "global_batch_size": job.global_batch, "micro_batch_size": job.micro_batch,
        "max_seq_length": job.seq, "learning_rate": LEARNING_RATE, "warmup_steps": 0, "max_grad_norm": 0.0,
        "log_interval": job.last, "save_interval": 0, "checkpoint_activations": job.checkpoint_activations,
    }  # fmt: skip
    for name in job.without:
        settings |= ABLATIONS[name]()
    return settings


def plan(job: argparse.Namespace) -> list[list[int]]:
    """The examples of each step, by index, as our loop will take them."""
    from litlora.data.batches import plan_epoch
    from litlora.settings import TrainConfig
    from litlora.train.plan import pack_tokens

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
    import torch

    from litlora.config import ModelConfig, RopeScaling
    from litlora.data.examples import Example
    from litlora.lora import add_lora
    from litlora.model import GPT
    from litlora.report.console import Console
    from litlora.settings import LoRAConfig, TrainConfig
    from litlora.train.activations import checkpoint_activations
    from litlora.train.checkpoints import EarlyCheckpoints
    from litlora.train.compile import compile_blocks, compile_head
    from litlora.train.fit import Data, Trainer
    from litlora.train.interrupts import Interrupts
    from litlora.train.objective import SFT
    from litlora.train.parallel import Parallel

    device = pick_device(job)
    clock = Clock(job, device)
    data = {**data, "steps": plan(job)}  # which differs without packing
    shape = dict(SHAPES[job.model])
    scaling = shape.pop("rope_scaling")
    config = ModelConfig(
        **shape, **COMMON, norm_eps=1e-6, rope_scaling=RopeScaling(**scaling) if scaling else None
    )
    if job.hold in ("memory", "compiled"):
        model = build(lambda: GPT(config), job, device)
    elif device.type == "cuda" and job.hold != "streamed":
        model = quantised_on(device, config, job)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        model = held(config, job)
    add_lora(model, LoRAConfig(rank=job.rank, alpha=2.0 * job.rank, targets=TARGETS[job.targets]))
    fill(model, job)
    checkpoint_activations(model, job.checkpoint_activations)
    train_config = TrainConfig(**train_settings(job))
    objective = SFT(model, train_config)
    if job.hold == "compiled":
        compile_blocks(model, recomputed=job.checkpoint_activations == "full")
        compile_head(objective)
    examples = [Example(array("i", ids), ((prompt, len(ids)),)) for ids, prompt in data["examples"]]
    with tempfile.TemporaryDirectory() as scratch:
        done = Trainer(
            Parallel(device),
            objective,
            Data(examples, [], SEED),
            train_config,
            EarlyCheckpoints(Path(scratch), lambda *_: None, keep=1),
            sink=Console(),
            interrupts=Interrupts(),
        ).fit()
    tokens = sum(len(data["examples"][index][0]) for step in data["steps"][: job.steps] for index in step)
    assert done.tokens == tokens, (
        f"the loop took {done.tokens} tokens, the plan has {tokens}: plan() must be what fit does"
    )
    return clock.result(data, done.loss)


def held(config: Any, job: argparse.Namespace) -> Any:
    """The model with its base quantised or streamed, from a file, as loading does it. A process of
    its own writes the file: this one never holds all weights."""
    import torch

    from litlora.adapters.quantised import block_linears
    from litlora.frozen.quantize import QUANTIZERS
    from litlora.model import GPT
    from litlora.storage.pages import release
    from litlora.storage.tensors import open_safetensors, write_safetensors
    from litlora.streaming import stream_base

    file = Path(job.data).with_name("base.safetensors")
    if (child := os.fork()) == 0:
        model = build(lambda: GPT(config), job, torch.device("cpu"))
        fill(model, job)
        write_safetensors(file, dict(model.named_parameters()))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the base could not be written"
    tensors = open_safetensors(file)
    if job.hold == "streamed":
        model = GPT.from_tensors(config, tensors)
        stream_base(model, file)
        return model
    for name in block_linears(config):
        W = tensors[name]
        tensors[name] = QUANTIZERS[job.hold].quantised(W, name, file)
        release(W)
    return GPT.from_tensors(config, tensors)


def quantised_on(device: Any, config: Any, job: argparse.Namespace) -> Any:
    """The model with the base quantised on the device, a layer at a time."""
    import torch

    from litlora.frozen.linear import FrozenLinear
    from litlora.frozen.quantize import QUANTIZERS
    from litlora.frozen.quantized import QuantizedWeight
    from litlora.model import GPT

    model = build(lambda: GPT(config), job, device)
    fill(model, job)
    for name, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            with torch.device(device):
                W = QUANTIZERS[job.hold].quantised(linear.weight, name, Path(name))
            model.set_submodule(name, FrozenLinear(QuantizedWeight(W)))
    return model


def quantise_peer(model: Any, job: argparse.Namespace, device: Any) -> None:
    """Put bitsandbytes' layers in the place of the blocks' linear ones, as transformers does."""
    import bitsandbytes
    import torch

    how = {"quant_type": "nf4", "compress_statistics": job.hold == "nf4-dq"}
    for name, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            sizes = linear.in_features, linear.out_features
            layer = bitsandbytes.nn.Linear4bit(*sizes, False, dtype_of(job), device="meta", **how)
            weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **how)
            layer.weight = weight.to(device)
            model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True


def run_peft(job: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    device = pick_device(job)
    clock = Clock(job, device)
    config = LlamaConfig.from_dict({**SHAPES[job.model], **COMMON, "rms_norm_eps": 1e-6, "use_cache": False})
    model = build(lambda: LlamaForCausalLM(config), job, device)
    if job.hold != "memory":
        fill(model, job)
        quantise_peer(model, job, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    lora = LoraConfig(
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=0.0,
        target_modules=TARGETS[job.targets],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)  # by default the adapter is in fp32 on a bf16 base
    fill(model, job)
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
            batch = padded(chosen[start : start + job.micro_batch], device)
            loss = model(**batch, num_items_in_batch=supervised).loss
            loss.backward()
            if number >= job.steps - job.last:
                total += loss.detach() * supervised
        learned += supervised if number >= job.steps - job.last else 0
        optimizer.step()
        optimizer.zero_grad()
    return clock.result(data, float(total) / learned)


def padded(examples: list[tuple[list[int], int]], device: Any) -> dict[str, Any]:
    """A micro-batch as transformers takes it, padded to its longest example."""
    import torch

    B, T = len(examples), max(len(ids) for ids, _ in examples)
    ids, labels = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -100)
    mask = torch.zeros(B, T)
    for row, (tokens, prompt) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
        mask[row, : len(tokens)] = 1
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.long().to(device),
        "labels": labels.to(device),
    }


def run_ceiling(job: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """The rate of a large square matrix product in this precision, which no training step can
    exceed."""
    import torch

    device = pick_device(job)

    def rate(size: int) -> float:
        square, seconds = torch.randn(size, size, dtype=dtype_of(job), device=device), []
        for _ in range(12):
            started = time.perf_counter()
            (square @ square)[0, 0].item()
            seconds.append(time.perf_counter() - started)
        return 2 * size**3 / statistics.median(seconds[2:])

    if device.type == "cuda":
        return {"flops_per_second": rate(8192)}
    # Half a minute of products at most: a processor without those of 16 bits emulates them.
    small = rate(256)
    size = next((size for size in (2048, 1024, 512) if 24 * size**3 / small < 30), None)
    return {"flops_per_second": rate(size) if size else small}


PROGRAMS = {"ours": run_ours, "peft": run_peft, "ceiling": run_ceiling}


# ---- the driver


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "program", nargs="?", choices=PROGRAMS, help="run this one in this process, as the driver does"
    )
    parser.add_argument("--model", choices=SHAPES, default="75m")
    parser.add_argument("--seq", type=int, default=512, help="longest example and longest pack, in tokens")
    parser.add_argument(
        "--lengths",
        choices=["alpaca", "full"],
        default="alpaca",
        help="lengths of the examples: like those of instruction data, or all --seq",
    )
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--precision", choices=["bf16-true", "32-true"], default="bf16-true")
    parser.add_argument("--global_batch", type=int, default=16, help="examples in one optimizer step")
    parser.add_argument("--micro_batch", type=int, default=4, help="examples computed at a time")
    parser.add_argument("--checkpoint_activations", choices=["none", "full"], default="none")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones; at least 1")
    parser.add_argument(
        "--last",
        type=int,
        default=4,
        help="the final loss is the mean over this many last steps; must divide --steps",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", choices=["ours", "peft"], default=["ours", "peft"])
    parser.add_argument(
        "--without",
        nargs="*",
        choices=ABLATIONS,
        default=[],
        help="one more row for each: ours without it",
    )
    parser.add_argument(
        "--quantize",
        nargs="+",
        choices=["nf4", "nf4-dq", "int8", "fp8"],
        default=[],
        help="one more row for each: ours with the base in few bits",
    )
    parser.add_argument(
        "--peer_quantize",
        nargs="+",
        choices=["nf4", "nf4-dq"],
        default=[],
        help="one more row for each: PEFT with the base quantised by bitsandbytes",
    )
    parser.add_argument(
        "--json", action="store_true", help="print each run as a line of JSON: no table, no ceiling"
    )
    parser.add_argument("--stream", action="store_true", help="one more row: the base stays in its file")
    parser.add_argument("--compile", action="store_true", help="one more row: the blocks are compiled")
    parser.add_argument("--quick", action="store_true", help="few short steps, once")
    parser.add_argument("--hold", default="memory", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    job = parser.parse_args()
    if not 1 <= job.warmup < job.steps or not 1 <= job.last <= job.steps or job.steps % job.last:
        parser.error("--warmup must be from 1 to below --steps, and --last must divide --steps")
    if job.global_batch % job.micro_batch:
        parser.error("--global_batch must be a multiple of --micro_batch")
    return job


def measure(
    program: str, without: list[str], hold: str, job: argparse.Namespace, data: Path
) -> dict[str, Any] | None:
    """The result of one process. If it fails (out of memory, perhaps), its last line is shown and the
    result is None."""
    passed_on = (
        *("model", "seq", "lengths", "targets", "rank", "precision", "global_batch", "micro_batch"),
        *("checkpoint_activations", "steps", "warmup", "last", "device"),
    )
    options = [f"--{name}={getattr(job, name)}" for name in passed_on]
    options += [f"--hold={hold}", *(["--quick"] if job.quick else [])]
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
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
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
        **({} if job.json else {"ceiling": ("ceiling", [], "memory")}),
        **{name: (name, [], "memory") for name in job.rows},
        **{f"ours without {n}": ("ours", [n], "memory") for n in job.without},
        **{f"ours {kind}": ("ours", [], kind) for kind in job.quantize},
        **{f"peft {kind}": ("peft", [], kind) for kind in job.peer_quantize},
        **({"ours streamed": ("ours", [], "streamed")} if job.stream else {}),
        **({"ours compiled": ("ours", [], "compiled")} if job.compile else {}),
    }
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.json"
        rates = [lr_at(step, job.steps, config) for step in range(job.steps)]
        data.write_text(
            json.dumps({"examples": make_examples(job), "steps": plan(whole), "learning_rates": rates})
        )
        for _ in range(job.rounds):
            for name, (program, without, hold) in rows.items():
                if (result := measure(program, without, hold, job, data)) is not None:
                    taken[name].append(result)
                    line = json.dumps({"row": name, **result}) if job.json else progress(name, result)
                    print(line, flush=True)
    if not job.json:
        report(taken)


def progress(name: str, result: dict[str, Any]) -> str:
    """A run, in a line."""
    if name == "ceiling":
        return f"ceiling: {result['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return (
        f"{name}: {result['tokens_per_second']:,.0f} useful tokens/s, peak {result['peak'] / 2**30:.2f} GiB, "
        f"loss {result['loss']:.4f}, first step {result['first_step']:.1f} s"
    )


def report(taken: dict[str, list[dict[str, Any]]]) -> None:
    """A markdown table of medians; the speed with its range."""

    def median(name: str, key: str) -> float:
        return statistics.median(result[key] for result in taken[name]) if taken[name] else math.nan

    ceiling = median("ceiling", "flops_per_second")
    print(f"matmul ceiling: {ceiling / 1e12:.3g} TFLOP/s")
    print(
        "| row | useful tokens/s, median [min-max] | of the ceiling | peak GiB | loss, last steps "
        "| first step s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, results in taken.items():
        if name == "ceiling":
            continue
        speeds = [result["tokens_per_second"] for result in results] or [math.nan]
        print(
            f"| {name} | {statistics.median(speeds):,.0f} [{min(speeds):,.0f}-{max(speeds):,.0f}] "
            f"| {median(name, 'flops_per_second') / ceiling:.1%} | {median(name, 'peak') / 2**30:.2f} "
            f"| {median(name, 'loss'):.4f} | {median(name, 'first_step'):.1f} |"
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
