"""A full model, whatever format it came from: every weight by our names, and the architecture."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.frozen.bitsandbytes import Quantized
from litlora.model import GPT
from litlora.storage.fingerprint import fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights may be stored in."""


@dataclass(frozen=True)
class FullModel:
    """The weights of a model, memory-mapped: nothing is read before it is used."""

    directory: Path
    file: Path
    """What an error about the weights should name."""
    tensors: dict[str, Tensor | Quantized]
    config: ModelConfig
    merged: dict[str, str] | None = None
    """Of a merged model, the fingerprints of the "chain" that it was made from and of its own
    weights then, the "result"."""

    kind: ClassVar[str] = "full"

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights."""
        return fingerprint(self.tensors)

    def answers_to(self, wanted: str) -> bool:
        """Whether these weights are those of that fingerprint: their own, or that of the chain that
        they were merged from."""
        # Merged weights answer to their chain's fingerprint only while nobody has touched them.
        chain = {"chain": wanted, "result": self.fingerprint}
        return wanted == self.fingerprint or self.merged == chain

    def checked(self) -> "FullModel":
        """The same, if it fits its architecture: it may be merged or converted without being built.
        Raises CheckpointError if it does not."""
        if odd := [name for name, tensor in self.tensors.items() if tensor.dtype not in DTYPES]:
            kind = str(self.tensors[odd[0]].dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.file}: {odd[0]} is {kind}; weights are read in float32, bfloat16, float16 and float64"
            )
        config, count = self.config, len(self.tensors)
        sparse_layers = config.num_hidden_layers - len(config.dense_layers)
        modules = config.num_hidden_layers + sparse_layers * (config.num_experts or 0)
        if config.qk_norm == "each_head":
            modules += config.num_hidden_layers * config.num_attention_heads
        if modules > count:  # before a model of that many parts is built to compare with
            raise CheckpointError(
                f"{self.file}: holds {count} weights; its configuration describes {modules:,} modules or more"
            )
        try:
            GPT.without_weights(config).check_fit(self.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {error}") from None
        return self
