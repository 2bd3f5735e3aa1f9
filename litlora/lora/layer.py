"""LoRA on any `nn.Module`: wrap linear layers, train, merge, unmerge, unwrap.

h = W x + b + s · B A x, with A (r, in), B (out, r) and s = alpha / r (Hu et al. 2021,
arXiv:2106.09685), or alpha / √r where the settings ask for it (rsLoRA, Kalajdzievski 2023,
arXiv:2312.03732).

    add_lora(model, config)      wraps the layers that config.targets names and freezes everything else
    merge_lora(model)            folds every update into its W; outputs stay the same up to rounding
    unmerge_lora(model)          puts back every W, bit for bit
    unwrap_lora(model)           plain layers again, with plain names: merged if merged, else the base's
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.frozen.linear import FrozenLinear, frozen_weight
from litlora.frozen.residual import Residual
from litlora.frozen.weight import FrozenWeight
from litlora.kernels import lora as kernels
from litlora.lora.adapter import Adapter
from litlora.lora.biases import changed_biases, train_biases, with_biases
from litlora.lora.rows import rows_of
from litlora.lora.select import (
    check_patterns,
    in_layers,
    layer_alpha,
    layer_rank,
    select_layers,
    select_whole,
    settings_for,
)
from litlora.lora.update import Update, scale_of
from litlora.lora.variants import check_dropout, variant_named
from litlora.settings import LoRAConfig


class LoRALinear(nn.Module):
    """A linear layer and its low-rank update. The wrapped layer is frozen and keeps its dtype."""

    cast: kernels.Cast | None = None  # see litlora/lora/casts.py

    def __init__(
        self,
        linear: nn.Linear | FrozenLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        *,
        rslora: bool = False,
        variant: str = "lora",
    ) -> None:
        """A fresh adapter, started by its variant: plain LoRA changes nothing at first. `dtype` is
        that of A and B."""
        super().__init__()
        self.variant = variant_named(variant)
        check_dropout(self.variant, dropout)
        self.linear = linear.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scale = scale_of(alpha, rank, rslora=rslora)
        device = frozen_weight(linear).device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        self.register_parameter("lora_bias", None)  # of B: see litlora/lora/biases.py
        # What A and B started with, where that must be known: see litlora/lora/starts.py.
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)
        self.is_residual = False
        self._base: nn.Linear | FrozenLinear | None = None  # the layer without the update, while merged
        self._start()

    def _start(self) -> None:
        self.variant.start(self)

    @property
    def merged(self) -> bool:
        """Whether the update is folded into W."""
        return self._base is not None

    @property
    def frozen(self) -> FrozenWeight:
        """What the update is added to: the wrapped layer's W, without the part that A and B started
        with if that was taken out; with the update folded in while merged."""
        weight = frozen_weight(self.linear)
        if self.merged or not self.is_residual:
            return weight
        return Residual(weight, self.start_A, self.start_B, self.scale)

    @property
    def update(self) -> Update:
        """The current update of `frozen`: its tensors are the layer's own parameters."""
        extra = {name: getattr(self, name) for name in self.variant.extra}
        return Update(self.lora_A, self.lora_B, self.scale, variant=self.variant.name, extra=extra)

    @property
    def update_of_base(self) -> Update:
        """The current update of the wrapped layer's W: s · (B A - B0 A0), of twice the rank, if the
        part B0 A0 was taken out of W."""
        update = self.update
        if not self.is_residual:
            return update
        A, B = torch.cat([update.A, self.start_A]), torch.cat([update.B, -self.start_B], dim=1)
        return replace(update, A=A, B=B)

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor, *, is_residual: bool) -> None:
        """Begin at A (r, in) and B (out, r), and keep them; with `is_residual`, take s · B A out of W,
        so that nothing changes at first."""
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        # As they are in the layer's dtype.
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self.is_residual = is_residual
        self.variant.settle(self)

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """A fresh adapter of another rank: A and B are zero. Alpha keeps its ratio to the rank."""
        self.alpha *= rank / self.rank
        self.rank, self.scale = rank, scale_of(self.alpha, rank, rslora=self.rslora)
        self.lora_A = nn.Parameter(self.lora_A.new_zeros(rank, self.in_features))
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(self.out_features, rank))

    @torch.no_grad()
    def load_update(self, update: Update) -> None:
        """Copy an update's tensors into the layer's own. Raises UserError if they do not fit."""
        for name, tensor in update.tensors().items():
            own = getattr(self, name)
            if own.shape != tensor.shape:  # copy_ would broadcast a single row
                raise UserError(f"{name} is {tuple(tensor.shape)}, not {tuple(own.shape)}")
            own.copy_(tensor)

    @property
    def weight(self) -> Tensor:
        """The effective weight W', (out, in).

        It is there for code that reads a layer's weight instead of calling the layer, as
        `nn.TransformerEncoderLayer` does in eval mode.
        """
        if self.merged:
            return self.linear.weight
        return self.update_of_base.added_to(frozen_weight(self.linear).rows())

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer, with what B adds to it."""
        own = self.linear.bias
        return own if self.lora_bias is None or self.merged else own + self.scale * self.lora_bias

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.linear(x)
        if not self.variant.is_plain:
            return self.variant.forward(self, x)
        if not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)):
            return with_bias(kernels.project_one(x, kernel_layer(self)), self)
        keep = dropout_mask(x, (self,))
        compute = kernels.project if fused(x) else kernels.plain_project
        return with_bias(compute(x, [kernel_layer(self)], keep)[0], self)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Fold the update into W and return the merged layer, for `set_submodule`. Merging twice
        adds the update once."""
        if not self.merged:
            merged, base = self._with_weight(self.weight), self.linear
            self.linear = merged
            object.__setattr__(self, "_base", base)  # not a submodule: it would show in the state_dict
        return self.linear

    def _with_weight(self, weight: Tensor) -> nn.Module:
        bias = self.bias if self.lora_bias is None else nn.Parameter(self.bias, requires_grad=False)
        return _linear(weight, bias, training=self.linear.training)

    def unmerge(self) -> None:
        """Put back the layer without the update: the same tensors, hence the same bits."""
        if self.merged:
            self.linear = self._base
            self._base = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        if self._base is not None:  # it follows the merged layer to other devices and dtypes
            self._base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, merged={self.merged}"


class LoRAEmbedding(LoRALinear):
    """An embedding and its low-rank update: token i has the row E_i + s · B_i A, with A (r, C) and B
    (V, r).

    As in PEFT, A starts from a normal distribution and B, of which there is a row for each token,
    from zero, and there is no dropout.
    """

    def _start(self) -> None:
        if not self.variant.is_plain:
            raise UserError(
                f"{setting('variant')} {self.variant.name}: an embedding has plain LoRA alone; leave it "
                f"out of {setting('targets')}"
            )
        nn.init.normal_(self.lora_A)
        nn.init.zeros_(self.lora_B)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the rows."""
        return self.linear.weight

    @property
    def bias(self) -> None:
        return None

    @property
    def in_features(self) -> int:
        return self.linear.embedding_dim

    @property
    def out_features(self) -> int:
        return self.linear.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.linear(ids)
        if self.merged:
            return rows
        return rows + (self.scale * (F.embedding(ids, self.lora_B) @ self.lora_A)).to(rows.dtype)

    def _with_weight(self, weight: Tensor) -> nn.Embedding:
        return nn.Embedding.from_pretrained(weight).train(self.linear.training)


def fused(x: Tensor) -> bool:
    """Whether to use the fused functions: they serve the backward, and autocast does not reach
    into them."""
    return torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def trained_bias(linear: nn.Module) -> Tensor | None:
    """The bias of a layer of the kernels, if it trains: they take frozen ones alone."""
    is_adapted = type(linear) is LoRALinear and not linear.merged
    if is_adapted and linear.lora_bias is not None:
        return linear.bias
    own = getattr(linear, "bias", None)
    return own if own is not None and own.requires_grad else None


def with_bias(y: Tensor, linear: nn.Module) -> Tensor:
    """The output of the kernels, with the bias that they did not add."""
    bias = trained_bias(linear)
    return y if bias is None else y + bias.to(y.dtype)


def kernel_layer(linear: nn.Module) -> kernels.Layer | None:
    """What the kernels need of a frozen linear layer, without a bias that trains; None for a layer
    that they cannot compute."""
    if type(linear) is LoRALinear and linear.merged:
        return kernel_layer(linear.linear)
    trains_bias = trained_bias(linear) is not None
    if type(linear) is LoRALinear:
        if not linear.variant.is_plain:
            return None
        update = linear.update
        if linear.training and linear.dropout:
            update = replace(update, scale=update.scale / (1 - kernels.dropout_share(linear.dropout)))
        bias = None if trains_bias else linear.linear.bias
        return kernels.Layer(linear.frozen, bias, update, linear.cast)
    if type(linear) is FrozenLinear or (type(linear) is nn.Linear and not linear.weight.requires_grad):
        return kernels.Layer(frozen_weight(linear), None if trains_bias else linear.bias)
    return None


def _linear(weight: Tensor, bias: nn.Parameter | None, *, training: bool) -> nn.Linear:
    """An `nn.Linear` of this very weight, frozen, and this very bias."""
    linear = nn.Linear.__new__(nn.Linear)  # its __init__ would draw random numbers
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear.train(training)


def dropout_mask(x: Tensor, linears: Sequence[nn.Module]) -> Tensor | None:
    """The mask that the updates of these layers share in training."""
    shares = [
        linear.dropout
        for linear in linears
        if type(linear) is LoRALinear and not linear.merged and linear.training
    ]
    return kernels.dropout_mask(x, max(shares)) if any(shares) else None


def add_lora(
    model: nn.Module, config: LoRAConfig, dtype: torch.dtype = torch.float32, *, start: bool = True
) -> list[str]:
    """Wrap the layers that `config.targets` names and freeze everything else; returns their names.
    Without `start`, the adapter still has to get the start that `config.init` names
    (litlora/lora/starts.py).

    Raises UserError for a target that matches nothing, and for a layer that cannot be adapted or is
    too small for the rank.
    """
    if lora_layers(model):
        raise UserError("the model already has an adapter; merge it or unwrap it first")
    names = in_layers(select_layers(model, config.targets), config)
    check_patterns(config, names)
    for name in names:
        (out, width), rank = _size(model.get_submodule(name)), layer_rank(config, name)
        if rank > (most := min(out, width)):
            origin = setting("rank" if rank == config.rank else "rank_pattern")
            raise UserError(f"{origin} {rank}: {name} is {out} x {width}; its rank can be at most {most}")
    whole = select_whole(model, config.modules_to_save, names)
    attach_lora(model, names, config, dtype)
    for name in whole:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = parameter.data.clone()  # the base's own tensor must keep its fingerprint
            parameter.requires_grad_(True)
    train_biases(model, lora_layers(model), config, dtype)
    if start and config.init != "kaiming":
        from litlora.lora.starts import start_lora

        start_lora(model, config)
    return names


def _size(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def attach_lora(
    model: nn.Module, names: list[str], config: LoRAConfig, dtype: torch.dtype = torch.float32
) -> None:
    """Wrap the linear layers and embeddings of these exact names and freeze everything else."""
    check_dropout(variant_named(config.variant), config.dropout)
    model.requires_grad_(False)
    wrapped: dict[nn.Module, LoRALinear] = {}
    # A layer that has two names stays one layer.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name in names or module in wrapped:
            if module not in wrapped:
                rank, alpha = layer_rank(config, name), layer_alpha(config, name)
                kind = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
                wrapped[module] = kind(
                    module, rank, alpha, config.dropout, dtype, rslora=config.rslora, variant=config.variant
                )
            model.set_submodule(name, wrapped[module])


def merge_lora(model: nn.Module) -> None:
    """Fold every update of a model into its W, in place."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Put back every W of a model, bit for bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unwrap_lora(model: nn.Module) -> None:
    """Replace every LoRALinear by the layer that it wraps: merged if it was merged, else without
    its update."""
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.linear)


def lora_updates(model: nn.Module) -> dict[str, Update]:
    """The update of every adapted layer's own W, by the layer's name."""
    return {name: layer.update_of_base for name, layer in lora_layers(model).items()}


def adapter_of(model: nn.Module, config: LoRAConfig) -> Adapter:
    """What trains in a model that `add_lora` prepared: every update, and what trains whole. Its
    settings give each update the rank and alpha that it has."""
    layers, rows = lora_layers(model), rows_of(model)
    updates = {name: update.detached() for name, update in lora_updates(model).items()}
    inside = {f"{layer}.{name}" for layer, update in updates.items() for name in update.tensors()}
    inside |= {f"{layer}.{name}" for layer in layers for name in ("linear.bias", "lora_bias")}
    inside |= rows.named().keys() if rows else set()
    whole = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in inside
    }
    whole |= changed_biases(layers)
    config = settings_for(updates, with_biases(config.started, whole))
    return Adapter(config, updates, whole, rows=rows)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every adapted layer of a model, by each of its names."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALinear)
    }
