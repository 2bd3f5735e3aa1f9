"""The mode of a module: training, or evaluation, which drops nothing out."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the former mode after it."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
