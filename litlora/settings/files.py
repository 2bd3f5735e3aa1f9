"""The commands for LoRA files and the models they belong to, whatever models these are."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from litlora.errors import setting
from litlora.settings.checks import (
    check,
    check_finite,
    check_seed,
    check_size,
    check_value,
    check_weights,
)

FileType = Literal["safetensors", "pytorch"]
OutputDtype = Literal["float32", "fp32", "float16", "fp16", "bfloat16", "bf16"]
MergedDtype = Literal["float32", "fp32", "float16", "fp16", "bfloat16", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class LoRAExtractor:
    """Extract a LoRA from the difference of two models: what, added to the source, gives the
    target."""

    SHORTENED: ClassVar = (
        *("source_model", "source_type", "target_model", "target_type"),
        *("output", "output_format", "rank", "output_dtype", "diff_only"),
    )
    """Options that may be shortened to any unambiguous beginning."""

    source_model: str
    """The model before: a file, or a folder of them. For the formats peft and litlora also any
    checkpoint directory."""
    source_type: FileType = "safetensors"
    """Type of its files; ignored for a checkpoint directory."""
    target_model: str
    """The model after, likewise."""
    target_type: FileType = "safetensors"
    """Type of its files."""
    output: str
    """File to write, replacing one that exists; .safetensors or .pt is appended if it is missing.
    For the formats peft and litlora a directory."""
    output_format: FileType = "safetensors"
    """Type of the file to write."""
    rank: int | Literal["auto"] = 32
    """Rank of every update, at most the smaller side of its weight; auto: what energy, sv_ratio or
    max_error asks for, layer by layer."""
    output_dtype: OutputDtype = "bf16"
    """Number format of the result."""
    diff_only: bool = False
    """Store every difference in full, without decomposing it."""
    format: Literal["comfyui", "kohya", "peft", "litlora"] = "comfyui"
    """Names in the result: comfyui (diffusion_model.LAYER.lora_up.weight, no alpha), kohya
    (lora_unet_LAYER.lora_up.weight, .alpha), peft (a folder that PeftModel loads), litlora (an
    adapter directory, for chat, training and merging here)."""
    svd: Literal["randomized", "exact"] = "randomized"
    """randomized: many times as fast, with an error proved to be at most 1% above the least
    possible; exact: a full decomposition."""
    energy: float | None = None
    """With rank auto: fraction of the squared difference to keep, such as 0.95."""
    sv_ratio: float | None = None
    """With rank auto: keep the singular values that are at least the layer's largest divided by
    this, such as 20. The randomised decomposition slightly underestimates small ones."""
    max_error: float | None = None
    """With rank auto: largest error of a layer relative to its difference, such as 0.1."""
    min_size: int | None = None
    """Weights with fewer values are stored as full differences; default: 1,000,000 for comfyui and
    kohya, 0 for peft and litlora."""
    seed: int = 1337
    """Seed of the randomised decomposition."""
    allow_mismatch: bool = False
    """Leave out tensors that cannot be subtracted (in one model only, of different shapes,
    integers); they are listed either way."""
    overwrite: bool = False
    """For the formats peft and litlora: replace what the directory holds."""

    def __post_init__(self) -> None:
        for name in ("source_model", "target_model", "output"):
            check(bool(getattr(self, name)), f"{setting(name)} is empty: name a file")
        check_seed(self.seed)
        self._check_rank()
        check_value(self, "min_size", self.min_size is None or self.min_size >= 0, "must be 0 or more")
        self._check_format()

    def _check_rank(self) -> None:
        given = {name: getattr(self, name) for name in ("energy", "sv_ratio", "max_error")}
        criteria = {name: value for name, value in given.items() if value is not None}
        rank = setting("rank")
        check_value(self, "rank", self.rank == "auto" or self.rank >= 1, "must be at least 1")
        check(
            self.rank != "auto" or bool(criteria),
            f"{rank} auto: needs {setting('energy')}, {setting('sv_ratio')} or {setting('max_error')}",
        )
        for name, value in criteria.items():
            check(self.rank == "auto", f"{setting(name)}: is for {rank} auto, not for {rank} {self.rank}")
            if name == "sv_ratio":
                check_value(self, name, 1 < value < math.inf, "must be above 1, and finite")
            else:
                check_value(self, name, 0 < value < 1, "must be above 0 and below 1")

    def _check_format(self) -> None:
        chosen = f"{setting('format')} {self.format}"
        for name, default in (("diff_only", False), ("output_format", "safetensors")):
            check(
                not self.is_directory or getattr(self, name) == default,
                f"{setting(name)}: is for the formats comfyui and kohya; leave it out for {chosen}",
            )
        check(
            self.is_directory or not self.overwrite,
            f"{setting('overwrite')}: is for directories; with {chosen} a file is replaced",
        )

    @property
    def error_bound(self) -> float:
        """The largest error of a layer that was asked for, relative to its difference; 1 if none
        was."""
        bounds = [self.max_error, None if self.energy is None else math.sqrt(1 - self.energy)]
        return min((bound for bound in bounds if bound is not None), default=1.0)

    @property
    def lowest_size(self) -> int:
        """min_size, resolved."""
        return self.min_size if self.min_size is not None else 0 if self.is_directory else 1_000_000

    @property
    def is_directory(self) -> bool:
        """Whether the result is a directory."""
        return self.format in ("peft", "litlora")


@dataclass(frozen=True, kw_only=True)
class LoRAMerger:
    """Merge LoRA files into a model's files, whatever model it is: writes its files again with the
    updates added."""

    SHORTENED: ClassVar = (
        *("source_model", "source_type", "lora_model", "lora_type"),
        *("output", "output_format", "alpha", "output_dtype"),
    )
    """Options that may be shortened to any unambiguous beginning."""

    source_model: str
    """The model: a file, or a folder of them."""
    source_type: FileType = "safetensors"
    """Type of its files."""
    lora_model: list[str]
    """LoRA files (with the names of ComfyUI or kohya, or lora_A and lora_B) or folders of PEFT,
    mlx-lm or litlora. Several are added up."""
    lora_type: FileType = "safetensors"
    """Type of the LoRA files."""
    output: str
    """File to write, replacing one that exists; .safetensors or .pt is appended if it is
    missing."""
    output_format: FileType = "safetensors"
    """Type of the file to write."""
    alpha: float = 1.0
    """Strength: a factor of all LoRAs, on top of the alpha that a file itself holds."""
    output_dtype: MergedDtype = "bf16"
    """Number format of the result; integers keep theirs. fp8: every tensor as the model stores it,
    which must have weights in 8 bits; those that change get new scales, if they have scales."""
    weights: list[float] = field(default_factory=list)
    """A factor for each LoRA, in their order; default: 1 each."""
    max_shard_size: str | None = None
    """Largest file, in bytes, MB or GB: a larger result is divided into numbered files with an
    index; default: one file."""
    allow_unmatched: bool = False
    """Go on without updates that fit no tensor of the model; they are listed either way."""

    def __post_init__(self) -> None:
        check(len(self.lora_model) > 0, f"{setting('lora_model')} is empty: name a LoRA")
        for name in ("source_model", "output"):
            check(bool(getattr(self, name)), f"{setting(name)} is empty: name a file")
        check_finite("alpha", self.alpha)
        check_weights(self.weights, len(self.lora_model), "LoRA")
        if self.max_shard_size is not None:
            check_size("max_shard_size", self.max_shard_size)
            check(
                self.output_format == "safetensors",
                f"{setting('max_shard_size')}: is for {setting('output_format')} safetensors",
            )
