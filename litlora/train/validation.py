"""The loss of examples that are not learned."""

from collections.abc import Sequence
from typing import Any

import torch

from litlora.lora.mode import evaluating
from litlora.settings import TrainConfig
from litlora.train.objective import Objective
from litlora.train.parallel import Parallel
from litlora.train.plan import evaluation_plan


@torch.no_grad()
def evaluate(parallel: Parallel, objective: Objective, examples: Sequence[Any], config: TrainConfig) -> float:
    """The loss of all examples by their weight: for SFT the mean over supervised tokens, in
    nats."""
    micro_batches = evaluation_plan(objective.lengths(examples), config)
    exact = torch.float32 if parallel.device.type == "mps" else torch.float64  # mps has no float64
    total = torch.zeros((), dtype=exact, device=parallel.device)
    with evaluating(objective):
        objective.begin_step(examples, parallel)
        for micro, counts in parallel.shared(micro_batches):
            loss, _ = objective(objective.batch([examples[index] for index in micro], parallel.device))
            total += loss if counts else 0
    weight = sum(objective.weight(example) for example in examples)
    return float(parallel.sum(total)) / max(1, weight)
