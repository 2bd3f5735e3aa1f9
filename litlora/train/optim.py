"""The optimizer, its parameter groups, and the learning-rate schedule: a pure function of the
step."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from litlora.errors import MissingExtraError, UserError, setting
from litlora.settings import TrainConfig


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0 ... total_steps - 1: linear warm-up, then a cosine towards
    min_lr_ratio of the peak.

    With w warm-up steps, step s < w has (s + 1) / (w + 1) of the peak, so that no step is taken at
    a rate of zero; the peak is at step w, and without a warm-up at the first step.
    """
    warmup = (
        config.warmup_steps
        if isinstance(config.warmup_steps, int)
        else int(config.warmup_steps * total_steps)
    )
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)  # below 1: the last step still learns
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the compiler's decorators around its methods: they import
    torch._dynamo, which takes half as long as all of torch."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over what requires a gradient; vectors (norms, biases) are
    not decayed."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind, more = optimizer_class(config.optimizer)
    return kind(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        **more,
    )


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class that the setting names, and its extra arguments. Raises MissingExtraError where
    bitsandbytes is needed and not installed."""
    if name == "adamw":
        return AdamW, {"fused": True}
    try:
        from bitsandbytes import optim
    except ImportError:
        raise MissingExtraError(
            f"{setting('optimizer')} {name} needs bitsandbytes; "
            "install it with: pip install 'litlora[bitsandbytes]'"
        ) from None
    return {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }[name], {}


def check_optimizer(
    name: str,
    device: torch.device,
    find: Callable[[str], tuple[type[torch.optim.Optimizer], dict[str, Any]]] = optimizer_class,
) -> None:
    """Raise UserError, before any work is done, if the optimizer that `find` returns for this name
    cannot make a step on this device."""
    kind, more = find(name)
    if name.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"{setting('optimizer')} {name}: moves its moments between a GPU's memory and the machine's, "
            f"so it needs CUDA, not {device.type}"
        )
    weight = nn.Parameter(torch.zeros(64, 64, device=device))  # the size from which 8 bits are used
    weight.grad = torch.zeros_like(weight)
    try:
        kind([weight], **more).step()
    except Exception as error:  # libraries raise all kinds for a device they were not built for
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{setting('optimizer')} {name} does not work on {device.type} here: {reason[0]}; use adamw"
        ) from None


def state_bytes(trainable: Iterable[nn.Parameter], config: TrainConfig) -> int:
    """Memory of the optimizer's two moments: in the dtype of the weights, or a byte a value. Paged
    ones count as if none were paged out."""
    return sum(2 * (p.numel() if config.optimizer.endswith("8bit") else p.nbytes) for p in trainable)
