"""Exact resume: what a step directory stores beside the checkpoint, and the checks before a run
goes on from one.

`state.pth` is a torch file of tensors and plain values. The settings of the run are in the step
directory's hyperparameters.yaml. The order of the examples is a pure function of the seed and the
epoch, so a position is two numbers.
"""

import dataclasses
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litlora.data.examples import Example, content_line
from litlora.errors import CheckpointError, UserError
from litlora.paths import HYPERPARAMETERS_FILE, STATE_FILE
from litlora.storage.tensors import open_torch
from litlora.storage.untrusted import read_yaml
from litlora.train.fabric import Fabric

FORMAT = 1
MAY_CHANGE = frozenset(
    (
        "checkpoint_dir",
        "base_checkpoint_dir",
        "allow_base_mismatch",
    )  # the base's fingerprint is compared instead
    + (
        "data.class_path",
        "data.init_args.path",
        "data.init_args.source",
        "data.init_args.download_dir",
        "data.init_args.url",
    )  # its hash
    + (
        "accelerator",
        "out_dir",
        "overwrite",
        "resume",
        "resume_force",
    )  # the kind of device is compared as it was chosen
    + ("train.log_interval", "train.eval_interval", "train.save_interval", "train.keep_checkpoints")
    + ("train.max_time", "train.max_bad_steps", "train.checkpoint_activations", "train.offload_activations")
)
"""Settings that are no part of what is learned, by their place in hyperparameters.yaml. Every other
one must stay as it was."""

_KINDS = {int: (int,), float: (float,), bool: (bool,), type(None): (float, type(None))}
"""What an entry of a stored position may be, by what it is at the start."""


@dataclass
class Position:
    """How far a run has come: what resuming needs beside weights, optimizer and generators."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    epoch: int = 0
    step_in_epoch: int = 0
    """The next step, counted from the epoch's first."""
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
    """When the last line was logged; the rest is of the interval since then."""
    interval_tokens: int = 0
    interval_supervised: int = 0

    def count(self, epoch: int, index: int, seconds: float, tokens: int, finite: bool) -> None:
        """One more step is done: the `index`-th of the epoch."""
        self.step, self.epoch, self.step_in_epoch = self.step + 1, epoch, index + 1
        self.seconds += seconds
        self.tokens += tokens
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1


@dataclass
class State:
    """A run between two steps; what `fit` continues from."""

    at: Position
    weights: dict[str, Tensor]
    """What trains, at the precision in which it trains."""
    optimizer: dict[str, Any]
    ranks: list[dict[str, Any]]
    """Of each device's process: its generators, and its share of the loss since the last logged
    line."""
    directory: Path
    """Where it was read from."""

    def restore(self, fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Put weights, optimizer and generators back; returns this rank's loss since the last
        logged line."""
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if {name: p.shape for name, p in trained.items()} != {
            name: t.shape for name, t in self.weights.items()
        }:
            raise UserError(
                f"{self.directory}: other weights train there than here; it cannot be resumed, not even with --resume_force"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(self.weights[name])
        try:
            # Copies, as the moments must not live in the file's memory.
            slots = {
                index: {
                    name: value.clone() if isinstance(value, Tensor) else value
                    for name, value in slot.items()
                }
                for index, slot in self.optimizer["state"].items()
            }
            optimizer.load_state_dict({**self.optimizer, "state": slots})
            if fabric.global_rank >= len(self.ranks):  # more devices than before, by --resume_force
                return torch.zeros((), device=fabric.device)
            rank = self.ranks[fabric.global_rank]
            _set_generators(rank["generators"], fabric.device)
            return rank["interval_loss"].to(fabric.device)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise CheckpointError(
                f"{self.directory / STATE_FILE}: does not fit this run, or is broken: {said}"
            ) from None


def capture(
    fabric: Fabric, module: nn.Module, optimizer: torch.optim.Optimizer, at: Position, interval_loss: Tensor
) -> dict[str, Any]:
    """The state as plain values and tensors, for write_checkpoint. All ranks must call this
    together."""
    rank = {"generators": _generators(fabric.device), "interval_loss": interval_loss.cpu()}
    ranks = [rank]
    if fabric.world_size > 1:
        ranks = [None] * fabric.world_size
        torch.distributed.all_gather_object(ranks, rank)
    return {
        "litlora": {"format": FORMAT, "kind": "state"},
        "position": dataclasses.asdict(at),
        "weights": {name: p.detach() for name, p in module.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "ranks": ranks,
    }


def facts(fabric: Fabric, base_fingerprint: str, train: list[Example], val: list[Example]) -> dict[str, str]:
    """What the settings do not tell and the result depends on, by the words that a refusal uses."""
    return {
        "base": base_fingerprint,
        "training data": _content_hash(train),
        "validation data": _content_hash(val),
        "kind of device": fabric.device.type,
    }


def read_state(directory: Path, here: dict[str, str]) -> tuple[State, str, list[str]]:
    """The state in a step directory, its metrics.csv, and where it differs from the `facts` of this
    run."""
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
    if content["litlora"] != {"format": FORMAT, "kind": "state"}:
        raise CheckpointError(
            f"{file}: is {content['litlora']}; this version of litlora reads format {FORMAT}"
        )
    position, fresh = content["position"], dataclasses.asdict(Position())
    if position.keys() != fresh.keys() or any(
        type(position[name]) not in _KINDS[type(fresh[name])] for name in fresh
    ):
        raise CheckpointError(f"{file}: broken: its position is {position}")
    if not all(isinstance(tensor, Tensor) for tensor in content["weights"].values()):
        raise CheckpointError(f"{file}: broken: one of its weights is no tensor")
    state = State(Position(**position), content["weights"], content["optimizer"], content["ranks"], directory)
    return state, content["metrics"], _differences(here, content["facts"])


def stored_settings(directory: Path) -> dict[str, Any]:
    """The hyperparameters.yaml of a checkpoint that a run made."""
    file = directory / HYPERPARAMETERS_FILE
    try:
        stored = read_yaml(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a run's directory needs it") from None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{file}: holds no settings")
    return stored


def changed_settings(settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Where two runs' settings that matter differ."""
    here, there = (
        {name: v for name, v in _flat(values).items() if name not in MAY_CHANGE}
        for values in (settings, stored)
    )
    return _differences(here, there)


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    nothing = "not set"
    names = [name for name in {**here, **there} if here.get(name, nothing) != there.get(name, nothing)]
    return [
        f"{name.replace('.init_args.', '.')} is {here.get(name, nothing)}, and was {there.get(name, nothing)}"
        for name in names
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _content_hash(examples: list[Example]) -> str:
    """16 hex digits over every token and where each answer begins."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(content_line(example).encode())
        digest.update(example.ids)
    return digest.hexdigest()[:16]


def _generators(device: torch.device) -> dict[str, Any]:
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


def _set_generators(states: dict[str, Any], device: torch.device) -> None:
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"])
