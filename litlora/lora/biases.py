"""Biases that train beside an adapter: those of the base (PEFT's `bias`), and one of every B (PEFT's
`lora_bias`).

A layer with a bias of B is W x + b + s · (B A x + b_B). What is saved of either kind is the bias that
the layer has in the end, which replaces the base's: b + s · b_B is one vector.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.settings import LoRAConfig

if TYPE_CHECKING:
    from litlora.lora.layer import LoRALinear


def train_biases(
    model: nn.Module, layers: Mapping[str, "LoRALinear"], config: LoRAConfig, dtype: torch.dtype
) -> None:
    """Let the biases train that the settings name; those of adapted layers in `dtype`, and all in
    memory of their own, as the base must keep its fingerprint.

    Raises UserError if there are none, and for a layer whose B cannot have one: with a bias where the
    base has none, the merged model would be of another architecture, and PEFT does not merge it.
    """
    if config.lora_bias:
        for name, layer in layers.items():
            if layer.bias is None:
                raise UserError(
                    f"{setting('lora_bias')} and {setting('targets')}: {name} has no bias that the one of B "
                    f"could be merged into; leave one of the two out"
                )
            layer.lora_bias = nn.Parameter(torch.zeros_like(layer.linear.bias, dtype=dtype))
    if config.bias == "none":
        return
    adapted = {id(layer.linear.bias): layer for layer in layers.values() if layer.bias is not None}
    biases = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".bias") and (config.bias == "all" or id(parameter) in adapted)
    }
    if not biases:
        what = "none of the adapted layers" if config.bias == "lora_only" else "nothing in this model"
        raise UserError(
            f"{setting('bias')} {config.bias}: {what} has a bias; leave {setting('bias')} out"
            + (f", or choose others by {setting('targets')}" if config.bias == "lora_only" else "")
        )
    for parameter in biases.values():
        own = parameter.data
        kept = torch.promote_types(own.dtype, dtype) if id(parameter) in adapted else own.dtype
        parameter.data = own.to(kept, copy=True)
        parameter.requires_grad_(True)


@torch.no_grad()
def changed_biases(layers: Mapping[str, "LoRALinear"]) -> dict[str, Tensor]:
    """The biases of adapted layers, by their names, where these train or B has one."""
    return {
        f"{name}.bias": layer.bias.detach()
        for name, layer in layers.items()
        if layer.lora_bias is not None or (layer.bias is not None and layer.bias.requires_grad)
    }


def with_biases(config: LoRAConfig, whole: Iterable[str]) -> LoRAConfig:
    """The settings of an adapter that holds these tensors: how its biases trained means nothing for
    them."""
    if config.bias == "none" and not config.lora_bias:
        return config
    modules = [name.removesuffix(".bias") for name in whole if name.endswith(".bias")]
    saved = list(dict.fromkeys([*config.modules_to_save, *modules]))
    return dataclasses.replace(config, bias="none", lora_bias=False, modules_to_save=saved)
