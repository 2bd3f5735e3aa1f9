"""What Gemma 3n has in the place of one residual stream: S streams, with one of which each layer computes
and all of which it updates (AltUp, Baykal et al. 2023, arXiv:2301.13310); and a product of two narrow
matrices beside attention (LAuReL, Menghani et al. 2024, arXiv:2411.07501)."""

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.lora import project
from litlora.model.norms import make_norm
from litlora.model.router import Router

LEAST = 1e-5
"""Of a mean square that is divided by."""


class AltUp(nn.Module):
    """How the streams (B, T, S, C) change. Its weights are routers': adapters leave them out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        S, C = config.altup_num_inputs, config.hidden_size
        self.clip = config.altup_coef_clip
        self.correct_output_scale = nn.Parameter(torch.zeros(C))
        self.correction_coefs, self.prediction_coefs = Router(S, S), Router(S, S * S)
        self.modality_router = Router(C, S)
        self.router_norm = make_norm(config)

    def predicted(self, streams: Tensor) -> Tensor:
        """Before the layer: each stream and a mix of all, (B, T, S, C)."""
        S = streams.size(2)
        mix = self._coefficients(self.prediction_coefs, streams[:, :, 0]).unflatten(-1, (S, S))
        return mix @ streams + streams

    def corrected(self, streams: Tensor, x: Tensor) -> Tensor:
        """The predicted streams (B, T, S, C) after the layer, which made x (B, T, C) of the first."""
        shares = self._coefficients(self.correction_coefs, x) + 1  # (B, T, S)
        return streams + (x - streams[:, :, 0])[:, :, None] * shares[..., None]

    def with_made(self, streams: Tensor, made: Tensor) -> Tensor:
        """The corrected streams, and what the layer made of its input (B, T, C), which the first, the one
        that it was made of, does not get."""
        return torch.cat([streams[:, :, :1], streams[:, :, 1:] + made[:, :, None]], dim=2)

    def _coefficients(self, made: Router, x: Tensor) -> Tensor:
        """x (B, T, C) -> what is made of its place among the streams."""
        routed = self.modality_router(self.router_norm(x) * x.size(-1) ** -1.0)
        exact = torch.promote_types(x.dtype, torch.float32)
        place = torch.tanh(routed.to(exact)).to(x.dtype)
        if not self.training or self.clip is None:
            return made(place)
        return nn.functional.linear(place, made.weight.clamp(-self.clip, self.clip))


class Laurel(nn.Module):
    """x and a normed product of two narrow matrices with it, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear_left = nn.Linear(config.hidden_size, config.laurel_rank, bias=False)
        self.linear_right = nn.Linear(config.laurel_rank, config.hidden_size, bias=False)
        self.post_laurel_norm = make_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        (narrow,) = project(x, self.linear_left)
        return x + self.post_laurel_norm(project(narrow, self.linear_right)[0])


class WithStreams(nn.Module):
    """A decoder's part in it. A class to inherit from, since the family's names lie in the decoder."""

    def add_streams(self, config: ModelConfig) -> None:
        """Add the modules, if the architecture has them."""
        self.has_streams = config.altup_num_inputs is not None
        if self.has_streams:
            self.altup_projections = _projections(config)
            self.altup_unembed_projections = _projections(config)

    def spread(self, x: Tensor) -> Tensor:
        """Embeddings (B, T, C) -> the streams (B, T, S, C), all of them of the same length."""
        if not self.has_streams:
            return x
        others = [like(project(x, linear)[0], x) for linear in self.altup_projections]
        return torch.stack([x, *others], dim=2)

    def gathered(self, streams: Tensor) -> Tensor:
        """The streams (B, T, S, C) -> hidden states (B, T, C): a mean of what is made of each."""
        if not self.has_streams:
            return streams
        first, *rest = streams.unbind(2)
        made = zip(rest, self.altup_unembed_projections, strict=True)
        others = [like(project(stream, linear)[0], first) for stream, linear in made]
        return torch.stack([first, *others]).mean(dim=0)


def _projections(config: ModelConfig) -> nn.ModuleList:
    C = config.hidden_size
    return nn.ModuleList(nn.Linear(C, C, bias=False) for _ in range(config.altup_num_inputs - 1))


def like(x: Tensor, other: Tensor) -> Tensor:
    """x (..., C) with the root mean square of the other's rows."""
    wanted = other.square().mean(dim=-1, keepdim=True).sqrt()
    return x * wanted / x.square().mean(dim=-1, keepdim=True).clamp(min=LEAST).sqrt()
