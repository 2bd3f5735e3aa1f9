"""A rank of a small training run, for tests/train/test_many.py.

    LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/train/ranks.py DIR CASES

with tests and tests/train on the import path.

CASES is JSON: a list of {"name", "strategy", "method", "dtype", "train", "quantize"}, the last only for
a base in few bits. Rank 0 writes DIR/NAME.pth: what trained, the validation loss, the bytes that each
rank held and moved to the host, and how often ranks exchanged something.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from conftest import tiny_config
from test_fit import examples
from torch.profiler import ProfilerActivity, profile

from litlora.adapters.quantised import block_linears
from litlora.frozen.linear import stored_weights
from litlora.frozen.quantize import QUANTIZERS, Quantizer, ToQuantize
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.report.sinks import Sinks
from litlora.settings import TrainConfig
from litlora.storage import torch_file
from litlora.train import activations
from litlora.train.checkpoints import EarlyCheckpoints
from litlora.train.fit import Data, Trainer
from litlora.train.interrupts import Interrupts
from litlora.train.objective import SFT
from litlora.train.parallel import Parallel, local

TRAIN = {"epochs": 1, "global_batch_size": 4, "micro_batch_tokens": 40, "micro_batch_size": 1}
TRAIN |= {"warmup_steps": 0, "save_interval": 0, "eval_interval": 2, "learning_rate": 0.01}


def bytes_held(objective, optimizer) -> dict[str, int]:
    """What this rank holds, without a buffer for what is exchanged."""
    weights = {id(p): local(p).nbytes for p in objective.parameters()}
    weights |= {id(w): w.nbytes for w in stored_weights(objective).values() if w.stored_bytes is None}
    moments = [
        local(value).nbytes
        for slot in optimizer.state.values()
        for value in slot.values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    return {"weights": sum(weights.values()), "moments": sum(moments)}


def in_few_bits(model: GPT, quantizer: Quantizer, *, late: bool) -> GPT:
    tensors = dict(model.named_parameters())
    for name in block_linears(model.config):
        W = tensors[name].detach()
        facts = (name, Path("model"), W.dtype, W.size(1), range(W.size(0)))
        tensors[name] = ToQuantize(*facts, lambda W=W: W, quantizer)
        if not late:
            tensors[name] = tensors[name].settled()
    return GPT.from_tensors(model.config, tensors)


def train(parallel, case, directory):
    """14 examples in steps of 4: the last one has 2. Their answers have 1 to 12 tokens."""
    torch.manual_seed(0)
    dtype, lora = getattr(torch, case["dtype"]), case["method"] == "lora"
    model = GPT(tiny_config()).to(dtype)
    if quantize := case.get("quantize"):
        model = in_few_bits(model, QUANTIZERS[quantize], late=parallel.is_sharded)
    stored = list(model.parameters())
    if lora:
        add_lora(model, LoRAConfig(), dtype)
    config = TrainConfig(**{**TRAIN, **case["train"]})
    contexts, moved = [], []
    if config.offload_activations:
        contexts.append(lambda: activations.offloading(model))
        activations.to_host = lambda tensor: moved.append(tensor.nbytes) or tensor.clone()
    objective = SFT(model, config, contexts)
    if parallel.is_sharded:
        parallel.shard(objective, stored, dtype, trains_base=not lora)
    trainer = Trainer(
        parallel,
        objective,
        Data(examples(14), examples(5, seed=9), 1),
        config,
        EarlyCheckpoints(directory, lambda *_: None, keep=1),
        sink=Sinks(),
        interrupts=Interrupts(),
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        done = trainer.fit()
    exchanged = Counter(
        event.name.removeprefix("c10d::") for event in profiler.events() if "c10d::" in event.name
    )
    held = parallel.gather(bytes_held(objective, getattr(trainer.optimizer, "optimizer", trainer.optimizer)))
    moved = parallel.gather(sum(moved))
    trained = {name: parameter.detach() for name, parameter in objective.trainable().items()}
    with parallel.gathering(trained) as whole:
        if whole is not None:
            content = {"model": whole, "val_loss": done.val_loss, "held": held, "moved": moved}
            content["exchanged"] = dict(exchanged)
            torch_file.save(directory / f"{case['name']}.pth", content)


def main() -> None:
    directory, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    parallel = Parallel("cpu", int(os.environ["WORLD_SIZE"]), 1, cases[0]["strategy"])
    parallel.launch(0)
    for case in cases:
        train(parallel, case, directory)
    parallel.barrier()


if __name__ == "__main__":
    main()
