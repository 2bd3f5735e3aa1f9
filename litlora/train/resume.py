"""Exact resume: what a step directory stores beside the checkpoint, and the checks before a run
resumes from one.

`state.pth` is a torch file of tensors and plain values. The settings of the run are in the step
directory's hyperparameters.yaml. The order of the examples is a pure function of the seed and the
epoch, so two integers give the position in the data.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litlora.data.store import StoredExamples
from litlora.errors import CheckpointError, UserError, setting
from litlora.paths import HYPERPARAMETERS_FILE, STATE_FILE
from litlora.settings import AUTO, Finetune, TrainConfig
from litlora.storage.tensors import open_torch
from litlora.storage.untrusted import read_yaml_mapping
from litlora.train.objective import SFT, Objective
from litlora.train.parallel import Parallel, local, share_of
from litlora.train.state_check import check_optimizer_state, check_position, check_rank, check_weights

FORMAT = 1
OLD_PREFIX = "module.model."
"""Earlier versions named a weight through the modules around the model; the rest is its name."""
MAY_CHANGE = frozenset(
    (
        # The fingerprints of base and teacher are compared instead of their places,
        "checkpoint_dir",
        "base_checkpoint_dir",
        "allow_base_mismatch",
        "stream_base",
        "teacher",
        # a hash of the examples instead of the place of the data,
        "data.class_path",
        "data.init_args.path",
        "data.init_args.ignore",
        "data.init_args.cache",
        "data.init_args.cache_dir",
        "data.init_args.source",
        "data.init_args.download_dir",
        "data.init_args.url",
        # and the kind of device that was chosen.
        "accelerator",
        "out_dir",
        "overwrite",
        "resume",
        "resume_force",
        "eval.every",
        "eval.on",
        "eval.measure",
        "eval.pattern",
        "eval.first",
        "eval.answer_tokens",
        "report.prompts",
        "report.sample_tokens",
        "log.to",
        "log.project",
        "log.name",
        "train.log_interval",
        "train.eval_interval",
        "train.save_interval",
        "train.keep_checkpoints",
        "train.max_time",
        "train.max_bad_steps",
        "train.checkpoint_activations",
        "train.offload_activations",
    )
)
"""Settings that do not affect what is learned, by their place in hyperparameters.yaml. Every other
one must stay as it was."""
DEVICES = frozenset(("devices", "num_nodes", "strategy"))
"""Settings that may change as well, and that change the order in which sums are rounded; and what
dropout draws."""

_KINDS = {int: (int,), float: (float,), bool: (bool,), type(None): (float, type(None))}
"""The types that an entry of a stored position may have, by its type in a new one."""
_LATER = ("best_step", "best_loss", "validations_since_best")
"""Entries of a position that earlier versions did not have."""


@dataclass
class Position:
    """How far a run has come: what resuming needs besides weights, optimizer and generators."""

    step: int = 0
    """Optimizer steps done, including skipped ones."""
    epoch: int = 0
    step_in_epoch: int = 0
    """The next step, counted from the first of the epoch."""
    tokens: int = 0
    seconds: float = 0.0
    """Of training alone."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    loss: float | None = None
    """As last logged."""
    val_loss: float | None = None
    validation_due: bool = False
    """The validation after this step is still to come."""
    logged_seconds: float = 0.0
    """The value of `seconds` at the last logged line."""
    interval_tokens: int = 0
    """Since the last logged line, as all that begins with interval."""
    interval_supervised: int = 0
    best_step: int = 0
    """Of the lowest validation loss, if the settings ask for it; with keep_best, its checkpoint is
    kept."""
    best_loss: float | None = None
    validations_since_best: int = 0

    def forget_best(self) -> None:
        self.best_step, self.best_loss, self.validations_since_best = 0, None, 0

    def count(self, epoch: int, index: int, seconds: float, tokens: int) -> None:
        """One more step is done, number `index` of the epoch."""
        self.step, self.epoch, self.step_in_epoch = self.step + 1, epoch, index + 1
        self.seconds += seconds
        self.tokens += tokens

    def judge(self, finite: bool) -> None:
        """Whether the loss and the gradient of the last step were finite."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def stored(self) -> dict[str, Any]:
        """Its entries, without those that are at the default and were added after files without
        them had been written."""
        values, fresh = dataclasses.asdict(self), Position()
        return {n: v for n, v in values.items() if n not in _LATER or v != getattr(fresh, n)}


@dataclass
class State:
    """A run between two steps: what `Trainer` continues from."""

    at: Position
    weights: dict[str, Tensor]
    """What trains, at the precision in which it trains, by the model's own names."""
    optimizer: dict[str, Any]
    ranks: list[dict[str, Any]]
    """For each rank: its generators, and its sums since the last logged line."""
    directory: Path
    """Where it was read from."""
    is_forced: bool = False
    """Whether it comes from a run that differs, so that the place in the data and the precision may
    differ, too."""

    def restore(
        self,
        parallel: Parallel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        sums: Iterable[str],
    ) -> dict[str, Tensor]:
        """Put weights, optimizer and generators back; returns this rank's sums since the last
        logged line. `config` is what the optimizer was made of; `sums` are the names that sums may
        have. Nothing is put back unless all fits."""
        self.check_weights(objective)
        try:
            restored = check_optimizer_state(self.optimizer, optimizer, config, is_forced=self.is_forced)
            live = generators(parallel.device)
            ranks = [check_rank(rank, live, sums) for rank in self.ranks]
        except ValueError as error:
            raise self.misfit(str(error)) from None
        self.put_weights(objective)
        optimizer.load_state_dict(restored)
        if parallel.rank < len(ranks):  # else there are more devices than before
            set_generators(ranks[parallel.rank]["generators"], parallel.device)
        # Where there were more, their sums are added to those of the ranks that are left.
        mine = [_sums_of(rank) for rank in ranks[parallel.rank :: parallel.world_size]]
        names = {name for found in mine for name in found}
        return {name: sum(found[name] for found in mine) for name in names}

    def check_weights(self, objective: Objective) -> None:
        """Raise UserError unless the weights are those that train in the objective."""
        trained = objective.trainable()
        if {name: p.shape for name, p in trained.items()} != {
            name: t.shape for name, t in self.weights.items()
        }:
            raise UserError(
                f"{self.directory}: other weights train there than here; it cannot be resumed, "
                f"not even with {setting('resume_force')}"
            )
        try:
            check_weights(self.weights, None if self.is_forced else trained)
        except ValueError as error:
            raise self.misfit(str(error)) from None

    @torch.no_grad()
    def put_weights(self, objective: Objective) -> None:
        """Put the weights, which have been checked, where they train."""
        for name, parameter in objective.trainable().items():
            local(parameter).copy_(local(share_of(self.weights[name], parameter)))

    def misfit(self, why: str) -> CheckpointError:
        """The error of a state that does not fit the run."""
        return CheckpointError(
            f"{self.directory / STATE_FILE}: does not fit this run, or is broken: {why}; "
            "resume from another step directory"
        )


def _sums_of(rank: dict[str, Any]) -> dict[str, Tensor]:
    """A rank's sums since the last logged line."""
    return {"loss": rank["interval_loss"], **rank.get("interval_figures", {})}


def capture(
    parallel: Parallel,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    at: Position,
    sums: dict[str, Tensor],
) -> dict[str, Any]:
    """The state as plain values and tensors, for write_checkpoint; `sums` are those of this rank
    since the last logged line. All ranks must call this together."""
    figures = {name: tensor.cpu() for name, tensor in sums.items() if name != "loss"}
    rank = {"generators": generators(parallel.device), "interval_loss": sums["loss"].cpu()}
    return {
        "litlora": {"format": FORMAT, "kind": "state"},
        "position": at.stored(),
        "weights": {name: parameter.detach() for name, parameter in objective.trainable().items()},
        "optimizer": optimizer.state_dict(),
        "ranks": parallel.gather(rank | ({"interval_figures": figures} if figures else {})),
    }


def facts(
    objective: Objective,
    device: torch.device,
    base_fingerprint: str,
    train: Sequence[Any],
    val: Sequence[Any],
) -> dict[str, str]:
    """What the result depends on besides the settings, by the words that a refusal uses."""
    return {
        "base": base_fingerprint,
        "training data": _content_hash(objective, train),
        "validation data": _content_hash(objective, val),
        "kind of device": device.type,
        **objective.facts,
    }


def read_state(directory: Path, here: dict[str, str]) -> tuple[State, str, list[str]]:
    """The state in a step directory, its metrics.csv, and how its facts differ from those of this
    run, `here`."""
    file = directory / STATE_FILE
    content = open_torch(file)
    kinds = {
        "litlora": dict,
        "position": dict,
        "weights": dict,
        "optimizer": dict,
        "ranks": list,
        "facts": dict,
        "metrics": str,
    }
    if not isinstance(content, dict) or any(
        type(content.get(name)) is not kind for name, kind in kinds.items()
    ):
        raise CheckpointError(f"{file}: not the state of a training run: it lacks some of {', '.join(kinds)}")
    if not _are_text(content["facts"]):
        raise CheckpointError(f"{file}: broken: its facts are not text")
    tag = content["litlora"]
    if any(type(value) not in (int, str) for value in tag.values()) or tag != {
        "format": FORMAT,
        "kind": "state",
    }:
        raise CheckpointError(f"{file}: is {str(tag)[:60]}; this version of litlora reads format {FORMAT}")
    fresh = dataclasses.asdict(Position())
    position = {name: fresh[name] for name in _LATER} | content["position"]
    if position.keys() != fresh.keys() or any(
        type(position[name]) not in _KINDS[type(fresh[name])] for name in fresh
    ):
        raise CheckpointError(f"{file}: broken: its position is {position}")
    try:
        check_position(position)
    except ValueError as error:
        raise CheckpointError(f"{file}: broken: its position: {error}") from None
    if not all(isinstance(x, str) and isinstance(t, Tensor) for x, t in content["weights"].items()):
        raise CheckpointError(f"{file}: broken: one of its weights is not a tensor")
    weights = {name.removeprefix(OLD_PREFIX): tensor for name, tensor in content["weights"].items()}
    state = State(Position(**position), weights, content["optimizer"], content["ranks"], directory)
    return state, content["metrics"], _differences(here, content["facts"])


def _are_text(values: dict[Any, Any]) -> bool:
    return all(isinstance(entry, str) for pair in values.items() for entry in pair)


def stored_settings(directory: Path) -> dict[str, Any]:
    """The hyperparameters.yaml in a directory that a run wrote."""
    return read_yaml_mapping(directory / HYPERPARAMETERS_FILE, "a run's directory needs it")


def changed_settings(settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """How two runs differ in the settings that affect what is learned."""
    here, there = (
        {name: v for name, v in flat_settings(values).items() if name not in MAY_CHANGE | DEVICES}
        for values in (settings, stored)
    )
    return _differences(here, there)


def changed_devices(settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """How two runs differ in the devices that train."""
    here, there = (
        {name: v for name, v in values.items() if name in DEVICES} for values in (settings, stored)
    )
    return _differences(here, there)


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    pairs = {name: (here.get(name, "not set"), there.get(name, "not set")) for name in {**here, **there}}
    return [
        f"{name.replace('.init_args.', '.')} is {now}, and was {before}"
        for name, (now, before) in pairs.items()
        if now != before
    ]


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 3}} -> {"train.epochs": 3}."""
    flat = {}
    for name, value in values.items():
        flat |= (
            flat_settings(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return flat


def _content_hash(objective: Objective, examples: Sequence[Any]) -> str:
    """16 hex digits over all that the loss of these examples depends on."""
    if isinstance(examples, StoredExamples) and type(objective).content is SFT.content:
        return examples.hash(objective.content)
    digest = hashlib.sha256()
    for example in examples:
        digest.update(objective.content(example))
    return digest.hexdigest()[:16]


def generators(device: torch.device) -> dict[str, Any]:
    """The state of every generator that this process may draw from."""
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return (
        states
        if device.type == "cpu"
        else states | {"device": torch.get_device_module(device).get_rng_state()}
    )


def set_generators(states: dict[str, Any], device: torch.device) -> None:
    """Put back what `generators` returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"])


def as_measured(settings: Finetune, start: Path) -> Finetune:
    """The settings with what the run in `start` measured at its beginning: measured again, it could
    come out differently."""
    stored = stored_settings(start)
    train, precision = stored.get("train"), stored.get("precision")
    # Without a size, memory or the speed of the disk may have decided on the packs.
    unset = settings.train.micro_batch_tokens is None
    if (settings.train.auto_batch or unset) and isinstance(train, dict):
        names = (
            ("micro_batch_tokens", "micro_batch_size")
            if settings.train.auto_batch
            else ("micro_batch_tokens",)
        )
        sizes = {name: train.get(name) for name in names}
        sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
        settings = dataclasses.replace(
            settings, train=dataclasses.replace(settings.train, auto_batch=False, **sizes)
        )
    for name, kind in (("learning_rate", float), ("compile", bool)):
        value = train.get(name) if isinstance(train, dict) else None
        if getattr(settings.train, name) == AUTO and isinstance(value, kind):
            settings = dataclasses.replace(
                settings, train=dataclasses.replace(settings.train, **{name: value})
            )
    if settings.precision == "auto" and precision in ("32-true", "bf16-true", "bf16-mixed"):
        settings = dataclasses.replace(settings, precision=precision)
    return settings
