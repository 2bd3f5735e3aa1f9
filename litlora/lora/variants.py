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
    from litlora.frozen.weight import FrozenWeight
    from litlora.lora.layer import LoRALinear


MAGNITUDE = "lora_magnitude_vector"
"""What DoRA's magnitude is called in a module and in a file, as in PEFT's."""


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
    def takes_starts(self) -> bool:
        """Whether A and B matter by their product alone, so that they may start at any values: see
        litlora/lora/starts.py."""
        return self.is_plain

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

    def settle(self, layer: "LoRALinear") -> None:
        """Fit the parameters that `extra` names to A and B, which have been given another start."""

    def problem(self, update: Update) -> str | None:
        """What is wrong with the tensors that `extra` names, if they do not fit the factors."""
        return None

    def change(self, update: Update, before: Tensor, rows: slice) -> Tensor:
        """These rows of W' - W, (n, in), in the dtype of `before`, the same rows of W in fp32 or
        better. Differentiable by what trains."""
        return update.scale * (update.B[rows].to(before.dtype) @ update.A.to(before.dtype))

    def add_to(self, total: Tensor, update: Update, before: Tensor, rows: slice, factor: float) -> Tensor:
        """See `Update.add_to`."""
        if self.is_plain:
            return update.add_product(total, rows, factor)
        return total.add_(self.change(update, before.to(total.dtype), rows), alpha=factor)

    def gain(self, update: Update, weight: "FrozenWeight") -> Tensor | None:
        """(out,): the factor of each row in W' = gain · (W + s · B A), for a variant of this form; None
        where it is 1."""
        if not self.is_plain:
            raise UserError(f"{setting('variant')} {self.name} can be merged, and not be switched on and off")
        return None

    def forward(self, layer: "LoRALinear", x: Tensor) -> Tensor:
        """W' x + b for x (..., in), while the adapter is live; plain LoRA has fused functions
        instead. Override it where the update can be applied without W' in memory, and apply
        `layer.dropout` in training there."""
        W = layer.frozen.rows()
        exact = W.to(torch.promote_types(W.dtype, torch.float32))
        effective = exact + self.change(layer.update, exact, slice(None))
        return F.linear(x, effective.to(x.dtype), layer.bias)


class DoRA(Variant):
    """W' = m · (W + s · B A) / ‖W + s · B A‖, with a learned magnitude m and a norm for each output
    (Liu et al. 2024, arXiv:2402.09353), as PEFT computes it.

    The norm counts as a constant in the gradient (section 4.3 of the paper). At first m = ‖W + s · B A‖.
    """

    name = "dora"
    extra = (MAGNITUDE,)
    takes_starts = True

    def start(self, layer: "LoRALinear") -> None:
        super().start(layer)
        W = layer.frozen.rows()
        norms = _norms(W.to(torch.promote_types(W.dtype, torch.float32)))
        setattr(layer, MAGNITUDE, nn.Parameter(norms.to(layer.lora_B.dtype)))

    @torch.no_grad()
    def settle(self, layer: "LoRALinear") -> None:
        W = layer.frozen.rows()
        exact = W.to(torch.promote_types(W.dtype, torch.float32))
        getattr(layer, MAGNITUDE).copy_(_norms(exact + super().change(layer.update, exact, slice(None))))

    def problem(self, update: Update) -> str | None:
        magnitude, outputs = update.extra[MAGNITUDE], update.B.size(0)
        if magnitude.shape == (outputs,) and magnitude.is_floating_point():
            return None
        return f"{MAGNITUDE} is {tuple(magnitude.shape)}; {outputs} outputs need as many magnitudes"

    def change(self, update: Update, before: Tensor, rows: slice) -> Tensor:
        added = super().change(update, before, rows)
        gain = _gain(update, before + added.detach(), rows)[:, None]
        return (gain - 1) * before + gain * added

    @torch.no_grad()
    def gain(self, update: Update, weight: "FrozenWeight") -> Tensor:
        W = weight.rows()
        exact = W.to(torch.promote_types(W.dtype, torch.float32))
        return _gain(update, exact + super().change(update, exact, slice(None)), slice(None))

    def forward(self, layer: "LoRALinear", x: Tensor) -> Tensor:
        update, W = layer.update, layer.frozen.rows()
        exact = W.to(torch.promote_types(W.dtype, torch.float32))
        with torch.no_grad():
            whole = exact + Variant.change(self, update, exact, slice(None))
        gain, W = _gain(update, whole, slice(None)), W.to(x.dtype)
        dropped = F.dropout(x, layer.dropout, layer.training)
        base = F.linear(dropped, W)
        low_rank = F.linear(F.linear(dropped, update.A.to(x.dtype)), update.B.to(x.dtype))
        y = gain * (base + update.scale * low_rank)
        if dropped is not x and layer.training and layer.dropout > 0:
            y = y + (F.linear(x, W) - base)  # dropout applies to what the adapter changes, not to W x
        y = y.to(x.dtype)
        return y if layer.bias is None else y + layer.bias.to(x.dtype)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _gain(update: Update, whole: Tensor, rows: slice) -> Tensor:
    """m / ‖W + s · B A‖ of these rows; 0 where the row is 0."""
    magnitude = update.extra[MAGNITUDE][rows].to(whole.dtype)
    return magnitude / _norms(whole.detach()).clamp_min(torch.finfo(whole.dtype).tiny)


VARIANTS: dict[str, Variant] = {"lora": Variant(), "dora": DoRA()}
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
