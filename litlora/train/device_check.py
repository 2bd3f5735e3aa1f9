"""What a device, or this installation, cannot do: found out before anything is loaded."""

import torch

from litlora.errors import UserError, setting
from litlora.settings import TrainConfig
from litlora.train.compile import check_compiler
from litlora.train.optim import check_optimizer


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError for what this device or this installation cannot do."""
    check_optimizer(config.optimizer, device)
    if config.offload_activations and device.type != "cuda":
        raise UserError(
            f"{setting('offload_activations')} has no effect on {device.type}: "
            "activations are in the machine's memory already"
        )
    if config.compiles:
        check_compiler(device)
