"""The fine-tuning commands."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_seed, check_value
from litlora.settings.data import Alpaca, DataSource
from litlora.settings.distill import DistillConfig
from litlora.settings.evaluate import EvalConfig, ReportConfig
from litlora.settings.launch import started
from litlora.settings.log import LogConfig
from litlora.settings.lora import LoRAConfig
from litlora.settings.preference import PreferenceConfig
from litlora.settings.quantize import Quantization
from litlora.settings.streaming import StreamBase, check_streamed
from litlora.settings.styles import check_prompt_style
from litlora.settings.targets import embedding_among
from litlora.settings.tokenizer import TokenizerConfig
from litlora.settings.train import AUTO, TrainConfig

_PACKAGE = Path(__file__).parent.parent
REPOSITORY = _PACKAGE.parent if (_PACKAGE.parent / "finetune/lora.py").is_file() else _PACKAGE / "installed"
"""Where the commands and the quickstart base are: the repository, or the copy that a wheel has."""
QUICKSTART = "checkpoints/litlora/quickstart"


def quickstart() -> str:
    """The base that comes with litlora: as seen from the current directory, or else by its full
    path."""
    own = REPOSITORY / QUICKSTART
    return str(own) if own.is_dir() and not Path(QUICKSTART).is_dir() else QUICKSTART


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """What the fine-tuning commands share."""

    AUTO_RATE_TIMES: ClassVar[float] = 1.0
    """learning_rate auto is so many times that of full fine-tuning."""
    MATTERS: ClassVar[tuple[str, ...]] = (
        *("checkpoint_dir", "data", "out_dir"),
        *("train.learning_rate", "train.epochs"),
    )
    """The five settings that `--help` shows first."""

    checkpoint_dir: str = field(default_factory=quickstart)
    """The model to start from: any checkpoint directory, an adapter's too; default: the quickstart
    base that comes with litlora."""
    data: DataSource = field(default_factory=lambda: Alpaca(source="sample"))
    """Training data: a file of records (JSON, CSV, Parquet, Arrow), a directory or a quoted pattern of
    them, hf://OWNER/NAME, or the name of a source: Alpaca or another known data set, Files with
    --data.path PATH, or Mix with --data.sources. Default: Alpaca's built-in sample, without a
    download. --data.help NAME lists the settings of a source."""
    out_dir: str | None = None
    """Where the results go; default: out/METHOD/DATA."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""
    resume: str | None = None
    """Continue a run that was stopped: auto takes the newest step-NNNNNN in out_dir, or starts a
    new run if there is none; or name such a directory. The result is that of the uninterrupted
    run."""
    resume_force: bool = False
    """Resume even if the data, the base or a setting that matters has changed."""
    prompt_style: str | None = None
    """How the model is asked, stored with the result, where chat finds it. alpaca: Stanford Alpaca's
    instructions; plain: the bare text; template: the model's own chat template; chatml: ChatML, with
    tools (Qwen, Hermes); llama3: Llama 3's headers; mistral: [INST]; gemma: Gemma 1 to 3's turns;
    phi: Phi 3's roles; FILE.jinja: a chat template of your own. Default: the style that the model was
    trained with, else its own chat template, else alpaca."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig, metadata={"stored": "unless default"})
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=AUTO))
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"stored": "unless default"})
    report: ReportConfig = field(default_factory=ReportConfig, metadata={"stored": "unless default"})
    log: LogConfig = field(default_factory=LogConfig, metadata={"stored": "unless default"})
    seed: int = 1337
    """Seed of everything random: the adapter's initial weights, the order of the examples,
    dropout."""
    devices: int | None = None
    """How many devices of this machine train together; default: as many as torchrun or SLURM started
    here, else 1."""
    num_nodes: int | None = field(default=None, metadata={"stored": "unless default"})
    """How many machines train together, each with that many devices; default: as many as torchrun or
    SLURM started, else 1."""
    strategy: Literal["auto", "ddp", "fsdp"] = field(default="auto", metadata={"stored": "unless default"})
    """How several devices divide the work. ddp: each holds the whole model, and they add up their
    gradients; fsdp: each holds a share of the base's weights and fetches a block at a time from the
    others (FSDP2), for a model that no device can hold alone; auto: ddp. What is learned is the
    same."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; auto takes the fastest available."""
    precision: Literal["auto", "32-true", "bf16-true", "bf16-mixed"] = "auto"
    """Number format of the weights and of their products. 32-true: fp32; bf16-true: bf16, but A and
    B stay in fp32; bf16-mixed: weights in fp32, multiplied in bf16. auto never rounds a base: one
    stored in bf16 trains in bf16 (bf16-true, or bf16-mixed if all weights train) where a short
    measurement finds that faster than fp32; all else trains in 32-true."""
    quantize: Quantization | None = field(default=None, metadata={"stored": "unless default"})
    """Hold the linear layers of the blocks in few bits while an adapter trains (QLoRA): nf4 (4 bits),
    nf4-dq (the same, its scales in 8 bits), int8, fp8. Only for LoRA."""
    stream_base: StreamBase = field(default="auto", metadata={"stored": "unless default"})
    """Leave the base in its file while an adapter trains: its layers are read ahead of their use and
    dropped behind it, so that about one is in memory. The result is the same. true, false, or auto:
    where the base exceeds the free memory. Only for LoRA, on the CPU."""
    base_checkpoint_dir: str | None = None
    """If checkpoint_dir is an adapter: its base, when that is no longer where the adapter says."""
    allow_base_mismatch: bool = False
    """If checkpoint_dir is an adapter: use a base even if its weights are not those that the
    adapter was trained on."""

    def __post_init__(self) -> None:
        check_seed(self.seed, below=2**32)  # Fabric's limit
        check_prompt_style(self.prompt_style)
        for name in ("devices", "num_nodes"):
            value = getattr(self, name)
            check_value(self, name, value is None or 1 <= value <= 1024, "must be from 1 to 1024")
        check(
            not (self.resume and self.overwrite),
            f"{setting('resume')} continues what {setting('overwrite')} would remove; use only one",
        )
        check(
            bool(self.resume) or not self.resume_force,
            f"{setting('resume_force')} has no effect without {setting('resume')}",
        )
        self._check_devices()
        for name in self.train.judging:
            check(
                self.data.val_fraction > 0 or self.data.val_path is not None,
                f"{setting(name)}: needs validation data, and {setting('val_fraction')} is 0; "
                f"hold some out, or name {setting('val_path')}",
            )
        self._check_batch()
        for name, is_set in (("every", self.eval.every), ("prompts", self.report.prompts)):
            check(
                not is_set or (self.strategy != "fsdp" and not self.train.compiles),
                f"{setting(name)}: the model answers questions while it trains, which a divided or compiled "
                f"one does not; leave {setting(name)} out and use scripts/evaluate.py afterwards",
            )
        compiled, added = self.train.compiles, self.tokenizer.add_tokens
        check_streamed(self, quantize=self.quantize, compile=compiled, add_tokens=added)

    @property
    def num_devices(self) -> tuple[int, int]:
        """(devices of a machine, machines), where these are not given: what was started."""
        devices, nodes, found = self.devices, self.num_nodes, started()
        total = found.total if found else 1
        if devices is None:
            devices = (found.devices if found else None) or max(1, total // (nodes or 1))
        return devices, nodes or max(1, total // devices)

    def _check_devices(self) -> None:
        devices, nodes = self.num_devices
        if (found := started()) is not None:
            check(
                devices * nodes == found.total and found.devices in (None, devices),
                f"{setting('devices')} {devices} and {setting('num_nodes')} {nodes}: {found.by} started "
                f"{found.total} processes, {found.devices or devices} on this machine; leave both out, "
                "or start as many",
            )
        elif nodes > 1:
            lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
            check(
                not lacking,
                f"{setting('num_nodes')} {nodes}: {' and '.join(lacking)} must be in the environment of each "
                "machine, or torchrun or srun must start the command: see docs/many-gpus.md",
            )
        if self.strategy == "fsdp":
            self._check_fsdp(devices * nodes)

    def _check_fsdp(self, total: int) -> None:
        fsdp = f"{setting('strategy')} fsdp"
        check(total > 1, f"{fsdp}: one device has nobody to share with; leave {setting('strategy')} out")
        check(
            self.stream_base is not True,
            f"{setting('stream_base')} true and {fsdp}: each device holds its share of the base in memory; "
            "leave one of the two out",
        )
        for name, instead in (
            ("auto_batch", f"set {setting('micro_batch_tokens')}"),
            ("compile", f"leave {setting('compile')} out"),
        ):
            check(
                getattr(self.train, name) is not True,
                f"{setting(name)} and {fsdp} do not go together; {instead}, or use {setting('strategy')} ddp",
            )

    def _check_batch(self) -> None:
        """Without packing, every device takes the same number of examples."""
        train = self.train
        devices, nodes = self.num_devices
        factor, what = devices * nodes, f"{setting('devices')} {devices}"
        if nodes > 1:
            what = f"{what} times {setting('num_nodes')} {nodes}"
        if not train.auto_batch:
            factor *= train.micro_batch_size
            what = f"{setting('micro_batch_size')} {train.micro_batch_size} times {what}"
        even = train.packing or train.global_batch_size % factor == 0
        check_value(train, "global_batch_size", even, f"must be a multiple of {what}")


@dataclass(frozen=True, kw_only=True)
class FinetuneLoRA(Finetune):
    """Fine-tune with LoRA. The result, OUT_DIR/final/lit_model.pth, holds the adapter only."""

    AUTO_RATE_TIMES: ClassVar[float] = 10.0

    MATTERS: ClassVar[tuple[str, ...]] = (
        *("checkpoint_dir", "data", "out_dir"),
        *("train.learning_rate", "lora.rank"),
    )

    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        embedding = embedding_among(self.lora.targets)
        check_streamed(self, modules_to_save=self.lora.modules_to_save, targets=embedding)
        biases = {"bias": self.lora.bias != "none", "lora_bias": self.lora.lora_bias}
        check_streamed(self, **biases)
        for name in (name for name, trains in biases.items() if trains):
            check(
                self.strategy != "fsdp",
                f"{setting(name)} and {setting('strategy')} fsdp: biases that train are not divided among "
                f"devices; use {setting('strategy')} ddp",
            )
        check(
            embedding is None or not self.lora.lora_bias,
            f"{setting('lora_bias')} and {setting('targets')} {embedding}: an embedding has no bias; leave "
            "one of the two out",
        )
        check(
            embedding is None or self.lora.init == "kaiming",
            f"{setting('init')} {self.lora.init} and {setting('targets')} {embedding}: an embedding has a "
            "start of its own; leave one of the two out",
        )
        check(
            not self.lora.loftq_iterations or self.quantize is not None,
            f"{setting('init')} {self.lora.init} makes up for what {setting('quantize')} loses, which is not "
            "set; set it, or choose another start",
        )
        check(
            self.strategy != "fsdp" or self.lora.init != "eva",
            f"{setting('init')} eva and {setting('strategy')} fsdp: this start needs the whole model; use "
            f"{setting('strategy')} ddp, or {setting('init')} pissa",
        )
        check(
            embedding is None or self.lora.variant == "lora",
            f"{setting('variant')} {self.lora.variant} and {setting('targets')} {embedding}: an embedding "
            f"has plain LoRA alone; leave {embedding} out, or use {setting('variant')} lora",
        )
        check(
            embedding is None or self.lora.layers_to_transform is None,
            f"{setting('layers_to_transform')} and {setting('targets')} {embedding}: an embedding is in no "
            "layer; leave one of the two out",
        )
        train, full = self.train, "is for full fine-tuning (finetune/full.py)"
        check(
            not train.freeze,
            f"{setting('freeze')} {full}: LoRA freezes the base; {setting('targets')} names what it adapts",
        )
        check(not train.update_early, f"{setting('update_early')} {full}: LoRA's gradients are small")
        check(
            train.optimizer != "muon",
            f"{setting('optimizer')} muon {full}: A and B are not the matrices that it makes orthogonal; "
            "use adamw",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneFull(Finetune):
    """Fine-tune every weight. The result, OUT_DIR/final/lit_model.pth, is a full model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.train.loraplus_lr_ratio == 1,
            f"{setting('loraplus_lr_ratio')} has no effect on full fine-tuning, which has no adapter",
        )
        check(
            self.quantize is None,
            f"{setting('quantize')} {self.quantize}: a full fine-tune trains all weights, and quantised ones "
            f"cannot be trained; leave {setting('quantize')} out, or use finetune/lora.py",
        )
        check(
            self.stream_base is not True,
            f"{setting('stream_base')} true: a full fine-tune trains all weights, which have to be in "
            f"memory; leave {setting('stream_base')} out, or use finetune/lora.py",
        )
        check(
            self.strategy != "fsdp" or self.train.optimizer in ("adamw", "sgd"),
            f"{setting('optimizer')} {self.train.optimizer} and {setting('strategy')} fsdp: its state "
            "cannot be divided among devices; use adamw or sgd",
        )
        check(
            not self.train.update_early or self.num_devices == (1, 1),
            f"{setting('update_early')} and {setting('devices')} {self.num_devices[0]}: gradients are "
            "exchanged when all are there; use one device",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneDPO(FinetuneLoRA):
    """Learn from pairs of answers, or from good and bad ones, with LoRA, by DPO, IPO, SimPO, ORPO or
    KTO. The result, OUT_DIR/final/lit_model.pth, holds the adapter only."""

    AUTO_RATE_TIMES: ClassVar[float] = 0.3
    MATTERS: ClassVar[tuple[str, ...]] = (
        *("checkpoint_dir", "data", "out_dir"),
        *("preference.loss", "preference.beta"),
    )

    data: DataSource
    """Pairs of answers: a file or directory of records with chosen and rejected, as text or as
    messages, and a prompt, of its own or at the beginning of both. kto and apo_zero_unpaired also
    take records of prompt, completion and label, true for a good completion. --data.help NAME lists the
    settings of a source."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=AUTO, epochs=1))

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.preference.loss != "kto" or self.train.global_batch_size > 1,
            f"{setting('global_batch_size')} 1: {setting('loss')} kto estimates by the examples of a step "
            "how far the model has gone; take at least 2",
        )
        check(
            self.train.mask_prompt,
            f"{setting('mask_prompt')} false and {setting('loss')} {self.preference.loss}: a preference is "
            f"about answers alone; leave {setting('mask_prompt')} on",
        )
        check(
            self.train.neftune_alpha == 0,
            f"{setting('neftune_alpha')} and {setting('loss')} {self.preference.loss}: NEFTune is for "
            f"learning answers, not pairs of them; leave {setting('neftune_alpha')} out",
        )
        check(
            self.train.mask_prompt,
            f"{setting('mask_prompt')} false: a preference is about answers alone, so there is nothing to "
            "prefer in a prompt; leave it on",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneDistill(FinetuneLoRA):
    """Learn the predictions of another model, the teacher, with LoRA. The result,
    OUT_DIR/final/lit_model.pth, holds the adapter only."""

    MATTERS: ClassVar[tuple[str, ...]] = (
        *("teacher", "checkpoint_dir", "data", "out_dir"),
        "train.learning_rate",
    )

    teacher: str
    """The model to learn from: any checkpoint directory with the same tokens, an adapter's too."""
    teacher_quantize: Quantization | None = None
    """Hold the linear layers of the teacher's blocks in few bits: nf4, nf4-dq, int8, fp8."""
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.tokenizer.add_tokens,
            f"{setting('add_tokens')}: {setting('teacher')} does not know new tokens; "
            f"leave {setting('add_tokens')} out",
        )


@dataclass(frozen=True, kw_only=True)
class Shown(Finetune):
    """What showing data needs beside the settings of training."""

    examples: int = 3
    """How many records are shown token by token, from the first on."""
    json: bool = False
    """Print everything as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value(self, "examples", self.examples >= 0, "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ShowData(Shown):
    """Show what fine-tuning would learn from: examples token by token, and figures on all of them.
    Takes the options of finetune/lora.py and finetune/full.py; with one of --preference those of
    finetune/dpo.py, with --teacher those of finetune/distill.py, and shows what these learn from.
    Options that do not concern data have no effect."""

    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass(frozen=True, kw_only=True)
class ShowPreference(FinetuneDPO, Shown):
    """Show what finetune/dpo.py would learn from: pairs of answers, or good and bad ones, token by
    token, and figures on all of them. Takes its options; those that do not concern data have no
    effect."""


@dataclass(frozen=True, kw_only=True)
class ShowDistill(FinetuneDistill, Shown):
    """Show what finetune/distill.py would learn from: examples token by token, and figures on all of
    them. Takes its options; those that do not concern data have no effect."""
