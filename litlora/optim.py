"""The optimizer, its parameter groups, and the learning-rate schedule: a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from litlora.settings import TrainConfig


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0 ... total_steps - 1: linear warm-up, then a cosine towards min_lr_ratio of the peak.

    With w warm-up steps, step s < w has (s + 1) / (w + 1) of the peak, so that no step is taken at a rate of zero;
    the peak is at step w, and without a warm-up at the first step.
    """
    warmup = config.warmup_steps if isinstance(config.warmup_steps, int) else int(config.warmup_steps * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)  # below 1: the last step still learns
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over what requires a gradient; vectors (norms, biases) are not decayed."""
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
