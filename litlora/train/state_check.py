"""What a stored training state may hold: every entry, against the run that is to continue from it.

torch's optimizers trust the state that they are given: their kernels read and write as many values
as a parameter has, whatever the size of the stored moments. So each entry's type, shape, dtype and
range is compared with the live one before anything is loaded. All functions raise ValueError.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litlora.settings import TrainConfig
from litlora.train.optim import make_optimizer
from litlora.train.parallel import share_of

LONGEST = 1e10
"""Seconds of a run, about 300 years: beyond, adding the time of a step changes nothing."""
LARGEST = 2**53
"""Of a count: a float holds it exactly."""
_UP_TO = {
    "epoch": "step",
    "step_in_epoch": "step",
    "skipped": "step",
    "skipped_in_a_row": "skipped",
    "logged_seconds": "seconds",
    "interval_tokens": "tokens",
    "interval_supervised": "interval_tokens",
    "best_step": "step",
    "validations_since_best": "step",
}
"""{entry of a position: the entry that it cannot exceed}."""
_NEVER_NEGATIVE = (".step", ".exp_avg_sq", ".row_var", ".col_var", ".variance")
"""What an optimizer keeps that is a count, or a mean of squares."""
_MT19937_WORDS = 624
"""The size of the state of Python's generator and of numpy's."""


def check_position(at: Mapping[str, Any]) -> None:
    """A position whose entries have the right types has values that a run can reach."""
    for name, value in at.items():
        if isinstance(value, bool) or value is None or name.endswith("loss"):
            continue
        most = LONGEST if isinstance(value, float) else LARGEST
        if not 0 <= value <= at.get(_UP_TO.get(name), most) <= most:
            raise ValueError(f"{name} is {value}")
    best = at["best_loss"]
    if bool(at["best_step"]) != (best is not None and math.isfinite(best)):
        raise ValueError(f"best_step is {at['best_step']} and best_loss is {best}")
    # Whoever has done a step has spent time on it, and has logged the first.
    if at["step"] and (not at["seconds"] or at["loss"] is None):
        raise ValueError(f"after {at['step']} steps, seconds is {at['seconds']} and loss is {at['loss']}")


def check_place_in_data(at: Mapping[str, Any], steps_per_epoch: int, total_steps: int) -> None:
    """A position is that of a run whose epochs have this many steps."""
    step, epoch, done = (at[name] for name in ("step", "epoch", "step_in_epoch"))
    if step != epoch * steps_per_epoch + done or step > total_steps:
        raise ValueError(
            f"its position is step {step}, which is step {done} of epoch {epoch}, in a run of {total_steps} "
            f"steps, {steps_per_epoch} an epoch"
        )


def check_weights(stored: Mapping[str, Tensor], live: Mapping[str, Tensor] | None = None) -> None:
    """What trained is finite floating-point numbers, of the precision of the `live` weights if these
    are given; names and shapes are compared elsewhere."""
    for name, tensor in stored.items():
        if live is not None and tensor.dtype != live[name].dtype:
            raise ValueError(f"the weight {name} is of {tensor.dtype}, not {live[name].dtype}")
        _check_values(f"the weight {name}", tensor)


def check_optimizer_state(
    stored: Any, optimizer: torch.optim.Optimizer, config: TrainConfig, *, is_forced: bool = False
) -> dict[str, Any]:
    """A stored `optimizer.state_dict()`, if `optimizer`, made of `config`, can continue from it; the
    tensors are copies, so that the moments do not live in the file's memory. If the resume
    `is_forced`, settings may differ, and the precision of moments."""
    if not isinstance(stored, dict) or stored.keys() != {"state", "param_groups"}:
        raise ValueError("the optimizer's state must consist of state and param_groups")
    _check_groups(stored["param_groups"], optimizer.state_dict()["param_groups"], is_forced)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    settings = [_settings_of(group, config) for group in optimizer.param_groups for _ in group["params"]]
    slots = stored["state"]
    # Before the first step that was finite there is none.
    if not isinstance(slots, dict) or (slots and set(slots) != set(range(len(parameters)))):
        raise ValueError(f"the optimizer's state is not that of {len(parameters)} weights")
    fresh: dict[tuple[Any, ...], dict[str, Any]] = {}
    for index, slot in slots.items():
        parameter = parameters[index]
        kind = tuple(parameter.shape), parameter.dtype, settings[index].optimizer
        if kind not in fresh:
            fresh[kind] = _fresh_slot(parameter, settings[index])
        _check_alike(f"optimizer.state[{index}]", slot, fresh[kind], parameter if is_forced else None)
    return {
        **stored,
        "state": {index: _copied(slot, parameters[index]) for index, slot in slots.items()},
    }


def check_rank(stored: Any, generators: dict[str, Any], sums: Iterable[str]) -> dict[str, Any]:
    """What was stored for a rank, if it has states of generators such as the live ones in
    `generators`, and scalars for some of `sums`."""
    if not isinstance(stored, dict) or not {"generators", "interval_loss"} <= stored.keys():
        raise ValueError("a rank lacks its generators or its interval_loss")
    _check_generators(stored["generators"], generators)
    figures = stored.get("interval_figures", {})
    if not isinstance(figures, dict) or not figures.keys() <= set(sums):
        raise ValueError(f"interval_figures must be some of {', '.join(sums)}")
    for name, value in {"interval_loss": stored["interval_loss"], **figures}.items():
        if not isinstance(value, Tensor) or value.ndim:
            raise ValueError(f"{name} is not a scalar tensor")
        _check_values(name, value)
    return stored


# ---- the optimizer


def _check_groups(stored: Any, live: list[dict[str, Any]], is_forced: bool) -> None:
    """The stored groups have the settings of the live ones. Of a resume that is forced, their values
    may differ within their range, and are kept."""
    if not isinstance(stored, list) or len(stored) != len(live):
        raise ValueError(f"the optimizer must have {len(live)} groups of weights")
    for number, (group, wanted) in enumerate(zip(stored, live, strict=True)):
        where = f"optimizer.param_groups[{number}]"
        if not isinstance(group, dict) or group.keys() != wanted.keys():
            raise ValueError(f"{where} must have {', '.join(map(str, wanted))}")
        for name, value in wanted.items():
            found = group[name]
            if name != "lr" and not is_forced:  # the learning rate is set before every step
                fits = _is_same(found, value) or (name == "betas" and _is_same(found, list(value)))
            elif name == "betas":
                fits = type(found) in (tuple, list) and len(found) == len(value)
                fits = fits and all(_is_number(beta) and 0 <= beta < 1 for beta in found)
            elif _is_number(value):  # the learning rate, the decay, epsilon
                # Some exponents are negative, and never change.
                fits = _is_number(found) and (0 <= found <= LARGEST or found == value < 0)
            else:  # the weights' numbers, and switches between kernels
                fits = _is_same(found, value)
            if not fits:
                raise ValueError(f"{where}: {name} is {str(found)[:60]}, and {str(value)[:60]} here")


def _settings_of(group: Mapping[str, Any], config: TrainConfig) -> TrainConfig:
    """The settings that make the optimizer of a group: beside Muon, that is AdamW."""
    # What it keeps of a weight does not depend on its rate.
    config = dataclasses.replace(config, loraplus_lr_ratio=1.0, learning_rate_ratios={})
    is_adamw = config.optimizer == "muon" and "betas" in group
    return dataclasses.replace(config, optimizer="adamw") if is_adamw else config


def _fresh_slot(parameter: nn.Parameter, config: TrainConfig) -> dict[str, Any]:
    """What the optimizer keeps for such a parameter after its first step."""
    # Its own memory for the values alone: what they are does not matter.
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = twin.detach()
    optimizer = make_optimizer({"layers.0.twin": twin}, config)
    optimizer.step()
    return optimizer.state_dict()["state"][0]


def _check_alike(where: str, found: Any, wanted: Any, parameter: Tensor | None) -> None:
    """`found` has the structure of `wanted`, and values that an optimizer can have. A moment of
    `parameter`, if that is given, may have any precision."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            raise ValueError(f"{where} must have {', '.join(map(str, wanted))}")
        for name, value in wanted.items():
            _check_alike(f"{where}.{name}", found[name], value, parameter)
    elif isinstance(wanted, Tensor):
        # A moment comes to the dtype of its parameter when it is loaded.
        is_moment = parameter is not None and wanted.shape == parameter.shape and wanted.is_floating_point()
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            raise ValueError(f"{where} is not a tensor of shape {tuple(wanted.shape)}")
        if found.dtype != wanted.dtype and not (is_moment and found.is_floating_point()):
            raise ValueError(f"{where} is of {found.dtype}, not {wanted.dtype}")
        if found.is_floating_point():
            _check_values(where, found, least=0 if where.endswith(_NEVER_NEGATIVE) else None)
    elif type(found) is not type(wanted) or (_is_number(wanted) and not 0 <= found <= LARGEST):
        raise ValueError(f"{where} is {str(found)[:60]}")


def _copied(value: Any, parameter: Tensor) -> Any:
    """A copy of what is stored of this parameter; of a divided one, this rank's share of each
    moment."""
    if isinstance(value, Tensor):
        is_moment = value.shape == parameter.shape
        return share_of(value, parameter if is_moment else value)
    if isinstance(value, dict):
        return {name: _copied(entry, parameter) for name, entry in value.items()}
    return value


# ---- generators


def _check_generators(stored: Any, live: dict[str, Any]) -> None:
    if not isinstance(stored, dict) or not {"python", "numpy", "torch"} <= stored.keys():
        raise ValueError("the states of the generators are incomplete")
    _check_python(stored["python"])
    _check_numpy(stored["numpy"])
    # Another kind of device, by a resume that is forced, has another generator, or none.
    for name in ("torch", *({"device"} & stored.keys() & live.keys())):
        found, wanted = stored[name], live[name]
        if not isinstance(found, Tensor) or (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise ValueError(f"the state of the generator {name} is not one of this version of torch")
    try:
        torch.Generator().set_state(stored["torch"])
    except RuntimeError as error:
        raise ValueError(f"the state of the generator torch: {error}") from None


def _check_python(state: Any) -> None:
    """`random.getstate()`: (version, 624 words and a position, a number in reserve)."""
    if (
        type(state) is not tuple
        or len(state) != 3
        or not _is_same(state[0], 3)
        or type(state[1]) is not tuple
    ):
        raise ValueError("the state of Python's generator is not one of its version 3")
    _, words, reserve = state
    fits = len(words) == _MT19937_WORDS + 1 and all(type(word) is int for word in words)
    if not fits or not all(0 <= word < 2**32 for word in words) or words[-1] > _MT19937_WORDS:
        raise ValueError("the state of Python's generator is out of range")
    if reserve is not None and not _is_number(reserve):
        raise ValueError(f"the state of Python's generator ends with {repr(reserve)[:60]}")


def _check_numpy(state: Any) -> None:
    """`np.random.get_state()` as `litlora.train.resume.generators` stores it."""
    if type(state) is not list or len(state) != 5 or not _is_same(state[0], "MT19937"):
        raise ValueError("the state of numpy's generator is not one of its kind MT19937")
    _, keys, position, has_reserve, reserve = state
    if not isinstance(keys, Tensor) or keys.shape != (_MT19937_WORDS,) or keys.dtype != torch.int64:
        raise ValueError(f"the state of numpy's generator does not have {_MT19937_WORDS} words")
    in_range = bool(((keys >= 0) & (keys < 2**32)).all())
    # numpy itself does not check the position, and reads from there.
    if not in_range or type(position) is not int or not 0 <= position <= _MT19937_WORDS:
        raise ValueError("the state of numpy's generator is out of range")
    if type(has_reserve) is not int or has_reserve not in (0, 1) or not _is_number(reserve):
        raise ValueError(f"the state of numpy's generator ends with {repr([has_reserve, reserve])[:99]}")


# ---- values


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST
    return type(value) is float and math.isfinite(value)


def _is_same(found: Any, wanted: Any) -> bool:
    """Whether two plain values are equal; a tensor has no truth value to compare by."""
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    return found == wanted


def _check_values(where: str, tensor: Tensor, least: float | None = None) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{where} is of {tensor.dtype}, not a floating-point type")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{where} holds values that are not finite")
    if least is not None and tensor.numel() and float(tensor.min()) < least:
        raise ValueError(f"{where} holds values below {least}")
