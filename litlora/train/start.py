"""How the adapter of a run starts: its values before the first step, or, of a resumed run, those that
it had then."""

import dataclasses
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from litlora.adapters.merge import plan_merge
from litlora.errors import CheckpointError, UserError, setting
from litlora.frozen.linear import stored_weights
from litlora.frozen.low_rank import LowRank
from litlora.frozen.quantize import fingerprint_of
from litlora.load import Loaded
from litlora.lora import LoRALinear
from litlora.lora.adapter import named_factors, parse_taken_out
from litlora.lora.eva import Inputs, start_eva
from litlora.lora.layer import lora_layers
from litlora.lora.starts import (
    KEPT,
    Unquantised,
    check_start,
    family,
    requantise,
    restart,
    start_lora,
    start_tensors,
)
from litlora.model import LanguageModel
from litlora.paths import STATE_FILE
from litlora.settings import FinetuneLoRA, LoRAConfig
from litlora.storage.pages import mapped, release
from litlora.storage.tensors import open_torch
from litlora.train.objective import Objective
from litlora.train.parallel import Parallel
from litlora.train.plan import Plan

if TYPE_CHECKING:
    from litlora.train.run import Run

BLOCKS = "model.layers."
EVA_BATCHES = 256
"""How many batches EVA sees at most; they come again if it needs more."""


def start_adapter(run: "Run") -> None:
    """Give the adapter of a run its start: what its settings name, or what it was, if the run is
    resumed. Raises UserError if it cannot start so, and CheckpointError for a broken state."""
    settings = run.settings
    if not isinstance(settings, FinetuneLoRA) or run.place.complete:
        return
    config, model = settings.lora, run.model
    layers = lora_layers(model)
    for name, layer in layers.items():
        check_start(config.init, name, layer)
    _check_places(config, layers)
    original = _original(run.loaded) if config.loftq_iterations else None
    if run.place.start is not None:
        run.loaded = _holding(run.loaded, _resume(model, config, run.place.start, original))
        return
    if family(config.init) in KEPT or config.init == "eva":
        run.say(f"start: {config.init}, {len(layers)} layers: computing A and B, once")
    if config.init == "eva":
        start_eva(model, config, _inputs(run.objective, run.data.train, run.data.seed))
        _take_over(model, run.parallel)
        run.say(f"start: {_ranks_line(layers, lora_layers(model))}")
    else:
        taken_out = start_lora(
            model,
            config,
            original=original,
            # What is still to be divided is not converted yet.
            computes_in=run.precision.dtype if run.parallel.is_sharded else None,
        )
        if run.parallel.world_size > 1 and (kept := start_tensors(model)):
            taken_out, kept = run.parallel.broadcast((taken_out, kept))
            requantise(model, taken_out, config, original)
            restart(model, config, kept)
        run.loaded = _holding(run.loaded, taken_out)


def check_resumed_start(settings: Any, directory: Path, stored: dict[str, Any]) -> None:
    """Raise UserError, before anything is loaded, for settings that start the adapter in another way
    than the run in this step directory, whose settings are `stored`: nothing of it would fit."""
    if not isinstance(settings, FinetuneLoRA):
        return
    there = stored.get("lora")
    kept = there.get("init", LoRAConfig.init) if isinstance(there, dict) else settings.lora.init
    if kept != settings.lora.init:
        raise UserError(
            f"{setting('resume')} {directory}: {setting('init')} is {settings.lora.init}, and was "
            f"{str(kept)[:40]}; it cannot be resumed, not even with {setting('resume_force')}"
        )


def start_state(run: "Run") -> dict[str, Any]:
    """What an early checkpoint stores of the start, for `start_adapter`; nothing, where the settings
    tell all."""
    tensors, quantized = start_tensors(run.model), run.loaded.quantized
    tensors |= named_factors(quantized.taken_out) if quantized else {}
    return {"start": {"init": run.settings.lora.init, "tensors": tensors}} if tensors else {}


def _holding(loaded: Loaded, taken_out: dict[str, LowRank]) -> Loaded:
    """What was loaded, with the quantised weights that the start made."""
    if not taken_out:
        return loaded
    quantized = dataclasses.replace(loaded.quantized, taken_out=taken_out)
    if quantized.fingerprint is not None:
        weights = stored_weights(loaded.model).values()
        matrices = {weight.matrix.name: weight.matrix for weight in weights}
        quantized = dataclasses.replace(quantized, fingerprint=fingerprint_of(matrices))
    return dataclasses.replace(loaded, quantized=quantized)


def _resume(
    model: LanguageModel, config: LoRAConfig, directory: Path, original: Unquantised | None
) -> dict[str, LowRank]:
    """The start that the run in this step directory had, and what it took out of weights. What trained
    since then is not restored."""
    file = directory / STATE_FILE
    content = open_torch(file)
    content = content if isinstance(content, dict) else {}
    stored = content.get("start")
    found = stored if isinstance(stored, dict) else {}
    kept, tensors = found.get("init"), found.get("tensors")
    if kept != (config.init if family(config.init) in KEPT else None):
        raise UserError(
            f"{setting('resume')} {directory}: {setting('init')} is {config.init}, and was "
            f"{str(kept or 'another')[:40]}; it cannot be resumed, not even with {setting('resume_force')}"
        )
    taken_out: dict[str, LowRank] = {}
    try:
        if config.init == "eva":
            _set_ranks(model, content.get("weights"))
        elif kept is not None:
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise ValueError("it is not made of tensors")
            taken_out, tensors = parse_taken_out(tensors)
            requantise(model, taken_out, config, original)
            restart(model, config, tensors)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: broken: its start: {error}; resume from another step directory"
        ) from None
    return taken_out


def _set_ranks(model: LanguageModel, weights: Any) -> None:
    """The ranks of stored weights, by their shapes; layers that have none are plain again. Raises
    ValueError for what is no rank of the layer."""
    if not isinstance(weights, dict):
        raise ValueError("it has no weights")
    for name, layer in lora_layers(model).items():
        A = weights.get(f"{name}.lora_A")
        if A is None:
            model.set_submodule(name, layer.linear)
        elif not isinstance(A, Tensor) or A.ndim != 2 or not 1 <= len(A) <= layer.in_features:
            raise ValueError(f"{name}.lora_A does not fit the layer")
        elif len(A) != layer.rank:
            layer.set_rank(len(A))
    if not lora_layers(model):
        raise ValueError("its weights are none of these layers")


def _check_places(config: LoRAConfig, layers: dict[str, LoRALinear]) -> None:
    """Raise UserError for layers whose inputs EVA cannot see in order."""
    if config.init != "eva":
        return
    for name in layers:
        if not name.startswith(BLOCKS) or ".experts." in name:
            raise UserError(
                f"{setting('init')} eva: {setting('targets')} {name}: only layers of the blocks that see "
                "every token can start so; choose other layers, or another start"
            )


def _original(loaded: Loaded) -> Unquantised:
    """The weights that were quantised, as they were before."""
    plan, _ = plan_merge(loaded.chain)
    read: list[Tensor] = []

    def weight(name: str) -> Tensor:
        for tensor in mapped(read):  # of the layer before
            release(tensor)
        read[:] = plan[f"{name}.weight"].sources()
        return plan[f"{name}.weight"].tensor()

    return Unquantised(weight, loaded.quantized.quantizer)


def _inputs(objective: Objective, examples: Any, seed: int) -> Inputs:
    """The first micro-batches of a run, for EVA."""
    plan = Plan(objective.lengths(examples), objective.config, seed)
    micro_batches = list(islice(chain.from_iterable(plan.epoch(0)), EVA_BATCHES))
    model = objective.model
    device = model.like.device

    def batch(number: int) -> tuple[Any, Tensor]:
        made = objective.batch([examples[index] for index in micro_batches[number]], device)
        text = objective.text(made)

        def run() -> Any:
            return objective(text, lambda text: model.hidden(text.input_ids, lengths=text.lengths))

        return run, text.positions + 1

    return Inputs(len(micro_batches), batch)


def _take_over(model: LanguageModel, parallel: Parallel) -> None:
    """The ranks and the values of rank 0, on all ranks."""
    if parallel.world_size == 1:
        return
    found = parallel.broadcast({name: layer.lora_A.detach() for name, layer in lora_layers(model).items()})
    _set_ranks(model, {f"{name}.lora_A": A for name, A in found.items()})
    for name, layer in lora_layers(model).items():
        layer.lora_A.data.copy_(found[name])


def _ranks_line(before: dict[str, LoRALinear], after: dict[str, LoRALinear]) -> str:
    ranks = Counter(layer.rank for layer in after.values())
    dealt = ", ".join(f"{rank} ({count})" for rank, count in sorted(ranks.items()))
    return f"ranks (layers): {dealt}; {len(before) - len(after)} layers without an adapter"
