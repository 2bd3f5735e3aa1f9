"""The optimizer, its parameter groups, and the learning-rate schedule: a pure function of the
step."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from litlora.errors import MissingExtraError, UserError, setting
from litlora.settings import TrainConfig
from litlora.train.rates import rate_ratios


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0 ... total_steps - 1: linear warm-up to the peak, then the schedule
    towards min_lr_ratio of it.

    With w warm-up steps, step s < w has (s + 1) / (w + 1) of the peak, so that no step is taken at
    a rate of zero; the peak is at step w, and without a warm-up at the first step.
    """
    warmup = _num_steps(config.warmup_steps, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)  # below 1: the last step still learns
    height = {
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": lambda: 1 - progress,
        "constant": lambda: 1.0,
        # After w and before the last d steps at the peak, then in d equal steps towards the end.
        "wsd": lambda: min(1.0, (total_steps - step) / (_num_steps(config.decay_steps, total_steps) + 1)),
    }[config.schedule]()
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def _num_steps(steps: int | float, total_steps: int) -> int:
    """A number of steps that may be given as a fraction of all."""
    return steps if isinstance(steps, int) else int(steps * total_steps)


class _WithoutCompiler(torch.optim.Optimizer):
    """An optimizer of torch without the compiler's decorators around its methods: they import
    torch._dynamo, which takes half as long as all of torch."""

    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(_WithoutCompiler, torch.optim.AdamW):
    """torch's AdamW."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class _Matrices(_WithoutCompiler, torch.optim.Muon):
    """torch's Muon."""


class Muon(_WithoutCompiler):
    """Muon (Jordan et al. 2024) for matrices, and AdamW for all else, as one optimizer.

    An update of Muon is scaled so that its root mean square is that of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so that both learn at the same rate.
    """

    def __init__(
        self,
        matrices: list[Any],
        others: Sequence[Any] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        """`matrices` and `others` are weights, or groups of them."""
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(_Matrices(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, fused=True))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts the groups and the state of the whole."""
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: None = None) -> None:
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make_optimizer(trainable: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of what trains, by its names: AdamW (Loshchilov & Hutter 2019), or another one.
    Vectors (norms, biases) are not decayed. Raises UserError for learning_rate_ratios that mean
    nothing."""
    ratios = rate_ratios(trainable, config)
    groups = []
    for ratio in (None, *dict.fromkeys(ratios.values())):
        chosen = [p for name, p in trainable.items() if ratios.get(name) == ratio]
        for weights, decay in (
            ([p for p in chosen if p.ndim >= 2], config.weight_decay),
            ([p for p in chosen if p.ndim < 2], 0.0),
        ):
            if weights:
                group = {"params": weights, "weight_decay": decay}
                groups.append(group | ({} if ratio is None else {LR_RATIO: ratio}))
    kind, more = optimizer_class(config.optimizer)
    if kind is Muon:
        names = {parameter: name for name, parameter in trainable.items()}
        return _make_muon(groups, names, config)
    if config.optimizer in WITH_BETAS:
        more = {"betas": (config.beta1, config.beta2), **more}
    elif config.optimizer == "sgd":
        more = {"momentum": config.beta1, **more}
    return kind(groups, lr=config.learning_rate, **more)


def _make_muon(groups: list[dict[str, Any]], names: Mapping[nn.Parameter, str], config: TrainConfig) -> Muon:
    """Muon for the matrices of the blocks: embeddings and the output head have rows that stand for
    tokens, and are AdamW's with all vectors (Jordan et al. 2024)."""
    parts = [], []
    for group in groups:
        for number, part in enumerate(parts):
            chosen = [p for p in group["params"] if _is_muons(names[p], p) == (number == 0)]
            if chosen:
                part.append({**group, "params": chosen})
    return Muon(*parts, lr=config.learning_rate, betas=(config.beta1, config.beta2))


def _is_muons(name: str, weight: nn.Parameter) -> bool:
    return weight.ndim == 2 and any(part.isdecimal() for part in name.split("."))


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` changes nothing where the attribute `found_inf`, a number on the device, is 1:
    the host need not know."""
    return isinstance(optimizer, AdamW)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, for each group of weights."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(LR_RATIO, 1)


LR_RATIO = "lr_ratio"
"""Of a group of weights: its learning rate is so many times the schedule's."""
WITH_BETAS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit")


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class that the setting names, and its extra arguments. Raises MissingExtraError where
    bitsandbytes is needed and not installed."""
    if name == "adamw":
        return AdamW, {"fused": True}
    if name == "muon":
        return Muon, {}
    if name == "sgd":
        return torch.optim.SGD, {}
    if name == "adafactor":
        return torch.optim.Adafactor, {}
    try:
        from bitsandbytes import optim
    except ImportError:
        raise MissingExtraError(
            f"{setting('optimizer')} {name} needs bitsandbytes; "
            "install it with: pip install 'litlora[bitsandbytes]'"
        ) from None
    return {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "lion": optim.Lion,
        "lion_8bit": optim.Lion8bit,
    }[name], {}


def check_optimizer(
    name: str,
    device: torch.device,
    find: Callable[[str], tuple[type[torch.optim.Optimizer], dict[str, Any]]] = optimizer_class,
) -> None:
    """Raise UserError, before any work is done, if the optimizer that `find` returns for this name
    cannot make a step on this device."""
    kind, more = find(name)
    if name.startswith("paged") and device.type != "cuda":
        raise UserError(
            f"{setting('optimizer')} {name}: moves its moments between a GPU's memory and the machine's, "
            f"so it needs CUDA, not {device.type}"
        )
    weight = nn.Parameter(torch.zeros(64, 64, device=device))  # the size from which 8 bits are used
    weight.grad = torch.zeros_like(weight)
    try:
        kind([weight], **more).step()
    except Exception as error:  # libraries raise all kinds for a device they were not built for
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{setting('optimizer')} {name} does not work on {device.type} here: {reason[0]}; use adamw"
        ) from None


def state_bytes(trainable: Mapping[str, nn.Parameter], config: TrainConfig) -> int:
    """Memory of what the optimizer keeps of each weight: its moments, in the dtype of the weights or
    a byte a value. Paged ones count as if none were paged out."""
    name = config.optimizer
    if name == "adafactor":  # a row and a column for each matrix
        return sum(sum(p.shape) * p.itemsize for p in trainable.values())
    if name == "muon":
        return sum((1 if _is_muons(of, p) else 2) * p.nbytes for of, p in trainable.items())
    moments = 1 if name.startswith(("lion", "sgd")) else 2
    return sum(moments * (p.numel() if name.endswith("8bit") else p.nbytes) for p in trainable.values())
