"""NEFTune: uniform noise on the embeddings in training (Jain et al. 2023, arXiv:2310.05914)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def noisy(embedding: nn.Module, alpha: float, lengths: Sequence[int]) -> Iterator[None]:
    """Within the block, what `embedding` returns for a pack (1, N, C) of sequences of these lengths has
    noise from U(-1, 1) · alpha / √(L · C) on it, where L is the length of the sequence that a token
    is in. It is drawn from the device's generator, whose state a resumed run gets back."""

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        sizes = torch.tensor(lengths, device=output.device)
        width = output.size(-1)
        most = (alpha * (sizes * width).rsqrt()).repeat_interleave(sizes, output_size=output.size(1))
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * most[:, None].to(output.dtype)

    hook = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
