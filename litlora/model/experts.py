"""Mixtures of experts: MLPs of which a router picks some for each token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.model.mlp import MLP


class Router(nn.Module):
    """Scores of each token: x Wᵀ. Not an nn.Linear, since adapters on all linear layers leave it
    out."""

    def __init__(self, hidden_size: int, num_scores: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scores, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MixtureOfExperts(nn.Module):
    """Each token goes through the experts that score highest, and through the shared expert if
    there is one (Jiang et al. 2024, arXiv:2401.04088)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_picked = config.num_experts_per_tok
        self.norm_shares = config.norm_topk_prob
        self.gate = Router(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = Router(config.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.size(-1))  # (B, T, C) -> (N, C)
        # fp32: the shares decide which experts are picked
        scores = self.gate(tokens).softmax(dim=-1, dtype=torch.float32)
        shares, picked = scores.topk(self.num_picked)  # (N, num_picked)
        if self.norm_shares:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(picked == number)
            # In training, an expert that no token picked runs on no rows: its gradient is then zero
            # instead of absent.
            if len(rows) or torch.is_grad_enabled():
                y = y.index_add(0, rows, (expert(tokens[rows]) * shares[rows, places, None]).to(y.dtype))
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        return y.view_as(x)
