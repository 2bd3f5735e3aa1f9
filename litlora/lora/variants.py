"""Variants of LoRA: what A, B and a variant's own parameters mean. One small class a variant.

To add one: subclass `Variant`, give it a name, and put an instance into VARIANTS; the setting
`variant` then takes the name. Training, saving, resuming and merging need nothing else. A format
that cannot hold the variant refuses it by name.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.lora.update import Update

if TYPE_CHECKING:
    from litlora.lora.layer import LoRALinear


class Variant:
    """Plain LoRA (Hu et al. 2021, arXiv:2106.09685), and what a variant of it may override."""

    name = "lora"
    extra: tuple[str, ...] = ()
    """Names of the parameters that a layer, and a file, has beside A and B: each lora_..."""

    @property
    def is_plain(self) -> bool:
        """Whether the update is s · B A and nothing else: what the fused kernels compute, and what
        every format can hold."""
        return type(self) is Variant

    @property
    def applies_dropout(self) -> bool:
        """Whether the forward applies the layer's dropout: the default one of other variants does
        not, since it multiplies by W' as a whole."""
        return self.is_plain or type(self).forward is not Variant.forward

    def start(self, layer: "LoRALinear") -> None:
        """Fill a fresh layer's lora_A (r, in) and lora_B (out, r), and register the parameters that
        `extra` names. A is Kaiming-uniform with a = √5, B is zero: nothing changes at first."""
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
        nn.init.zeros_(layer.lora_B)

    def change(self, update: Update, before: Tensor, rows: slice) -> Tensor:
        """These rows of W' - W, (n, in), in the dtype of `before`, the same rows of W in fp32 or
        better. Differentiable by what trains."""
        return update.scale * (update.B[rows].to(before.dtype) @ update.A.to(before.dtype))

    def add_to(self, total: Tensor, update: Update, before: Tensor, rows: slice, factor: float) -> Tensor:
        """See `Update.add_to`."""
        if self.is_plain:
            return update.add_product(total, rows, factor)
        return total.add_(self.change(update, before.to(total.dtype), rows), alpha=factor)

    def forward(self, layer: "LoRALinear", x: Tensor) -> Tensor:
        """W' x + b for x (..., in), while the adapter is live; plain LoRA has fused functions
        instead. Override it where the update can be applied without W' in memory, and apply
        `layer.dropout` in training there."""
        W = layer.frozen.rows()
        exact = W.to(torch.promote_types(W.dtype, torch.float32))
        effective = exact + self.change(layer.update, exact, slice(None))
        return F.linear(x, effective.to(x.dtype), layer.bias)


VARIANTS: dict[str, Variant] = {"lora": Variant()}
"""Every variant, by the name that the setting `variant` takes and a file stores."""


def variant_named(name: str) -> Variant:
    """Raises UserError for a name that is not in VARIANTS."""
    if name not in VARIANTS:
        raise UserError(f"{setting('variant')} {name}: no such variant; choose from {', '.join(VARIANTS)}")
    return VARIANTS[name]


def check_dropout(variant: Variant, dropout: float) -> None:
    """Raise UserError for a dropout that the variant would not apply."""
    if dropout > 0 and not variant.applies_dropout:
        raise UserError(
            f"{setting('dropout')} {dropout:g}: {setting('variant')} {variant.name} does not apply dropout; "
            "set it to 0"
        )
