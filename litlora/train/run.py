"""A fine-tuning run from its settings to `final/`: what all methods share. A method is which
parameters train."""

import dataclasses
import fcntl
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from litlora import console
from litlora.checkpoint import Beside, reference_to, write_adapter, write_full
from litlora.cli import dump
from litlora.data.batches import padding_share, plan_epoch
from litlora.data.examples import Example, split, tokenize
from litlora.data.records import Records
from litlora.errors import UserError
from litlora.load import Loaded, load, pick_device
from litlora.lora import Adapter
from litlora.model import GPT
from litlora.paths import FINAL, HYPERPARAMETERS_FILE, WEIGHTS_FILE, keep_inputs
from litlora.prompts import choose_style
from litlora.report.log import Metrics, duration
from litlora.settings import Finetune, TrainConfig
from litlora.storage.atomic import replacing_file, setting_aside, settle
from litlora.train.compile import check_compiler, compile_blocks
from litlora.train.fabric import Fabric
from litlora.train.fit import Summary, fit, make_batch, pack_tokens
from litlora.train.interrupts import Interrupts
from litlora.train.memory import fit_to_memory, offloading
from litlora.train.objective import SupervisedLoss
from litlora.train.optim import check_optimizer
from litlora.train.precision import Precision, Within, bf16_speedup, cast, decide, stored_dtype
from litlora.train.resume import State, changed_settings, facts, read_state, stored_settings
from litlora.train.run_directory import METRICS_FILE, RUN_NAMES, RunDirectory


@dataclass(frozen=True)
class Method:
    """What tells one way of fine-tuning from another."""

    prepare: Callable[[GPT], None]
    """Marks what trains with requires_grad."""
    trains_base: bool
    """Whether the base's own weights change, so that they need fp32 and memory apart from the
    file's."""
    content: Callable[[GPT], dict[str, Tensor] | Adapter]
    """What a checkpoint stores: every weight, or an adapter."""
    stores: str
    """For the summary: what the result holds."""


def finetune(settings: Finetune, method: Method, found: Records, run: RunDirectory) -> None:
    """Train, and write run.path: hyperparameters.yaml, metrics.csv, early checkpoints, final/.
    Exits if the run is stopped."""
    interrupts, run_dir = Interrupts(settings.train.max_time), run.path
    device = pick_device(settings.accelerator)
    fabric = Fabric(
        accelerator=device.type, devices=settings.devices, strategy="ddp" if settings.devices > 1 else "auto"
    )
    fabric.launch()
    fabric.seed_everything(settings.seed, verbose=False)
    say = console.say if fabric.is_global_zero else lambda *_: None
    if run.start is not None:
        settings = _as_measured(settings, run.start)
    _check_device(settings.train, fabric.device)

    base_dir = Path(settings.base_checkpoint_dir) if settings.base_checkpoint_dir else None
    loaded = load(
        Path(settings.checkpoint_dir),
        base_dir=base_dir,
        allow_base_mismatch=settings.allow_base_mismatch,
        device=fabric.device,
    )
    keep_inputs(run_dir, loaded.chain.directories)
    base, model = loaded.chain.top, loaded.model
    style, reason = choose_style(
        settings.prompt_style, loaded.prompt_style, loaded.template, default="alpaca"
    )
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    precision = _precision(settings.precision, fabric, model, trains_base=method.trains_base)
    num_rounded = cast(model, precision.dtype, copy=method.trains_base)
    method.prepare(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    say(
        f"base: {base.directory}, {everything - (trainable if trainable < everything else 0):,} parameters; {trainable:,} train"
    )
    say(f"precision: {precision.name} ({precision.reason})")
    if num_rounded:
        say(
            f"note: {precision.name} rounds {num_rounded:,} of the base's tensors in memory; "
            + (
                "the result keeps their dtype"
                if method.trains_base
                else "chat and merging use them as they are stored"
            )
        )
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        say(
            "note: weights of the base train in bf16, which loses updates below 1/256 of a weight; --precision bf16-mixed keeps them"
        )
    for notice in loaded.chain.notices:
        say(f"note: {notice}")
    if found.notice:
        say(f"data: {found.notice}")
    say(f"prompt style: {style.name} ({reason})")
    _check_padding(settings.train, model)
    train, val = _examples(settings, found, loaded, style, say)
    contexts = [lambda: precision.computing(fabric.device)]
    if settings.train.offload_activations:
        contexts.append(lambda: offloading(model))
    objective = Within(SupervisedLoss(model), *contexts)
    longest = sorted(train, key=lambda example: -len(example.ids))
    config = fit_to_memory(
        fabric,
        objective,
        model,
        [len(example.ids) for example in longest],
        lambda count: make_batch(longest[:count], settings.train, fabric.device),
        settings.train,
        say,
    )
    if config.compile:
        compile_blocks(model, recomputed=config.checkpoint_activations == "full")
    here = facts(fabric, base.fingerprint, train, val)
    # As resolved; what is said about a directory once is no part of the configuration that repeats
    # the run.
    resolved = dataclasses.replace(
        settings,
        data=found.source,
        prompt_style=style.name,
        precision=precision.name,
        train=config,
        out_dir=str(run_dir),
        overwrite=False,
        resume=None,
        resume_force=False,
    )
    hyperparameters = (f"# data: {found.notice}\n" if found.notice else "") + dump(resolved)
    state, rows = _start(settings, run, hyperparameters, here, say)
    if run.complete:
        say(
            f"the run in {run_dir} is complete, nothing is left to do; result: {run_dir / FINAL / WEIGHTS_FILE}"
        )
        return
    how_to_resume = shlex.join(
        ["python", sys.argv[0], "--config", str(run_dir / HYPERPARAMETERS_FILE), "--resume", "auto"]
    )
    with (
        interrupts,
        _claimed(run_dir, anew=state is None) if fabric.is_global_zero else nullcontext() as forget_earlier,
    ):
        metrics = None
        if fabric.is_global_zero:
            with replacing_file(run_dir / HYPERPARAMETERS_FILE) as staging:
                staging.write_text(hyperparameters, encoding="utf-8")
            metrics = Metrics(run_dir / METRICS_FILE, rows)

        def save(directory: Path, training: dict[str, Any] | None = None) -> None:
            try:
                if fabric.is_global_zero:
                    resuming = None
                    if training is not None:
                        resuming = {**training, "facts": here, "metrics": metrics.text}
                    content = method.content(model)
                    options = {
                        "sidecars_from": loaded.chain.sources,
                        "beside": Beside(style, hyperparameters, resuming),
                        # Before this one has its name: a crash in between must not leave the earlier
                        # result beside it.
                        "check": lambda _: forget_earlier(),
                    }

                    def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                        return {
                            name: tensor.to(stored.get(name, tensor.dtype))
                            for name, tensor in tensors.items()
                        }

                    if isinstance(content, Adapter):
                        content = dataclasses.replace(
                            content, whole=rounded(content.whole), base=reference_to(base, directory)
                        )
                        write_adapter(directory, content, model.config, **options)
                    else:
                        write_full(directory, rounded(content), model.config, **options)
            finally:
                fabric.barrier()

        summary = fit(
            fabric,
            objective,
            train,
            val,
            config,
            seed=settings.seed,
            run_dir=run_dir,
            save=save,
            metrics=metrics,
            interrupts=interrupts,
            resume=state,
        )
        kept = (
            f"the newest checkpoint is {summary.checkpoint}"
            if summary.checkpoint
            else "no checkpoint could be saved"
        )
        if summary.stopped is None:
            try:
                save(run_dir / FINAL)
            except OSError as error:
                raise UserError(
                    f"{run_dir / FINAL}: could not be written ({error.strerror or error}); {kept}; make room, then: {how_to_resume}"
                ) from None
    if (
        not fabric.is_global_zero
    ):  # with status 0, as the launcher ends all processes at once when one has another
        return
    if summary.stopped is not None:
        say(f"stopped by {summary.stopped} after step {summary.steps}; {kept}", f"resume: {how_to_resume}")
        raise SystemExit(summary.stopped.status)
    say(*_closing_words(summary, found, run_dir, method))


def _as_measured(settings: Finetune, start: Path) -> Finetune:
    """With what the run measured at its start, where it would be measured again and could come out
    otherwise."""
    stored = stored_settings(start)
    train, precision = stored.get("train"), stored.get("precision")
    if settings.train.auto_batch and isinstance(train, dict):
        sizes = {name: train.get(name) for name in ("micro_batch_tokens", "micro_batch_size")}
        sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
        settings = dataclasses.replace(
            settings, train=dataclasses.replace(settings.train, auto_batch=False, **sizes)
        )
    if settings.precision == "auto" and precision in ("32-true", "bf16-true", "bf16-mixed"):
        settings = dataclasses.replace(settings, precision=precision)
    return settings


def _start(
    settings: Finetune,
    run: RunDirectory,
    hyperparameters: str,
    here: dict[str, str],
    say: Callable[[str], None],
) -> tuple[State | None, str | None]:
    """The state to resume from and its metrics.csv, if any, once it is sure that the run is the
    same. Raises UserError if it is not."""
    if run.start is None:
        if settings.resume:
            say(f"resume: {run.path} holds no early checkpoint, so the run begins")
        return None, None
    differences, state, rows = (
        changed_settings(yaml.safe_load(hyperparameters), stored_settings(run.start)),
        None,
        None,
    )
    if not run.complete:
        state, rows, others = read_state(run.start, here)
        # Another base or setting can make other examples of the same records: the cause is named
        # before the effect.
        differences = (
            others[:1] + differences + others[1:]
            if others and others[0].startswith("base")
            else differences + others
        )
    if differences and not settings.resume_force:
        raise UserError(
            f"--resume {run.start}: {differences[0]}; resume with what it was, or go on all the same with --resume_force"
        )
    for difference in differences:
        say(f"note: resumed although {difference}")
    if state is not None:
        say(f"resumed: {run.start}, {state.at.step} steps done")
    return state, rows


@contextmanager
def _claimed(run_dir: Path, *, anew: bool) -> Iterator[Callable[[], None]]:
    """Make the directory and keep other runs out of it while the block, or this process, lasts.

    `anew`: what an earlier run left there, which --overwrite gave up, is out of the way, so that
    nothing stale remains. It is removed by calling what is yielded, and is back if the block fails
    before.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out_dir {run_dir}: another run is writing there") from None
        except OSError:
            pass  # a file system without locks
        settle(run_dir)
        earlier = [path for pattern in RUN_NAMES for path in run_dir.glob(pattern)] if anew else []
        with setting_aside(
            sorted(earlier, key=lambda path: path.name != FINAL)
        ) as forget:  # what --resume looks for first, first
            yield forget
    finally:
        os.close(handle)


def _precision(asked: str, fabric: Fabric, model: GPT, *, trains_base: bool) -> Precision:
    """What rank 0 decides: a measurement may differ from one process to the next."""
    decision = None
    if fabric.is_global_zero:
        decision = decide(
            asked, stored_dtype(model), lambda: bf16_speedup(fabric.device), trains_base=trains_base
        )
    return fabric.broadcast(decision)


def _check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError, before anything is loaded, for what this device or this installation cannot
    do."""
    check_optimizer(config.optimizer, device)
    if config.offload_activations and device.type != "cuda":
        raise UserError(
            f"--train.offload_activations has no use on {device.type}: activations are in the machine's memory already"
        )
    if config.compile:
        check_compiler(device)


def _check_padding(config: TrainConfig, model: GPT) -> None:
    """Raise UserError where padding would change what an example is."""
    scaling = model.config.rope_scaling
    if not config.packing and scaling is not None and scaling.rope_type == "longrope":
        raise UserError(
            "--train.packing false: this model turns the positions of a long example otherwise than those of a short one (longrope), "
            "and would take a short one beside a long one for long; leave packing on"
        )


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
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        pack_tokens=pack_tokens(config),
        seed=settings.seed,
        longest_first=True,
    )
    largest = max(sum(lengths[index] for index in micro) for step in steps for micro in step)
    how = (
        f"; packed, at most {largest:,} at a time"
        if config.packing
        else f"; padding {padding_share(lengths, steps):.1%}"
    )
    say(
        f"data: {len(lengths):,} examples to train on, {len(val):,} to validate; {sum(lengths):,} tokens, "
        f"the longest example {max(lengths):,}{'' if config.auto_batch else how}"
    )
    if train.num_cut:
        say(
            f"data: {train.num_cut:,} examples are longer than {limit:,} tokens: their answers were cut, each keeps its end-of-text"
        )
    if train.num_left_out:
        say(
            f"data: {train.num_left_out:,} examples left out: their prompts alone fill {limit:,} tokens, or they are empty"
        )
    return train.examples, val


def _closing_words(summary: Summary, found: Records, run_dir: Path, method: Method) -> list[str]:
    result = run_dir / FINAL / WEIGHTS_FILE
    val = "" if summary.val_loss is None else f", validation loss {summary.val_loss:.4f}"
    return [
        f"{summary.steps:,} steps in {duration(summary.seconds)}, {summary.tokens / summary.seconds:,.0f} tokens/s, "
        f"peak memory {summary.peak_memory / 2**30:.2f} GiB; loss {summary.loss:.4f}{val}",
        *(
            [f"skipped: {summary.skipped:,} steps whose loss or gradient was not finite"]
            if summary.skipped
            else []
        ),
        *([f"trained on: {found.notice}"] if found.notice else []),
        f"result: {result} ({result.stat().st_size:,} bytes: {method.stores})",
        f"next: python chat/base.py --checkpoint_dir {run_dir / FINAL}",
    ]
