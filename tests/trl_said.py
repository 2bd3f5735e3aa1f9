"""What TRL said of a tiny model (trl_files/make.py), and what the tests of objectives share."""

import json
from array import array
from types import SimpleNamespace

import torch
from conftest import REPO
from safetensors import safe_open

from litlora.config import ModelConfig
from litlora.data.examples import Example
from litlora.model import GPT
from litlora.train.parallel import Parallel

CPU = torch.device("cpu")
ALONE = Parallel(CPU)
"""The part of `Parallel` that an objective sees, of a single process."""


def trl_said() -> SimpleNamespace:
    """The tensors of TRL, and the records and the architecture that it was asked about."""
    with safe_open(REPO / "tests/trl_files/expected.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = {name: json.loads(file.metadata()[name]) for name in ("pairs", "labelled", "config")}
        return SimpleNamespace(tensors=tensors, **facts)


def model_of(trl: SimpleNamespace, name: str) -> GPT:
    """ "policy" or "reference"."""
    facts = {key: value for key, value in trl.config.items() if key != "initializer_range"}
    config = ModelConfig(**facts, head_dim=4, tie_word_embeddings=False, norm_eps=1e-6)
    prefix = f"{name}."
    tensors = {
        key.removeprefix(prefix): tensor.clone()  # a test may train it
        for key, tensor in trl.tensors.items()
        if key.startswith(prefix)
    }
    return GPT.from_tensors(config, tensors)


def answer(prompt: list[int], ids: list[int]) -> Example:
    """An answer to a prompt, which alone is learned."""
    return Example(array("i", [*prompt, *ids]), ((len(prompt), len(prompt) + len(ids)),))
