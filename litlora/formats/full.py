"""A full model, whatever its format: every weight by our names, and the architecture."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats.families import HF_CONFIG_FILE, load_config, write_config
from litlora.formats.folder import notice
from litlora.formats.parts import Parts
from litlora.frozen import stored
from litlora.frozen.few_bits import Quantized
from litlora.model import kind_of
from litlora.storage.dtypes import dtype_name
from litlora.storage.fingerprint import fingerprint
from litlora.transformers_config import NOTICE, Architecture, TransformersConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes in which weights may be stored."""
TABLES = (torch.int64, torch.int32, torch.bool)
"""Those of tables beside them: which experts a token id picks (DeepSeek V4)."""


@dataclass(frozen=True)
class FullModel:
    """The weights of a model, memory-mapped: a tensor is read when it is used."""

    directory: Path
    file: Path
    """What an error about the weights names."""
    tensors: dict[str, Tensor | Quantized]
    config: Architecture
    merged: dict[str, str] | None = None
    """Of a merged model: the fingerprint of the "chain" that it was made from, and that of its own
    weights at that time, the "result"."""
    shards: tuple[Path, ...] = ()
    """The files that hold the weights; none: `file` alone."""
    parts: Parts | None = None
    """What a multimodal model has beside its language model, which these weights are."""
    apart: bool = False
    """Its folder has the layers of each expert by themselves where one tensor can hold them all."""
    left_out: tuple[str, ...] = ()
    """Weights beside the model that nothing reads: what they are."""

    kind: ClassVar[str] = "full"

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights."""
        return fingerprint(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Size of the weights' files."""
        return sum(file.stat().st_size for file in self.shards or (self.file,))

    @property
    def notices(self) -> list[str]:
        """What every command tells about these weights, a line each."""
        parts = self.parts.notice if self.parts else None
        through = f"{self.directory}: {NOTICE}" if isinstance(self.config, TransformersConfig) else None
        unused = [
            f"{self.directory}: {what} are not used, and no model made from it has them"
            for what in self.left_out
        ]
        stored_as = stored.notice(self.directory, self.tensors)
        lines = (stored_as, notice(self.file), parts, through, *unused)
        return [line for line in lines if line]

    @property
    def has_hf_config(self) -> bool:
        """Whether a config.json beside the weights names the Hugging Face family."""
        return (self.directory / HF_CONFIG_FILE).is_file()

    def family(self, preferred: str | None = None) -> str:
        """The Hugging Face family: the one that config.json names; without it, `preferred` or the
        plainest that can express the architecture. Raises CheckpointError if none can."""
        if isinstance(self.config, TransformersConfig):
            return self.config.model_type
        if self.has_hf_config:
            return load_config(self.directory)[0]
        return write_config(self.config, preferred)["model_type"]

    def answers_to(self, wanted: str) -> bool:
        """Whether that fingerprint identifies these weights: it is their own, or that of the chain
        that they were merged from."""
        # Merged weights answer to their chain's fingerprint only while they are unchanged.
        chain = {"chain": wanted, "result": self.fingerprint}
        return wanted == self.fingerprint or self.merged == chain

    def checked(self) -> "FullModel":
        """The same model. Raises CheckpointError if the weights do not fit the architecture: a
        merge or a conversion never builds the model, which would tell."""
        # A model of transformers may hold tables of integers: whether in the right places, it tells itself.
        known = (*DTYPES, *TABLES) if isinstance(self.config, TransformersConfig) else DTYPES
        if odd := [name for name, tensor in self.tensors.items() if tensor.dtype not in known]:
            dtype = dtype_name(self.tensors[odd[0]].dtype)
            raise CheckpointError(
                f"{self.file}: {odd[0]} is {dtype}; weights must be in float32, bfloat16, float16 or float64"
            )
        config, count = self.config, len(self.tensors)
        modules = config.least_modules
        if modules > count:  # before a model of that many parts is built to compare with
            raise CheckpointError(
                f"{self.file}: holds {count} weights; its configuration describes {modules:,} modules or more"
            )
        try:
            kind_of(config).without_weights(config).check_fit(self.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {error}") from None
        return self
