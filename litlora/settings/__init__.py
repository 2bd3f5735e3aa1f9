"""Every setting of every command, once: its name, default, unit and help text. Torch-free.

The docstring under a field is its `--help` text. A command takes one of the dataclasses in the last
part of this file.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from litlora.errors import UserError
from litlora.storage.untrusted import check_pattern

QUICKSTART = "checkpoints/litlora/quickstart"
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
LEAST_ALPHA = 1e-30
"""The smallest magnitude of an alpha, and one over it the largest: fp32 holds them, and every scale
that comes of them."""
PRESETS = ("qv", "attention", "all-linear")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021): h = W x + b + (alpha / rank) · B A x."""

    rank: int = 8
    """Rank of the update: A is (rank, in), B is (out, rank)."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs zeroed in training; W's own input is left alone."""
    targets: str | list[str] = "all-linear"
    """Layers to adapt: qv, attention, all-linear (all but the output head), or a list of layer
    names (q_proj, layers.0.mlp.up_proj) and regular expressions that match a whole name."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023): a high rank then learns as
    fast as a low one."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: {target: rank}, where a target is written as in targets; the
    first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some layers: {target: alpha}, likewise."""
    variant: str = field(default="lora", metadata={"stored": "unless default"})
    """Kind of update: lora, or one that your own code registers (docs/architecture.md)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained whole beside the adapter and stored with it: names, or ends of them (lm_head,
    embed_tokens, norm)."""

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"--lora.rank {self.rank}: must be at least 1")
        object.__setattr__(self, "alpha", float(self.alpha))  # one type in every file
        check_alpha(f"--lora.alpha {self.alpha}", self.alpha)
        check(
            0 <= self.dropout <= 0.999, f"--lora.dropout {self.dropout}: must be at least 0 and at most 0.999"
        )
        check(len(self.targets) > 0, "--lora.targets is empty: an adapter without layers trains nothing")
        for name in (
            "rank_pattern",
            "alpha_pattern",
        ):  # an adapter stores them, and whoever reads it must be able to use them
            for target in getattr(self, name):
                try:
                    check_pattern(target)
                except ValueError as error:
                    raise UserError(f"--lora.{name}: {error}") from None
        for target, rank in self.rank_pattern.items():
            check(rank >= 1, f"--lora.rank_pattern {target}: {rank}: must be at least 1")
        for target, alpha in self.alpha_pattern.items():
            check_alpha(f"--lora.alpha_pattern {target}: {alpha}", alpha)


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where the training examples come from."""

    val_fraction: float = 0.05
    """Share of the examples kept out of training to measure the validation loss; 0 for none."""
    split_seed: int = 42
    """Which examples are kept out."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The data's part in the default out_dir."""

    def __post_init__(self) -> None:
        check(
            0 <= self.val_fraction < 1,
            f"--data.val_fraction {self.val_fraction}: must be at least 0 and below 1",
        )


@dataclass(frozen=True, kw_only=True)
class Alpaca(DataSource):
    """Stanford Alpaca's 52,002 instructions, or the small sample of the same form that comes with
    litlora."""

    source: Literal["auto", "full", "sample"] = "auto"
    """auto: the downloaded file, else download it, else the sample; full: never the sample; sample:
    always the sample."""
    download_dir: str = "data/alpaca"
    """Where the full file is kept."""
    url: str = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
    """Where the full file comes from."""

    @property
    def name(self) -> str:
        return "alpaca"


@dataclass(frozen=True, kw_only=True)
class JSON(DataSource):
    """Your own records with instruction, output and, if you like, input."""

    path: str
    """A .json or .jsonl file, or a directory of them."""

    @property
    def name(self) -> str:
        return "json"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 3
    """Passes over the training examples."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever the epochs; the learning rate's schedule ends
    there."""
    global_batch_size: int = 16
    """Examples an optimizer step learns from, over all devices."""
    packing: bool = True
    """Compute the examples of a step one behind the other, without padding; none sees another.
    false: pad them to the longest of a micro-batch; so that this takes little padding, a step then
    learns from other examples, of like length, micro_batch_size by micro_batch_size."""
    micro_batch_tokens: int | None = None
    """With packing: tokens a device computes at a time, if no example alone has more; default:
    max_seq_length."""
    micro_batch_size: int = 4
    """Without packing: examples a device computes at a time."""
    auto_batch: bool = False
    """Find the largest micro-batch that fits into memory (micro_batch_tokens, or micro_batch_size
    without packing), by a dry run of the longest batch, whatever size is given; with packing, what
    is learned stays the same."""
    max_seq_length: int = 2048
    """Longest example in tokens; a longer one loses the end of its answer, never its end-of-text.
    At most the model's context."""
    mask_prompt: bool = True
    """Learn the answers only; false: learn the prompts too."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int | float = 0.05
    """Steps of linear warm-up; a number below 1 is a share of all steps."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this share of the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of matrices; vectors are never decayed."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW; with its moments in 8 bits (Dettmers et al. 2021), or in memory that moves from the
    GPU to the machine when needed. All but adamw need the extra bitsandbytes."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""
    checkpoint_activations: Literal["auto", "none", "full", "selective"] = "auto"
    """What the backward computes again instead of keeping it: full: every block; selective: every
    block's feed-forward half. auto: none, but full where memory would not hold the longest
    batch."""
    offload_activations: bool = False
    """Keep activations in the machine's memory instead of the GPU's until the backward needs
    them."""
    compile: bool = False
    """Compile the blocks (torch.compile); takes a minute at the start."""
    log_interval: int = 10
    """Steps between two logged lines and rows of metrics.csv."""
    eval_interval: int = 0
    """Steps between two validations; 0: only at the end."""
    save_interval: int = 200
    """Steps between two early checkpoints; 0 for none."""
    keep_checkpoints: int = 2
    """Early checkpoints kept: the newest."""
    max_time: float | None = None
    """Minutes, counted from the start of the command, after which the run stops as on SIGTERM, but
    with exit status 0: it ends the step, saves, and says how to go on."""
    max_bad_steps: int = 5
    """A step whose loss or gradient is not finite changes nothing and is counted; more than this
    many in a row stop the run."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "micro_batch_size", "log_interval", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"--train.{name} {getattr(self, name)}: must be at least 1")
        for name in (
            "eval_interval",
            "save_interval",
            "max_bad_steps",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
        ):
            value = getattr(self, name)
            check(
                math.isfinite(value) and value >= 0, f"--train.{name} {value}: must be 0 or more, and finite"
            )
        check(
            self.micro_batch_tokens is None or self.micro_batch_tokens >= 1,
            f"--train.micro_batch_tokens {self.micro_batch_tokens}: must be at least 1",
        )
        check(
            self.packing or self.auto_batch or self.global_batch_size % self.micro_batch_size == 0,
            f"--train.global_batch_size {self.global_batch_size}: must be a multiple of --train.micro_batch_size {self.micro_batch_size}",
        )
        check(
            not (self.compile and self.offload_activations),
            "--train.compile and --train.offload_activations: what is compiled keeps its activations where they are; take one of the two",
        )
        check(
            self.max_steps is None or self.max_steps >= 1,
            f"--train.max_steps {self.max_steps}: must be at least 1",
        )
        check(
            self.max_time is None or (math.isfinite(self.max_time) and self.max_time > 0),
            f"--train.max_time {self.max_time}: must be a positive number of minutes",
        )
        check(self.max_seq_length >= 2, f"--train.max_seq_length {self.max_seq_length}: must be at least 2")
        check(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"--train.learning_rate {self.learning_rate}: must be a positive, finite number",
        )
        check(
            isinstance(self.warmup_steps, int) or self.warmup_steps < 1,
            f"--train.warmup_steps {self.warmup_steps}: must be a whole number of steps, or a share below 1",
        )
        check(0 <= self.min_lr_ratio <= 1, f"--train.min_lr_ratio {self.min_lr_ratio}: must be from 0 to 1")
        for name in ("beta1", "beta2"):
            check(
                0 <= getattr(self, name) < 1,
                f"--train.{name} {getattr(self, name)}: must be at least 0 and below 1",
            )


def stored_values(settings: Any) -> dict[str, Any]:
    """The values of a settings object by name, as files store them: without a field that is at its
    default and that files written before it existed lack."""
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.metadata.get("stored") != "unless default" or getattr(settings, field.name) != field.default
    }


def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


def check_alpha(what: str, alpha: float) -> None:
    """Raise UserError unless it is a number that fp32 can hold, other than 0: what scales an
    update."""
    size = f"its size from {LEAST_ALPHA:g} to {1 / LEAST_ALPHA:g}"
    check(
        LEAST_ALPHA <= abs(alpha) <= 1 / LEAST_ALPHA, f"{what}: must be a finite number other than 0, {size}"
    )


def check_seed(seed: int, below: int = 2**63) -> None:
    """Raise UserError unless a generator of random numbers takes it."""
    check(0 <= seed < below, f"--seed {seed}: must be at least 0 and below {below:,}")


def num_bytes(size: str) -> int:
    """A size such as 500MB as a number."""
    unit = SIZE_UNITS.get(size[-2:].upper())
    return int(size[:-2]) * unit if unit else int(size)


def check_size(name: str, size: str) -> None:
    """Raise UserError unless it is a size such as 500MB."""
    number, unit = size[:-2], size[-2:].upper()
    ok = size.isascii() and (size.isdecimal() or (number.isdecimal() and unit in SIZE_UNITS))
    check(ok and num_bytes(size) >= 1, f"--{name} {size}: must be a size such as 500MB or 5GB")


# ---- one dataclass a command


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What the fine-tuning commands share."""

    checkpoint_dir: str = QUICKSTART
    """The model to start from: any checkpoint directory, an adapter's too."""
    data: DataSource = field(default_factory=lambda: Alpaca(source="sample"))
    """Training data: Alpaca, or JSON with --data.path FILE_OR_DIR; default: Alpaca's built-in
    sample, without a download. --data.help NAME lists a source's settings."""
    out_dir: str | None = None
    """Where the results go; default out/METHOD/DATA."""
    overwrite: bool = False
    """Replace what out_dir holds; without this a directory that holds something is refused."""
    resume: str | None = None
    """Go on with a run that was stopped: auto takes the newest step-NNNNNN of out_dir, or begins if
    there is none; or name such a directory. The result is that of the uninterrupted run."""
    resume_force: bool = False
    """Resume although the data, the base or a setting that matters is another now."""
    prompt_style: Literal["alpaca", "plain", "template"] | None = None
    """How the instructions are put to the model, stored with the result, where chat finds it;
    default: as the model was taught before, else by its own chat template (template), else
    alpaca."""
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 1337
    """Seed of everything random: the adapter's initial weights, the order of the examples,
    dropout."""
    devices: int = 1
    """How many devices train together."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto takes the fastest there is."""
    precision: Literal["auto", "32-true", "bf16-true", "bf16-mixed"] = "auto"
    """What weights are held in and multiplied in: fp32; bf16 (A and B stay in fp32); or fp32
    multiplied in bf16. auto never rounds a base: one stored in bf16 trains with bf16 (bf16-true;
    bf16-mixed if all weights train) where a short measurement finds that faster than fp32, any
    other in 32-true."""
    base_checkpoint_dir: str | None = None
    """If checkpoint_dir is an adapter: its base, when it no longer lies where the adapter says."""
    allow_base_mismatch: bool = False
    """If checkpoint_dir is an adapter: use a base whose weights are not those that the adapter was
    trained on."""

    def __post_init__(self) -> None:
        check_seed(self.seed, below=2**32)  # Fabric's limit
        check(1 <= self.devices <= 1024, f"--devices {self.devices}: must be from 1 to 1024")
        check(
            not (self.resume and self.overwrite),
            "--resume goes on with what --overwrite would remove; leave one of the two out",
        )
        check(bool(self.resume) or not self.resume_force, "--resume_force has no use without --resume")
        by_size = not (self.train.packing or self.train.auto_batch)
        check(
            self.train.packing
            or self.train.global_batch_size % (self.devices * (self.train.micro_batch_size if by_size else 1))
            == 0,
            f"--train.global_batch_size {self.train.global_batch_size}: must be a multiple of "
            + (f"--train.micro_batch_size {self.train.micro_batch_size} times " if by_size else "")
            + f"--devices {self.devices}",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneLoRA(Finetune):
    """Fine-tune with LoRA. The result, OUT_DIR/final/lit_model.pth, holds the adapter only."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True, kw_only=True)
class FinetuneFull(Finetune):
    """Fine-tune every weight. The result, OUT_DIR/final/lit_model.pth, is a full model."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=1e-4))


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model: full, an adapter on its base, or a chain of adapters (merged in memory)."""

    checkpoint_dir: str = "out/lora/alpaca/final"
    """Any checkpoint directory."""
    prompt: str | None = None
    """Answer this once and exit."""
    prompt_style: Literal["alpaca", "plain", "template"] | None = None
    """How questions are put; default: as the model was taught, else by its own chat template
    (template), else plain."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more random."""
    top_k: int | None = 50
    """Sample among the k likeliest tokens only."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Seed of the sampling; default: another answer each time."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto takes the fastest there is."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it no longer lies where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base whose weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_seed(self.seed or 0)
        check(self.max_new_tokens >= 1, f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"--temperature {self.temperature}: must be 0 or more, and finite",
        )
        check(self.top_k is None or self.top_k >= 1, f"--top_k {self.top_k}: must be at least 1")
        check(0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class MergeLoRA:
    """Merge an adapter into its base: writes a full checkpoint that can be trained further."""

    lora_path: list[str]
    """The adapter: a lit_model.pth, or the directory that holds it. Several, trained on the same
    base, are added up."""
    out_dir: str
    """Directory to write."""
    checkpoint_dir: str | None = None
    """The base; default: the one the adapter was trained on. May itself be an adapter (a chain)."""
    weights: list[float] = field(default_factory=list)
    """The factor of each adapter, in the order of lora_path; default: 1 each."""
    strength: float = 1.0
    """A factor of all of them: 0 gives the base's weights to the bit, 1 what was trained, -1 its
    opposite. If the base is an adapter itself, that one is merged as it is."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Number format of the result; default: the base's, tensor by tensor."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """nearest: to the nearest number; stochastic: up or down at random so that the mean is right,
    for updates that are small beside what bf16 or fp16 can tell apart."""
    seed: int = 1337
    """Of the stochastic rounding."""
    verify: bool = True
    """Compare what was written with the base and its live adapters before it gets its name, if the
    model fits in memory."""
    overwrite: bool = False
    """Replace what out_dir holds; without this a directory that holds something is refused."""
    allow_base_mismatch: bool = False
    """Merge into a base whose weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check(len(self.lora_path) > 0, "--lora_path is empty: name an adapter")
        check(
            len(self.weights) in (0, len(self.lora_path)),
            f"--weights {' '.join(map(str, self.weights))}: {len(self.weights)} for {len(self.lora_path)} adapter(s); give one for each",
        )
        for name, value in (("strength", self.strength), *(("weights", weight) for weight in self.weights)):
            check(math.isfinite(value), f"--{name} {value}: must be a finite number")
        check_seed(self.seed)
        check(
            self.rounding == "nearest" or self.dtype != "fp32",
            "--rounding stochastic: is for bf16 and fp16, not for --dtype fp32; leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class _AdapterToAdapter:
    """What the commands share that write an adapter of another size."""

    out_dir: str
    """Directory to write."""
    rank: int | None = None
    """Rank of the result; with energy or max_error, the largest that a layer may get."""
    energy: float | None = None
    """Give every layer the least rank that keeps this share of its update's squared norm: 0.99
    leaves an error of 10%."""
    max_error: float | None = None
    """The same by the error: the largest share of the update's norm (Frobenius) that may be lost in
    a layer."""
    checkpoint_dir: str | None = None
    """The base; default: the one the adapter was trained on."""
    seed: int = 1337
    """Seed of everything random."""
    overwrite: bool = False
    """Replace what out_dir holds; without this a directory that holds something is refused."""
    allow_base_mismatch: bool = False
    """Take a base whose weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check(self.rank is None or self.rank >= 1, f"--rank {self.rank}: must be at least 1")
        check(
            self.energy is None or 0 < self.energy <= 1,
            f"--energy {self.energy}: must be above 0 and at most 1",
        )
        check(
            self.max_error is None or 0 <= self.max_error < 1,
            f"--max_error {self.max_error}: must be at least 0 and below 1",
        )
        check(
            self.energy is None or self.max_error is None,
            "--energy and --max_error: name one, they mean the same",
        )

    @property
    def error_bound(self) -> float | None:
        """max_error, however it was said: the energy is one minus its square."""
        return math.sqrt(1 - self.energy) if self.energy is not None else self.max_error


@dataclass(frozen=True, kw_only=True)
class ResizeLoRA(_AdapterToAdapter):
    """Give an adapter another rank: exactly if it grows or has no more to lose, else with the least
    possible error."""

    lora_path: str
    """The adapter: a lit_model.pth, or the directory that holds it. Or a LoRA file of another tool
    (.safetensors, as kohya and ComfyUI have them), which gives one of the same name and format in
    out_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.rank is not None or self.error_bound is not None,
            "name the size of the result: --rank, --energy or --max_error",
        )


@dataclass(frozen=True, kw_only=True)
class CombineLoRA(_AdapterToAdapter):
    """Make one adapter out of several that were trained on the same base. Without rank, energy or
    max_error, svd has the rank of the largest and the modes that drop or elect entries have the sum
    of the ranks; linear and cat need none."""

    lora_path: list[str]
    """The adapters: each a lit_model.pth, or the directory that holds it. Or LoRA files of another
    tool (.safetensors, as kohya and ComfyUI have them), which give one in the format and under the
    name of the first in out_dir."""
    weights: list[float] = field(default_factory=list)
    """The factor of each, in the order of lora_path, of any sign; default: 1 each. An adapter of
    weight 0 is left out."""
    mode: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear"
    """linear: the weighted sum of the updates, at the rank it has; cat: the same, with all factors
    kept side by side; svd: the nearest to it of a given rank; magnitude_prune, dare_linear: the sum
    of the largest, or of random entries of each; ties, dare_ties: of those, the mean of the ones
    that agree with the elected sign."""
    density: float = 1.0
    """Share of an update's entries that magnitude_prune, ties and the dare modes keep; at 1 nothing
    is dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.lora_path) > 0, "--lora_path is empty: name an adapter")
        check(
            len(self.weights) in (0, len(self.lora_path)),
            f"--weights {' '.join(map(str, self.weights))}: {len(self.weights)} for {len(self.lora_path)} adapter(s); give one for each",
        )
        for weight in self.weights:
            check(math.isfinite(weight), f"--weights {weight}: must be a finite number")
        check(any(self.each_weight), "--weights: all are 0, so nothing is left")
        check(0 < self.density <= 1, f"--density {self.density}: must be above 0 and at most 1")
        exact = self.mode in ("linear", "cat")
        check(
            not exact or (self.rank is None and self.error_bound is None),
            f"--mode {self.mode} is exact and finds its rank itself; --mode svd takes --rank, --energy and --max_error",
        )
        drops = not exact and self.mode != "svd"
        check(
            drops or self.density == 1,
            f"--density {self.density}: --mode {self.mode} drops nothing; ties, dare_linear, dare_ties and magnitude_prune do",
        )

    @property
    def each_weight(self) -> list[float]:
        """A weight for each adapter."""
        return self.weights or [1.0] * len(self.lora_path)


@dataclass(frozen=True, kw_only=True)
class InspectCheckpoint:
    """Say what a checkpoint is: kind, model, base and whether it matches, and how large an
    adapter's updates are."""

    positional: ClassVar[str] = "checkpoint_dir"
    checkpoint_dir: str
    """Any checkpoint directory, or a LoRA file of another tool; the option's name may be left
    out."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it no longer lies where the adapter says."""
    json: bool = False
    """Print everything as JSON."""


@dataclass(frozen=True, kw_only=True)
class ExportPEFT:
    """Write an adapter as a PEFT folder, which PeftModel.from_pretrained loads onto the Hugging
    Face base."""

    lora_path: str
    """The adapter: a lit_model.pth, or the directory that holds it."""
    out_dir: str
    """Directory to write."""
    checkpoint_dir: str | None = None
    """The base; default: the one the adapter was trained on."""
    base_model: str | None = None
    """What the folder calls its base: a name on the hub or a directory; default: the base's own
    directory."""
    model_type: str | None = None
    """The Hugging Face family that the folder is for, such as llama or phi3, which names and fuses
    the layers; default: that of the base, if that is a Hugging Face folder, else the plainest
    family that can express the architecture."""
    overwrite: bool = False
    """Replace what out_dir holds; without this a directory that holds something is refused."""
    allow_base_mismatch: bool = False
    """Take a base whose weights are not those that the adapter was trained on."""


@dataclass(frozen=True, kw_only=True)
class ConvertHF:
    """Write a Hugging Face model folder as a checkpoint directory of ours. Nothing needs this: such
    folders work as they are."""

    checkpoint_dir: str
    """The folder: config.json with *.safetensors or pytorch_model*.bin."""
    out_dir: str
    """Directory to write."""
    overwrite: bool = False
    """Replace what out_dir holds; without this a directory that holds something is refused."""


@dataclass(frozen=True, kw_only=True)
class ConvertLit:
    """Write any checkpoint as a complete Hugging Face folder, which transformers loads as it is.
    Adapters are merged on the way."""

    checkpoint_dir: str
    """Any checkpoint directory: full, an adapter or a chain of them."""
    out_dir: str
    """Folder to write."""
    max_shard_size: str = "5GB"
    """Largest weights' file, in bytes, MB or GB."""
    overwrite: bool = False
    """Replace what out_dir holds; without this a directory that holds something is refused."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it no longer lies where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base whose weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_size("max_shard_size", self.max_shard_size)

    @property
    def max_shard_bytes(self) -> int:
        """The size as a number."""
        return num_bytes(self.max_shard_size)


FileType = Literal["safetensors", "pytorch"]
OutputDtype = Literal["float32", "fp32", "float16", "fp16", "bfloat16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class LoRAExtractor:
    """Extract a LoRA from the difference of two models: what, added to the source, gives the
    target."""

    SHORTENED: ClassVar = (
        *("source_model", "source_type", "target_model", "target_type"),
        *("output", "output_format", "rank", "output_dtype", "diff_only"),
    )

    source_model: str
    """The model before: a file, or a folder of them. For the formats peft and litlora also any
    checkpoint directory."""
    source_type: FileType = "safetensors"
    """Kind of its files; a checkpoint directory tells itself."""
    target_model: str
    """The model after, likewise."""
    target_type: FileType = "safetensors"
    """Kind of its files."""
    output: str
    """File to write, in place of one that is there; .safetensors or .pt is put behind it if it is
    missing. For the formats peft and litlora a directory."""
    output_format: FileType = "safetensors"
    """Kind of file to write."""
    rank: int | Literal["auto"] = 32
    """Rank of every update, at most the smaller side of its weight; auto: what energy, sv_ratio or
    max_error asks for, layer by layer."""
    output_dtype: OutputDtype = "bf16"
    """Number format of the result."""
    diff_only: bool = False
    """Store every difference whole, without decomposing it."""
    format: Literal["comfyui", "kohya", "peft", "litlora"] = "comfyui"
    """Names in the result: comfyui (diffusion_model.LAYER.lora_up.weight, no alpha), kohya
    (lora_unet_LAYER.lora_up.weight, .alpha), peft (a folder that PeftModel loads), litlora (an
    adapter directory, for chat, training and merging here)."""
    svd: Literal["randomized", "exact"] = "randomized"
    """randomized: many times as fast, its error proved to be at most 1% above the least possible;
    exact: a full decomposition."""
    energy: float | None = None
    """For --rank auto: share of the squared difference to keep, such as 0.95."""
    sv_ratio: float | None = None
    """For --rank auto: keep the singular values of at least the layer's largest divided by this,
    such as 20. The randomised decomposition finds small ones a little smaller than they are."""
    max_error: float | None = None
    """For --rank auto: largest error of a layer relative to its difference, such as 0.1."""
    min_size: int | None = None
    """Weights of fewer numbers are stored as whole differences; default: 1,000,000 for comfyui and
    kohya, 0 for peft and litlora."""
    seed: int = 1337
    """Of the randomised decomposition."""
    allow_mismatch: bool = False
    """Leave out tensors that cannot be subtracted (in one model only, of different shapes,
    integers); they are listed either way."""
    overwrite: bool = False
    """For the formats peft and litlora: replace what the directory holds."""

    def __post_init__(self) -> None:
        for name in ("source_model", "target_model", "output"):
            check(bool(getattr(self, name)), f"--{name} is empty: name a file")
        check_seed(self.seed)
        criteria = {
            name: getattr(self, name)
            for name in ("energy", "sv_ratio", "max_error")
            if getattr(self, name) is not None
        }
        check(self.rank == "auto" or self.rank >= 1, f"--rank {self.rank}: must be at least 1")
        check(
            self.rank != "auto" or criteria, "--rank auto: needs --energy, --sv_ratio or --max_error to go by"
        )
        check(
            self.rank == "auto" or not criteria,
            f"--{next(iter(criteria), '')}: is for --rank auto, not for --rank {self.rank}",
        )
        for name, value in criteria.items():
            inside = 1 < value < math.inf if name == "sv_ratio" else 0 < value < 1
            check(
                inside,
                f"--{name} {value}: must be "
                + ("above 1, and finite" if name == "sv_ratio" else "above 0 and below 1"),
            )
        check(self.min_size is None or self.min_size >= 0, f"--min_size {self.min_size}: must be 0 or more")
        if self.is_directory:
            for name in ("diff_only", "output_format"):
                odd = getattr(self, name) not in (False, "safetensors")
                check(
                    not odd,
                    f"--{name}: is for the formats comfyui and kohya; leave it out for --format {self.format}",
                )
        check(
            self.is_directory or not self.overwrite,
            f"--overwrite: is for directories; with --format {self.format} a file is replaced",
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

    source_model: str
    """The model: a file, or a folder of them."""
    source_type: FileType = "safetensors"
    """Kind of its files."""
    lora_model: list[str]
    """LoRA files (ComfyUI's or kohya's names, or lora_A and lora_B) or PEFT folders. Several are
    added up."""
    lora_type: FileType = "safetensors"
    """Kind of the LoRA files."""
    output: str
    """File to write, in place of one that is there; .safetensors or .pt is put behind it if it is
    missing."""
    output_format: FileType = "safetensors"
    """Kind of file to write."""
    alpha: float = 1.0
    """Strength: a factor of all LoRAs, beside the alpha that a file tells of its own."""
    output_dtype: OutputDtype = "bf16"
    """Number format of the result; integers stay what they are."""
    weights: list[float] = field(default_factory=list)
    """A factor for each LoRA, in their order; default: 1 each."""
    max_shard_size: str | None = None
    """Largest file, in bytes, MB or GB: more is divided into numbered files with an index; default:
    one file."""
    allow_unmatched: bool = False
    """Go on without updates that fit no tensor of the model; they are listed either way."""

    def __post_init__(self) -> None:
        check(len(self.lora_model) > 0, "--lora_model is empty: name a LoRA")
        for name in ("source_model", "output"):
            check(bool(getattr(self, name)), f"--{name} is empty: name a file")
        check(
            len(self.weights) in (0, len(self.lora_model)),
            f"--weights {' '.join(map(str, self.weights))}: {len(self.weights)} for {len(self.lora_model)} LoRA(s); give one for each",
        )
        for name, value in (("alpha", self.alpha), *(("weights", weight) for weight in self.weights)):
            check(math.isfinite(value), f"--{name} {value}: must be a finite number")
        if self.max_shard_size is not None:
            check_size("max_shard_size", self.max_shard_size)
            check(self.output_format == "safetensors", "--max_shard_size: is for --output_format safetensors")


@dataclass(frozen=True, kw_only=True)
class Download:
    """Fetch a model from the Hugging Face hub; an interrupted download goes on where it stopped."""

    repo_id: str
    """Its name there: OWNER/NAME."""
    out_dir: str | None = None
    """Where it goes; default checkpoints/REPO_ID."""
    revision: str = "main"
    """Branch, tag or commit."""
    access_token: str | None = None
    """For models that need a login; default: HF_TOKEN in the environment, or what `hf auth login`
    stored."""

    def __post_init__(self) -> None:
        parts = self.repo_id.split("/")
        ok = len(parts) in (1, 2) and all(
            part and part not in (".", "..") and part.isprintable() for part in parts
        )
        check(
            ok and "\\" not in self.repo_id,
            f"--repo_id {self.repo_id}: must be OWNER/NAME, as in EleutherAI/pythia-70m",
        )
