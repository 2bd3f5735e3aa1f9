"""Weights that are updated as their gradients arrive, so that the gradients of the whole model are
never in memory together: LOMO (Lv et al. 2023, arXiv:2306.09782), with any optimizer; torchtune's
optimizer_in_bwd."""

import torch
from torch import Tensor, nn

from litlora.train.parallel import Parallel


class EarlyUpdates:
    """Updates each weight within the backward of its loss, and frees its gradient.

    A gradient that is not finite, or that of a loss which is not, updates nothing. The weights whose
    gradients came before it in the same backward are updated already.
    """

    def __init__(self, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._trainable, self._optimizer = trainable, optimizer
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._loss_is_finite = True
        for parameter in trainable.values():
            parameter.register_post_accumulate_grad_hook(self._update)

    def backward(self, parallel: Parallel, loss: Tensor) -> None:
        """The backward of the loss of a step, and the updates of the step."""
        self._norms.clear()
        self._loss_is_finite = bool(loss.isfinite())
        parallel.backward(loss)

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        norm = self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        if self._loss_is_finite and bool(norm.isfinite()):
            self._optimizer.step()  # of this weight: no other one has a gradient now
        parameter.grad = None

    def without_gradient(self) -> list[str]:
        """The names of the weights that got no gradient in the last backward."""
        return [name for name, parameter in self._trainable.items() if parameter not in self._norms]

    def norm(self) -> Tensor:
        """The norm of all gradients of the last backward."""
        norms = [self._norms[parameter] for parameter in self._trainable.values() if parameter in self._norms]
        return torch.linalg.vector_norm(torch.stack(norms))
