"""The settings of LoRA."""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from litlora.errors import UserError, setting
from litlora.settings.checks import check, check_alpha, check_finite, check_positive, check_value
from litlora.settings.targets import ByTarget, layer_numbers

STARTS = "kaiming, gaussian, pissa, pissa_niter_N, olora, loftq, loftq_iter_N, eva"
BIASES = ("none", "lora_only", "all")
_START = re.compile(
    r"kaiming|gaussian|pissa|pissa_niter_[1-9][0-9]{0,2}|olora|loftq|loftq_iter_(?P<loftq>[1-9][0-9]{0,2})|eva"
)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021): h = W x + b + (alpha / rank) · B A x."""

    rank: int = 8
    """Rank of the update: A is (rank, in), B is (out, rank)."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input in training; the input of W has no dropout."""
    targets: str | list[str] = "all-linear"
    """Layers to adapt: qv, attention, mlp (of experts, too), experts (those that a router picks),
    all-linear (every linear layer but the output head), or a list of these, of layer names (q_proj,
    layers.0.mlp.up_proj) and of regular expressions that match a whole name. Their time is linear,
    unless one has look-around, references or the like. embed_tokens, or another embedding by its
    name, has a row of B for each token."""
    layers_to_transform: int | str | list[int | str] | None = field(
        default=None, metadata={"stored": "unless default"}
    )
    """Adapt only these of the model's layers, counted from 0: [20, 21], 20-31, or a list of both."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023), so that a high rank learns
    as fast as a low one."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Different ranks for some layers: {target: rank}, where a target is written as in targets; the
    first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Different alphas for some layers: {target: alpha}, with the same rules."""
    variant: str = field(default="lora", metadata={"stored": "unless default"})
    """Kind of update: lora, dora (Liu et al. 2024: the length of each row of W trains by itself), or
    one that your own code registers (docs/architecture.md)."""
    init: str = field(default="kaiming", metadata={"stored": "unless default"})
    """How A and B start (docs/starts.md), by PEFT's names: kaiming and gaussian (A random, B zero),
    pissa (the largest singular values of W), pissa_niter_N (the same, found fast by N iterations),
    olora (W = Q R), loftq (what --quantize loses of W), loftq_iter_N (the same, where N iterations
    lose less), eva (A, and the ranks, by the training data)."""
    eva_rho: float = field(default=2.0, metadata={"stored": "unless default"})
    """With init eva: a layer's rank can become at most this many times as high; 1 keeps all ranks."""
    bias: str = field(default="none", metadata={"stored": "unless default"})
    """Which of the base's biases train, too: none, lora_only (of the adapted layers), or all."""
    lora_bias: bool = field(default=False, metadata={"stored": "unless default"})
    """Give every B a bias: b + s · b_B, for adapted layers that have a bias b of their own."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules to train in full and to store with the adapter: their names, or the ends of these
    (lm_head, embed_tokens, norm)."""

    def __post_init__(self) -> None:
        check_positive(self, "rank")
        if self.layers_to_transform is not None:
            object.__setattr__(self, "layers_to_transform", layer_numbers(self.layers_to_transform))
        object.__setattr__(self, "alpha", float(self.alpha))  # one type in every file
        check_alpha(f"{setting('alpha')} {self.alpha}", self.alpha)
        check_value(self, "dropout", 0 <= self.dropout <= 0.999, "must be at least 0 and at most 0.999")
        check_value(self, "init", bool(_START.fullmatch(self.init)), f"choose from {STARTS}")
        check_finite("eva_rho", self.eva_rho)
        check_value(self, "eva_rho", self.eva_rho >= 1, "must be at least 1")
        check(
            self.eva_rho == 2 or self.init == "eva",
            f"{setting('eva_rho')} {self.eva_rho:g} has no effect with {setting('init')} {self.init}",
        )
        check_value(self, "bias", self.bias in BIASES, f"choose from {', '.join(BIASES)}")
        # As PEFT: other starts and variants have no bias of B.
        for name, value, wanted in (("init", self.init, "kaiming"), ("variant", self.variant, "lora")):
            check(
                value == wanted or not self.lora_bias,
                f"{setting('lora_bias')} and {setting(name)} {value} do not go together; use "
                f"{setting(name)} {wanted}, or {setting('bias')} lora_only",
            )
        check(
            len(self.targets) > 0, f"{setting('targets')} is empty: an adapter without layers trains nothing"
        )
        # An adapter stores the patterns, and whoever reads it must be able to use them.
        for name, of in (("rank_pattern", "ranks"), ("alpha_pattern", "alphas")):
            try:
                getattr(self, of)
            except ValueError as error:
                raise UserError(f"{setting(name)}: {error}") from None
        for target, rank in self.rank_pattern.items():
            check(rank >= 1, f"{setting('rank_pattern')} {target}: {rank}: must be at least 1")
        for target, alpha in self.alpha_pattern.items():
            check_alpha(f"{setting('alpha_pattern')} {target}: {alpha}", alpha)

    @property
    def started(self) -> "LoRAConfig":
        """The settings of an adapter that has started: how it did means nothing for its tensors, but
        for loftq, which fits no other base than the quantised one."""
        is_kept = self.init == "kaiming" or self.loftq_iterations > 0
        return self if is_kept else replace(self, init="kaiming", eva_rho=2.0)

    @property
    def loftq_iterations(self) -> int:
        """How many iterations of LoftQ the adapter starts with; 0: it starts otherwise."""
        found = _START.fullmatch(self.init)["loftq"]
        return int(found) if found else int(self.init == "loftq")

    @cached_property
    def ranks(self) -> ByTarget:
        """The ranks of rank_pattern."""
        return ByTarget(self.rank_pattern)

    @cached_property
    def alphas(self) -> ByTarget:
        """The alphas of alpha_pattern."""
        return ByTarget(self.alpha_pattern)
