"""The settings of the training loop."""

import math
from dataclasses import dataclass, field
from typing import Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_positive, check_value

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 3
    """Passes over the training examples."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever the epochs; the learning rate schedule ends
    there too."""
    global_batch_size: int = 16
    """Examples in one optimizer step, over all devices."""
    packing: bool = True
    """Compute the examples of a step packed, without padding; no example sees another. false: pad
    each micro-batch to its longest example. To keep the padding small, a step then takes examples
    of similar length, micro_batch_size at a time, so it learns from other examples than with
    packing."""
    micro_batch_tokens: int | None = None
    """With packing: tokens that a device computes at a time; a single example with more is computed
    alone. Default: max_seq_length."""
    micro_batch_size: int = 4
    """Without packing: examples that a device computes at a time."""
    auto_batch: bool = False
    """Find the largest micro-batch that fits in memory by a dry run of the longest batch, whatever
    size is given (micro_batch_tokens, or micro_batch_size without packing). With packing, what is
    learned stays the same."""
    max_seq_length: int = 2048
    """Longest example in tokens, at most the model's context. A longer example loses the end of its
    answer, never its end-of-text token."""
    mask_prompt: bool = True
    """Learn the answers only; false: learn the prompts too."""
    learning_rate: float | Literal["auto"] = 1e-3
    """Peak learning rate. auto: by the size of the base and the method, by the rule of
    docs/learning_rate.md; the run says which, and stores it."""
    warmup_steps: int | float = 0.05
    """Steps of linear warm-up; a number below 1 is a fraction of all steps."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = field(
        default="cosine", metadata={"stored": "unless default"}
    )
    """The learning rate after the warm-up. cosine and linear fall until the end; wsd (warm-up,
    stable, decay: Hu et al. 2024) stays at the peak and falls over decay_steps at the end."""
    decay_steps: int | float = field(default=0.2, metadata={"stored": "unless default"})
    """The last steps, in which wsd falls; a number below 1 is a fraction of all steps."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this fraction of the peak."""
    loraplus_lr_ratio: float = field(default=1.0, metadata={"stored": "unless default"})
    """LoRA+ (Hayou et al. 2024): the learning rate of every B is so many times that of A."""
    learning_rate_ratios: dict[str, float] = field(
        default_factory=dict, metadata={"stored": "unless default"}
    )
    """Learning rates of some weights: {target: ratio}, so many times the others' rate. A target is
    written as in freeze; the first that means a weight counts: {lora_B: 16, layers.0-3: 0.5}."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors are never decayed. sgd adds it to the
    gradient."""
    optimizer: Literal[
        *("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
        *("lion", "lion_8bit", "adafactor", "sgd", "muon"),
    ] = "adamw"
    """adamw; lion (Chen et al. 2023), which wants a learning rate three to ten times smaller;
    adafactor (Shazeer & Stern 2018), which keeps a row and a column for each matrix; sgd, with the
    momentum beta1; muon (Jordan et al. 2024), for full fine-tuning: orthogonal updates of the blocks'
    matrices, with the momentum 0.95 and the learning rates of AdamW, which trains the rest. 8bit:
    moments in 8 bits (Dettmers et al. 2021). paged: moments in memory that moves from the GPU to the
    machine when needed. lion, 8bit and paged need the extra bitsandbytes."""
    beta1: float = 0.9
    """Decay of the running mean of the gradient; adafactor has none."""
    beta2: float = 0.95
    """AdamW's decay of the running mean of the squared gradient; lion's of the mean gradient."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""
    neftune_alpha: float = field(default=0.0, metadata={"stored": "unless default"})
    """NEFTune (Jain et al. 2023): in training, uniform noise up to neftune_alpha / sqrt(length of the
    example · hidden size) is added to the embeddings; 5 is usual, 0 is none. Needs packing."""
    freeze: list[str] = field(default_factory=list, metadata={"stored": "unless default"})
    """For full fine-tuning: what does not train. Names of modules or weights, or the ends of these
    (embed_tokens, norm.weight), ranges of layers (layers.0-11), and regular expressions that match
    a whole name."""
    update_early: bool = field(default=False, metadata={"stored": "unless default"})
    """For full fine-tuning: update each weight as soon as its gradient is there, and free that, so
    that the gradients of the whole model are never in memory together (LOMO, Lv et al. 2023). A step
    is then one micro-batch, and max_grad_norm must be 0."""
    checkpoint_activations: Literal["auto", "none", "full", "selective"] = "auto"
    """What the backward pass computes again instead of keeping it. full: every block; selective:
    the feed-forward half of every block; none: nothing. auto: none, or full where memory would not
    hold the longest batch."""
    offload_activations: bool = False
    """Keep activations in the machine's memory instead of the GPU's until the backward pass needs
    them."""
    compile: bool | Literal["auto"] = AUTO
    """Compile the blocks (torch.compile); this takes a minute at the start. auto: on a GPU of NVIDIA's or
    AMD's, where nothing else that is set forbids it."""
    log_interval: int = 10
    """Steps between two logged lines, and between two rows of metrics.csv."""
    eval_interval: int = 0
    """Steps between two validations; 0: only at the end."""
    keep_best: bool = field(default=False, metadata={"stored": "unless default"})
    """Keep the checkpoint with the lowest validation loss beside the newest ones; final/ is that
    one. Needs eval_interval."""
    early_stopping_patience: int | None = field(default=None, metadata={"stored": "unless default"})
    """End the run after so many validations in a row without a lower loss than the lowest so far.
    Needs eval_interval."""
    save_interval: int = 200
    """Steps between two early checkpoints; 0: none."""
    keep_checkpoints: int = 2
    """How many of the newest early checkpoints are kept."""
    max_time: float | None = None
    """Minutes, counted from the start of the command, after which the run stops as on SIGTERM, but
    with exit status 0: it ends the step, saves, and says how to continue."""
    max_bad_steps: int = 5
    """A step whose loss or gradient is not finite changes nothing and is counted; more than this
    many in a row stop the run."""

    def __post_init__(self) -> None:
        self._check_batches()
        check_positive(self, "epochs", "max_steps", "log_interval", "keep_checkpoints")
        check_positive(self, "early_stopping_patience")
        for name in (
            *("eval_interval", "save_interval", "max_bad_steps"),
            *("warmup_steps", "decay_steps", "weight_decay", "max_grad_norm"),
        ):
            value = getattr(self, name)
            check_value(self, name, math.isfinite(value) and value >= 0, "must be 0 or more, and finite")
        for name in ("beta1", "beta2"):
            check_value(self, name, 0 <= getattr(self, name) < 1, "must be at least 0 and below 1")
        rate = self.learning_rate
        positive = rate == AUTO or (math.isfinite(rate) and rate > 0)
        check_value(self, "learning_rate", positive, "must be a positive, finite number, or auto")
        for name in self.judging:
            check(
                self.eval_interval > 0,
                f"{setting(name)}: compares validations, and {setting('eval_interval')} 0 makes only one, at "
                f"the end; set {setting('eval_interval')}",
            )
        for name in ("warmup_steps", "decay_steps"):
            steps = getattr(self, name)
            whole = isinstance(steps, int) or steps < 1
            check_value(self, name, whole, "must be a whole number of steps, or a fraction below 1")
        check(
            self.schedule == "wsd" or self.decay_steps == TrainConfig.decay_steps,
            f"{setting('decay_steps')} has no effect on {setting('schedule')} {self.schedule}; use wsd",
        )
        ratio = self.loraplus_lr_ratio
        positive = math.isfinite(ratio) and ratio > 0
        check_value(self, "loraplus_lr_ratio", positive, "must be a positive, finite number")
        for target, times in self.learning_rate_ratios.items():
            positive = math.isfinite(times) and times > 0
            check(positive, f"{setting('learning_rate_ratios')} {target}: {times}: must be a positive number")
        check(
            ratio == 1 or not self.learning_rate_ratios,
            f"{setting('loraplus_lr_ratio')} and {setting('learning_rate_ratios')}: the first is short for "
            f"lora_B: {ratio:g} in the second; write it there",
        )
        check_value(self, "min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "must be from 0 to 1")
        alpha = self.neftune_alpha
        check_value(self, "neftune_alpha", 0 <= alpha < math.inf, "must be 0 or more, and finite")
        check(
            alpha == 0 or self.packing,
            f"{setting('neftune_alpha')} {alpha:g}: needs {setting('packing')}, which tells how long each "
            f"example is; leave {setting('packing')} on",
        )
        if self.update_early:
            self._check_update_early()
        positive = self.max_time is None or (math.isfinite(self.max_time) and self.max_time > 0)
        check_value(self, "max_time", positive, "must be a positive number of minutes")
        check(
            not (self.compiles and self.offload_activations),
            f"{setting('compile')} and {setting('offload_activations')}: compiled blocks keep their "
            "activations where they are; use only one",
        )

    @property
    def compiles(self) -> bool:
        """Whether the blocks are compiled: not by `auto` before `train.compile` has settled it."""
        return self.compile is True

    @property
    def judging(self) -> tuple[str, ...]:
        """Those of its settings that are set and compare validation losses."""
        given = {"keep_best": self.keep_best, "early_stopping_patience": self.early_stopping_patience}
        return tuple(name for name, value in given.items() if value)

    def _check_update_early(self) -> None:
        """A weight is updated before the other gradients of the step are known."""
        early, norm = setting("update_early"), setting("max_grad_norm")
        check(
            self.max_grad_norm == 0,
            f"{early} and {norm} {self.max_grad_norm:g}: the norm of all gradients is known only "
            f"when all weights are updated already; set {norm} to 0",
        )
        one = "a step must be one micro-batch, as gradients are not kept to be added up"
        check(
            self.micro_batch_tokens is None or not self.packing,
            f"{early} and {setting('micro_batch_tokens')}: {one}; leave the second out, and make "
            f"{setting('global_batch_size')} as small as memory asks for",
        )
        check(
            self.packing or self.micro_batch_size == self.global_batch_size,
            f"{early} and {setting('micro_batch_size')} {self.micro_batch_size}: {one}; set it to "
            f"{setting('global_batch_size')} {self.global_batch_size}",
        )
        check(not self.auto_batch, f"{early} and {setting('auto_batch')}: {one}; use only one of the two")

    def _check_batches(self) -> None:
        check_positive(self, "global_batch_size", "micro_batch_size", "micro_batch_tokens")
        check_value(self, "max_seq_length", self.max_seq_length >= 2, "must be at least 2")
        check_value(
            self,
            "global_batch_size",
            self.packing or self.auto_batch or self.global_batch_size % self.micro_batch_size == 0,
            f"must be a multiple of {setting('micro_batch_size')} {self.micro_batch_size}",
        )
