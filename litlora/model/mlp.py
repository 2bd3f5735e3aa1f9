"""The feed-forward half of a block."""

from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.kernels.lora import ACTIVATIONS
from litlora.lora import gated_mlp, project


class MLP(nn.Module):
    """The feed-forward half of a block: gated (Shazeer 2020, arXiv:2002.05202) or plain. With a sparsity
    only the largest gates count."""

    def __init__(
        self, config: ModelConfig, size: int, sparsity: float | None = None, bias: bool | None = None
    ) -> None:
        """`size` is the inner width; `bias` that of the config unless it is given."""
        super().__init__()
        self.cutoff = None if sparsity is None else NormalDist().inv_cdf(sparsity)
        self.activation = config.hidden_act
        bias = config.mlp_bias if bias is None else bias
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=bias) if config.mlp == "gated" else None
        self.up_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=bias)
        self.clamp = (config.swiglu_alpha, config.swiglu_limit)
        self.act_fn = XIELU() if self.activation == "xielu" else None

    @property
    def entrances(self) -> list[nn.Module]:
        """The layers that read the input."""
        return [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]

    def inner(self, *entered: Tensor) -> Tensor:
        """What the last layer reads (..., size), of what the entrances give."""
        alpha, limit = self.clamp
        if limit is not None:
            return clamped_swiglu(*entered, alpha, limit)
        activate = self.act_fn or ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return activate(*entered)
        gate, up = entered
        return activate(gate if self.cutoff is None else excess(gate, self.cutoff)) * up

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None and self.cutoff is None and self.clamp[1] is None:
            return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.activation)
        return project(self.inner(*project(x, *self.entrances)), self.down_proj)[0]


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1), with the gate clamped from above and up to ± limit
    (gpt-oss)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate * alpha) * (up + 1)


def excess(gate: Tensor, cutoff: float) -> Tensor:
    """By how much each value is above mean + cutoff · standard deviation of its row, or 0 (You et al. 2025,
    arXiv:2506.06644)."""
    deviation, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
    # rounded to the dtype, as in training
    return F.relu(gate - (mean + deviation * float(torch.tensor(cutoff, dtype=gate.dtype))))


class XIELU(nn.Module):
    """An activation with trained weights (Huang and Schlag 2024, arXiv:2411.13010): with p and n
    positive, p x² + β x for x > 0, else n (eˣ - 1 - x) + β x."""

    BETA, EPS = 0.5, -1e-6

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.zeros(1))
        self.alpha_n = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        p, n = F.softplus(self.alpha_p), self.BETA + F.softplus(self.alpha_n)
        negative = torch.expm1(x.clamp(max=self.EPS)) - x  # EPS: as the weights were trained
        return torch.where(x > 0, p * x * x, n * negative) + self.BETA * x
