"""The commands for adapters: merge, resize, combine, export, inspect."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from litlora.errors import setting
from litlora.settings.checks import (
    check,
    check_finite,
    check_positive,
    check_seed,
    check_value,
    check_weights,
)
from litlora.settings.styles import check_prompt_style


@dataclass(frozen=True, kw_only=True)
class MergeLoRA:
    """Merge an adapter into its base: writes a full checkpoint that can be trained further."""

    lora_path: list[str]
    """The adapter: a lit_model.pth, or the directory that holds it. Several adapters, trained on
    the same base, are added up."""
    out_dir: str
    """Directory to write."""
    checkpoint_dir: str | None = None
    """The base (--base_checkpoint_dir means it too); default: the one the adapter was trained on. It
    may itself be an adapter (a chain). Without lora_path: the adapter."""
    weights: list[float] = field(default_factory=list)
    """The factor of each adapter, in the order of lora_path; default: 1 each."""
    strength: float = 1.0
    """A factor of all of them: 0 gives the base's weights to the bit, 1 what was trained, -1 its
    opposite. It does not apply to a base that is an adapter itself."""
    onto: Literal["dequantized", "original"] | None = None
    """What the update of an adapter is added to that was trained with quantize. dequantized, the
    default: the values of the bits that it was trained on, which gives the very model that was
    trained; original: the base's weights as they are stored. Nothing is quantised again."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Number format of the result; default: the base's, tensor by tensor."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """nearest: to the nearest value; stochastic: up or down at random so that the mean is right,
    for updates smaller than the steps between bf16 or fp16 values."""
    seed: int = 1337
    """Seed of the stochastic rounding."""
    verify: bool = True
    """Compare what was written with the base and its live adapters before it gets its name, if the
    model fits in memory."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""
    allow_base_mismatch: bool = False
    """Merge into a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check(len(self.lora_path) > 0, f"{setting('lora_path')} is empty: name an adapter")
        check_weights(self.weights, len(self.lora_path), "adapter")
        check_finite("strength", self.strength)
        check_seed(self.seed)
        check_value(
            self,
            "rounding",
            self.rounding == "nearest" or self.dtype != "fp32",
            f"is for bf16 and fp16, not for {setting('dtype')} fp32; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class _AdapterToAdapter:
    """What the commands share that write an adapter of another size."""

    out_dir: str
    """Directory to write."""
    rank: int | None = None
    """Rank of the result; with energy or max_error, the highest rank that a layer may get."""
    energy: float | None = None
    """Give every layer the lowest rank that keeps this fraction of its update's squared norm: 0.99
    leaves an error of 10%."""
    max_error: float | None = None
    """The same, stated as the error: the largest fraction of the update's norm (Frobenius) that may
    be lost in a layer."""
    checkpoint_dir: str | None = None
    """The base (--base_checkpoint_dir means it too); default: the one the adapter was trained on.
    Without lora_path: the adapter."""
    seed: int = 1337
    """Seed of everything random."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_positive(self, "rank")
        above_0 = self.energy is None or 0 < self.energy <= 1
        check_value(self, "energy", above_0, "must be above 0 and at most 1")
        below_1 = self.max_error is None or 0 <= self.max_error < 1
        check_value(self, "max_error", below_1, "must be at least 0 and below 1")
        check(
            self.energy is None or self.max_error is None,
            f"{setting('energy')} and {setting('max_error')} mean the same; name one",
        )

    @property
    def error_bound(self) -> float | None:
        """max_error, whichever way it was given: the energy is one minus its square."""
        return math.sqrt(1 - self.energy) if self.energy is not None else self.max_error


@dataclass(frozen=True, kw_only=True)
class ResizeLoRA(_AdapterToAdapter):
    """Give an adapter another rank: exactly where no rank is lost, else with the least possible
    error."""

    lora_path: str
    """The adapter: a lit_model.pth, or the directory that holds it. Or a LoRA file of another tool
    (.safetensors, as kohya and ComfyUI write them); the result is then a file of the same name and
    format in out_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.rank is not None or self.error_bound is not None,
            f"name the size of the result: {setting('rank')}, {setting('energy')} or {setting('max_error')}",
        )


@dataclass(frozen=True, kw_only=True)
class CombineLoRA(_AdapterToAdapter):
    """Combine several adapters that were trained on the same base into one. Without rank, energy or
    max_error, svd gets the rank of the largest adapter, and the modes that drop or elect entries
    get the sum of the ranks; linear and cat need none of the three."""

    lora_path: list[str]
    """The adapters: each a lit_model.pth, or the directory that holds it. Or LoRA files of another
    tool (.safetensors, as kohya and ComfyUI write them); the result is then a file in out_dir with
    the name and format of the first."""
    weights: list[float] = field(default_factory=list)
    """The factor of each, in the order of lora_path, of any sign; default: 1 each. An adapter of
    weight 0 is left out."""
    mode: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear"
    """linear: the weighted sum of the updates, at the rank it has; cat: the same, with all factors
    concatenated; svd: the update of a given rank that is nearest to the sum; magnitude_prune,
    dare_linear: the sum of the largest, or of random, entries of each update; ties, dare_ties: of
    those entries, the mean of the ones that agree with the elected sign."""
    density: float = 1.0
    """Fraction of an update's entries that magnitude_prune, ties and the dare modes keep; 1 drops
    nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.lora_path) > 0, f"{setting('lora_path')} is empty: name an adapter")
        check_weights(self.weights, len(self.lora_path), "adapter")
        check(any(self.each_weight), f"{setting('weights')}: all are 0, so nothing is left")
        check_value(self, "density", 0 < self.density <= 1, "must be above 0 and at most 1")
        mode = setting("mode")
        exact = self.mode in ("linear", "cat")
        check(
            not exact or (self.rank is None and self.error_bound is None),
            f"{mode} {self.mode} is exact and finds its rank itself; {mode} svd takes "
            f"{setting('rank')}, {setting('energy')} and {setting('max_error')}",
        )
        drops = not exact and self.mode != "svd"
        check_value(
            self,
            "density",
            drops or self.density == 1,
            f"{mode} {self.mode} drops nothing; ties, dare_linear, dare_ties and magnitude_prune do",
        )

    @property
    def each_weight(self) -> list[float]:
        """A weight for each adapter."""
        return self.weights or [1.0] * len(self.lora_path)


@dataclass(frozen=True, kw_only=True)
class ExportPEFT:
    """Write an adapter as a PEFT folder, which PeftModel.from_pretrained loads onto the Hugging
    Face base, or as a folder of mlx-lm."""

    lora_path: str
    """The adapter: a lit_model.pth, or the directory that holds it."""
    out_dir: str
    """Directory to write."""
    format: Literal["peft", "mlx"] = "peft"
    """Whose folder to write."""
    checkpoint_dir: str | None = None
    """The base (--base_checkpoint_dir means it too); default: the one the adapter was trained on.
    Without lora_path: the adapter."""
    base_model: str | None = None
    """What the folder calls its base: a name on the hub or a directory; default: the base's own
    directory."""
    model_type: str | None = None
    """The Hugging Face family that the folder is for, such as llama or phi3, which names and fuses
    the layers. Default: that of the base, if it is a Hugging Face folder, else the simplest family
    that can express the architecture."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""


@dataclass(frozen=True, kw_only=True)
class ExportGGUF:
    """Write a model as a GGUF file, which llama.cpp and Ollama run, with an Ollama Modelfile beside
    it. Adapters are merged on the way, or written alone."""

    checkpoint_dir: str
    """Any checkpoint directory: full, an adapter or a chain of them."""
    out_dir: str
    """Directory to write."""
    dtype: (
        Literal[
            "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K"
        ]
        | None
    ) = None
    """Number format of the matrices; default: F16, and F32 of an adapter alone. Those with K are made
    by llama.cpp's own quantiser: llama-quantize on the PATH, or the extra llama-cpp."""
    adapter_only: bool = False
    """Write the outermost adapter alone, for llama.cpp to use on a GGUF file of its base."""
    base_model: str | None = None
    """With adapter_only: what the Modelfile names as the model below the adapter, a GGUF file or a
    model of Ollama's; without it no Modelfile is written."""
    prompt_style: str | None = None
    """How people ask the model: a style or a chat template file, as in training. Default: as it was
    trained."""
    model_type: str | None = None
    """The Hugging Face family whose architecture in llama.cpp is used, such as llama or phi3. Default:
    that of the base, if it is a Hugging Face folder, else the simplest that can express it."""
    verify: bool = True
    """Run the file with llama.cpp beside the live model, if the extra llama-cpp is installed and memory
    allows it, else read it back, before it gets its name."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it is no longer where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_prompt_style(self.prompt_style)
        check_value(
            self,
            "base_model",
            self.base_model is None or self.adapter_only,
            f"is for {setting('adapter_only')} true; leave it out",
        )
        check_value(
            self,
            "dtype",
            not self.adapter_only or self.dtype in (None, "F32", "F16", "BF16"),
            f"with {setting('adapter_only')}, choose F32, F16 or BF16",
        )

    @property
    def number_format(self) -> str:
        """That of the matrices."""
        return self.dtype or ("F32" if self.adapter_only else "F16")


@dataclass(frozen=True, kw_only=True)
class InspectCheckpoint:
    """Say what a checkpoint is: kind, model, base and whether it matches, and how large an
    adapter's updates are."""

    positional: ClassVar[str] = "checkpoint_dir"
    """The setting whose option name may be left out."""

    checkpoint_dir: str
    """Any checkpoint directory, or a LoRA file of another tool; the option's name may be left
    out."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it is no longer where the adapter says."""
    json: bool = False
    """Print everything as JSON."""
