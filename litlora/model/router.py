"""What decides which experts a token goes through, and how much each of them counts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.model.norms import WeightlessRMSNorm

EPS = 1e-20
"""Of the sum of sigmoids, all of which may be zero."""


class Router(nn.Module):
    """Scores of each token: x Wᵀ, and perhaps a bias. Not an nn.Linear, since adapters on all linear
    layers leave it out."""

    def __init__(self, hidden_size: int, num_scores: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scores, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_scores)) if bias else None
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ExpertRouter(Router):
    """Picks the experts of each token.

    Each token goes through the experts that score highest. With a correction, a value for each expert
    is added to the scores when experts are picked, and not when they are weighed: it balances their
    load without a loss (DeepSeek-V3, arXiv:2412.19437). With groups, only the experts of some groups
    can be picked, those whose two best experts score highest together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bool(config.router_bias))
        self.num_picked = config.num_experts_per_tok
        self.norm_shares, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.is_sigmoid = config.router_scoring == "sigmoid"
        self.num_groups, self.num_picked_groups = config.n_group, config.topk_group
        # Moved by whoever trained the model, not by gradients, and in fp32 whatever the weights are in.
        correction = (
            torch.zeros(config.num_experts, dtype=torch.float32) if config.router_correction else None
        )
        self.register_buffer("e_score_correction_bias", correction)

    def pick(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, C) -> shares and numbers of the picked experts, (N, num_picked) each."""
        if self.is_sigmoid and self.e_score_correction_bias is None and self.num_groups is None:
            # by the scores before the sigmoid, which is 1 of all that are large
            found = self._logits(tokens).topk(self.num_picked)
            return self._weighted(found.values.sigmoid()), found.indices
        scores = self._scores(tokens)  # (N, num_experts)
        choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if self.num_groups is not None:
            choice = self._of_best_groups(choice)
        picked = choice.topk(self.num_picked).indices
        return self._weighted(scores.gather(-1, picked)), picked

    def _weighted(self, shares: Tensor) -> Tensor:
        """Shares of the picked experts as they count."""
        if self.norm_shares:
            total = shares.sum(dim=-1, keepdim=True)
            shares = shares / (total + EPS if self.is_sigmoid else total)
        return shares if self.factor is None else shares * self.factor

    def _scores(self, tokens: Tensor) -> Tensor:
        if not self.is_sigmoid and self.e_score_correction_bias is None:
            return self(tokens).softmax(dim=-1, dtype=torch.float32)
        logits = self._logits(tokens)
        return logits.sigmoid() if self.is_sigmoid else logits.softmax(dim=-1)

    def _logits(self, tokens: Tensor) -> Tensor:
        """In fp32 or better: they decide which experts are picked."""
        exact = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(exact)
            return F.linear(tokens.to(exact), self.weight.to(exact), bias)

    def _of_best_groups(self, choice: Tensor) -> Tensor:
        """Scores (N, num_experts) with -inf for the experts of other groups."""
        grouped = choice.unflatten(-1, (self.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.num_picked_groups).indices
        others = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        return grouped.masked_fill(others[..., None], -torch.inf).flatten(-2)


class ScaledRouter(nn.Module):
    """Picks the experts of each token, whose norm it scales; each expert's share has a factor of its own
    (Gemma 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_picked, self.root = config.num_experts_per_tok, config.hidden_size**-0.5
        self.norm = WeightlessRMSNorm(config.norm_eps)
        self.proj = Router(config.hidden_size, config.num_experts)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def pick(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `ExpertRouter.pick`."""
        scores = self.proj(self.norm(tokens) * self.scale * self.root)
        exact = torch.promote_types(scores.dtype, torch.float32)
        shares, picked = scores.softmax(dim=-1, dtype=exact).topk(self.num_picked)
        return shares / shares.sum(dim=-1, keepdim=True) * self.per_expert_scale[picked], picked
