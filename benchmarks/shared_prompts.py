"""A step of DPO whose two answers share the computation of their prompt, beside one that computes the
prompt with each: processor time, on the quickstart base.

    python benchmarks/shared_prompts.py

Forward and backward of one micro-batch of random tokens, interleaved, the medians of seven rounds on
one thread.
"""

import random
import time
from array import array
from pathlib import Path
from statistics import median

import torch

from litlora.data.examples import Example
from litlora.data.pairs import PairExample
from litlora.load import load
from litlora.lora import LoRAConfig, add_lora
from litlora.settings import TrainConfig
from litlora.train.preference import Preference

BASE = Path(__file__).resolve().parents[1] / "checkpoints/litlora/quickstart"
SIZES = ((30, 10), (60, 60), (150, 100), (150, 250), (300, 100))
"""Tokens of the prompt, and of each answer."""
TOKENS = 1600
ROUNDS = 7


class Apart(Preference):
    """Every answer with a prompt of its own."""

    shares_prompts = False


def pair(prompt: int, answer: int) -> PairExample:
    ids = [[random.randrange(3, 2000) for _ in range(size)] for size in (prompt, answer, answer)]
    sides = [Example(array("i", ids[0] + own), ((prompt, prompt + answer),)) for own in ids[1:]]
    return PairExample(*sides, reference=(-10.0, -12.0))


def main() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    model = load(BASE).model.requires_grad_(False)
    add_lora(model, LoRAConfig())
    objectives = [kind(model, TrainConfig()) for kind in (Preference, Apart)]
    print("prompt answer  shared   apart  apart / shared")
    for prompt, answer in SIZES:
        pairs = [pair(prompt, answer) for _ in range(max(2, TOKENS // (2 * (prompt + answer))))]
        seconds: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for objective, taken in zip(objectives, seconds, strict=True):
                start = time.process_time()
                loss, _ = objective(objective.batch(pairs, torch.device("cpu")))
                loss.backward()
                taken.append(time.process_time() - start)
        shared, apart = map(median, seconds)
        print(f"{prompt:6} {answer:6}  {shared:.3f}  {apart:.3f}  {apart / shared:.2f}")


if __name__ == "__main__":
    main()
