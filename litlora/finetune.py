"""A fine-tuning run from its settings to `final/`: what all methods share. A method is which parameters train."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from litlora.checkpoint import Checkpoint, write_checkpoint
from litlora.cli import dump
from litlora.data.batches import padding_share, plan_epoch
from litlora.data.examples import Example, split, tokenize
from litlora.data.records import Records
from litlora.load import Loaded, load, pick_device
from litlora.log import Metrics, duration
from litlora.loss import SupervisedLoss
from litlora.model import GPT
from litlora.paths import FINAL, HYPERPARAMETERS_FILE, METRICS_FILE, RUN_NAMES, WEIGHTS_FILE, keep_inputs
from litlora.precision import Precision, Within, bf16_speedup, cast, decide, stored_dtype
from litlora.prompts import choose_style
from litlora.settings import Finetune
from litlora.train import Summary, fit


@dataclass(frozen=True)
class Method:
    """What tells one way of fine-tuning from another."""

    prepare: Callable[[GPT], None]
    """Marks what trains with requires_grad."""
    trains_base: bool
    """Whether the base's own weights change, so that they need fp32 and memory apart from the file's."""
    tensors: Callable[[GPT], dict[str, Tensor]]
    """What a checkpoint stores; a weight of the base's in the base's dtype."""
    meta: Callable[[Checkpoint, Path], dict[str, Any]]
    """(base, directory to be written) -> the "litlora" entry of the checkpoint there."""
    stores: str
    """For the summary: what the result holds."""


def finetune(settings: Finetune, method: Method, found: Records, run_dir: Path) -> None:
    """Train, and write run_dir: hyperparameters.yaml, metrics.csv, early checkpoints, final/."""
    device = pick_device(settings.accelerator)
    fabric = Fabric(accelerator=device.type, devices=settings.devices, strategy="ddp" if settings.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(settings.seed, verbose=False)
    say = print if fabric.is_global_zero else lambda *_: None

    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    loaded = load(Path(settings.checkpoint_dir), base_dir=base_dir, allow_base_mismatch=settings.allow_base_mismatch, device=fabric.device)
    keep_inputs(run_dir, loaded.chain.directories)
    base, model = loaded.chain.top, loaded.model
    style, reason = choose_style(settings.prompt_style, loaded.prompt_style, loaded.template, default="alpaca")
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    precision = _precision(settings.precision, fabric, model, trains_base=method.trains_base)
    num_rounded = cast(model, precision.dtype, copy=method.trains_base)
    method.prepare(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    say(f"base: {base.directory}, {everything - (trainable if trainable < everything else 0):,} parameters; {trainable:,} train")
    say(f"precision: {precision.name} ({precision.reason})")
    if num_rounded:
        say(
            f"note: {precision.name} rounds {num_rounded:,} of the base's tensors in memory; "
            + ("the result keeps their dtype" if method.trains_base else "chat and merging use them as they are stored")
        )
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        say("note: weights of the base train in bf16, which loses updates below 1/256 of a weight; --precision bf16-mixed keeps them")
    for notice in loaded.chain.notices:
        say(f"note: {notice}")
    if found.notice:
        say(f"data: {found.notice}")
    say(f"prompt style: {style.name} ({reason})")
    train, val = _examples(settings, found, loaded, style, say)
    settings = dataclasses.replace(settings, data=found.source, prompt_style=style.name, out_dir=str(run_dir), precision=precision.name)
    hyperparameters = (f"# data: {found.notice}\n" if found.notice else "") + dump(settings)
    metrics = None
    if fabric.is_global_zero:
        _clear(run_dir)
        (run_dir / HYPERPARAMETERS_FILE).write_text(hyperparameters, encoding="utf-8")
        metrics = Metrics(run_dir / METRICS_FILE)

    def save(directory: Path) -> None:
        if fabric.is_global_zero:
            write_checkpoint(
                directory,
                {name: tensor.to(stored.get(name, tensor.dtype)) for name, tensor in method.tensors(model).items()},
                method.meta(base, directory),
                model.config,
                sidecars_from=loaded.chain.sources,
                prompt_style=style,
                hyperparameters=hyperparameters,
            )
        fabric.barrier()

    objective = Within(SupervisedLoss(model), lambda: precision.computing(fabric.device))
    summary = fit(fabric, objective, train, val, settings.train, seed=settings.seed, run_dir=run_dir, save=save, metrics=metrics)
    save(run_dir / FINAL)
    if metrics is not None:
        metrics.close()
        print(_closing_words(summary, found, run_dir, method))


def _precision(asked: str, fabric: Fabric, model: GPT, *, trains_base: bool) -> Precision:
    """What rank 0 decides: a measurement may differ from one process to the next."""
    decision = None
    if fabric.is_global_zero:
        decision = decide(asked, stored_dtype(model), lambda: bf16_speedup(fabric.device), trains_base=trains_base)
    return fabric.broadcast(decision)


def _examples(
    settings: Finetune, found: Records, loaded: Loaded, style: Any, say: Callable[[str], None]
) -> tuple[list[Example], list[Example]]:
    """Split and tokenise, saying what there is and what had to be cut."""
    limit = min(settings.train.max_seq_length, loaded.model.config.max_position_embeddings)
    train_records, val_records = split(found.records, settings.data.val_fraction, settings.data.split_seed)
    train = tokenize(train_records, loaded.tokenizer, style, limit)
    val = tokenize(val_records, loaded.tokenizer, style, limit).examples if val_records else []
    lengths = [len(example.ids) for example in train.examples]
    config = settings.train
    steps = plan_epoch(
        lengths,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        seed=settings.seed,
        longest_first=True,
    )
    say(
        f"data: {len(lengths):,} examples to train on, {len(val):,} to validate; {sum(lengths):,} tokens, "
        f"the longest example {max(lengths):,}; padding {padding_share(lengths, steps):.1%}"
    )
    if train.num_cut:
        say(f"data: {train.num_cut:,} examples are longer than {limit:,} tokens: their answers were cut, each keeps its end-of-text")
    if train.num_left_out:
        say(f"data: {train.num_left_out:,} examples left out: their prompts alone fill {limit:,} tokens, or they are empty")
    return train.examples, val


def _clear(run_dir: Path) -> None:
    """An empty run directory: what an earlier run left (and --overwrite gave up) goes, so that nothing stale remains."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for pattern in RUN_NAMES:
        for old in run_dir.glob(pattern):
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def _closing_words(summary: Summary, found: Records, run_dir: Path, method: Method) -> str:
    result = run_dir / FINAL / WEIGHTS_FILE
    val = "" if summary.val_loss is None else f", validation loss {summary.val_loss:.4f}"
    lines = [
        f"{summary.steps:,} steps in {duration(summary.seconds)}, {summary.tokens / summary.seconds:,.0f} tokens/s, "
        f"peak memory {summary.peak_memory / 2**30:.2f} GiB; loss {summary.loss:.4f}{val}",
        *([f"trained on: {found.notice}"] if found.notice else []),
        f"result: {result} ({result.stat().st_size:,} bytes: {method.stores})",
        f"next: python chat/base.py --checkpoint_dir {run_dir / FINAL}",
    ]
    return "\n".join(lines)
