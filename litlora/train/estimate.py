"""What memory a fine-tune of a model takes, computed from its architecture alone: no weight is
made, no file of weights is read."""

import dataclasses
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from litlora.config import ModelConfig
from litlora.data.batches import Batch
from litlora.frozen.linear import LINEAR
from litlora.frozen.quantize import QUANTIZERS, Quantizer
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.train.memory import saved_bytes
from litlora.train.objective import SFT
from litlora.train.precision import Precision

METHODS = ("LoRA", "QLoRA", "full")
_MOMENTS = 2
"""Of AdamW, for each weight that trains, in fp32."""


_FEW = 256
"""Tokens of the vocabulary that are enough to count what is kept."""


@dataclass(frozen=True)
class Need:
    """Bytes that one device holds."""

    method: str
    weights: int
    """Of the base: in bf16; with QLoRA the blocks' linear layers in nf4; in fp32 where they train."""
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """That the forward keeps for the backward, with every block's kept."""
    recomputed: int
    """The same where the backward computes each block again."""

    @property
    def total(self) -> int:
        return self.held + self.activations

    @property
    def least(self) -> int:
        """With activations computed again."""
        return self.held + self.recomputed

    @property
    def held(self) -> int:
        """Whatever the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer


def need(config: ModelConfig, method: str, *, rank: int, tokens: int) -> Need:
    """The bytes of one of METHODS, with a LoRA of this rank on all linear layers, and micro-batches
    of so many tokens, all of them one sequence whose every token is learned.

    Bytes of the kernels' own buffers, of the allocator and of torch itself come on top. Raises
    UserError if the model has no layer that LoRA adapts.
    """
    model = GPT.without_weights(config)
    base = list(model.parameters())
    blocks = {id(module.weight) for module in model.model.layers.modules() if isinstance(module, LINEAR)}
    size = 4 if method == "full" else 2
    weights = sum(size * weight.numel() for weight in base)
    if method == "QLoRA":
        nf4 = QUANTIZERS["nf4"]
        packed = [weight for weight in base if id(weight) in blocks]
        weights += sum(quantised_bytes(weight, nf4) - size * weight.numel() for weight in packed)
    adapter = 0
    if method != "full":
        add_lora(model, LoRAConfig(rank=rank))
        known = {id(weight) for weight in base}
        adapter = 4 * sum(w.numel() for w in model.parameters() if id(w) not in known)
    trained = adapter or weights
    one, all_layers = (
        kept_bytes(first_layers(config, count), None if method == "full" else rank, tokens)
        for count in (1, config.num_hidden_layers)
    )
    inputs = 2 * tokens * config.hidden_size * config.num_hidden_layers * (config.altup_num_inputs or 1)
    return Need(method, weights, adapter, trained, _MOMENTS * trained, all_layers, one + inputs)


def quantised_bytes(weight: Tensor, quantizer: Quantizer) -> int:
    """Of a matrix in 4 bits: two values a byte, and an fp32 scale a block."""
    return weight.numel() // 2 + 4 * -(-weight.numel() // quantizer.blocksize)


@cache
def kept_bytes(config: ModelConfig, rank: int | None, tokens: int) -> int:
    """What a forward keeps for the backward beside the weights, counted on tensors without values: with
    a LoRA of this rank on a bf16 base, or, without a rank, of a full fine-tune in bf16-mixed."""
    config = dataclasses.replace(config, vocab_size=min(config.vocab_size, _FEW))  # no logits are kept
    if config.num_experts is not None:
        config = as_dense(config)
    with FakeTensorMode():
        names = GPT.without_weights(config).stored().items()
        precision = Precision("bf16-mixed" if rank is None else "bf16-true", "as a run would choose")
        tensors = {name: torch.empty(weight.shape, dtype=precision.dtype) for name, weight in names}
        model = GPT.from_tensors(config, tensors)
        if rank is not None:
            model.requires_grad_(False)
            add_lora(model, LoRAConfig(rank=rank))
        ids = torch.zeros(1, tokens, dtype=torch.long)
        batch = Batch(ids, torch.arange(tokens - 1), ids[0, 1:], [tokens])
        with precision.computing(ids.device):
            return saved_bytes(SFT(model), batch)


def first_layers(config: ModelConfig, count: int) -> ModelConfig:
    """The model of so many layers, its first ones."""
    lists = {
        field.name: tuple(layer for layer in value if layer < count)
        for field in dataclasses.fields(config)
        if type(value := getattr(config, field.name)) is tuple
    }
    own = config.num_hidden_layers - (config.num_kv_shared_layers or 0)
    shared = {"num_kv_shared_layers": max(0, count - own) or None}
    if count <= own:
        shared["use_double_wide_mlp"] = None
    return dataclasses.replace(config, num_hidden_layers=count, **lists, **shared)


def as_dense(config: ModelConfig) -> ModelConfig:
    """A model whose MLP is as wide as the experts that one token goes through: which these are depends
    on values."""
    width = config.num_experts_per_tok * config.moe_intermediate_size
    width += config.shared_expert_intermediate_size or 0
    width += config.shared_experts_intermediate_size or 0
    width += config.intermediate_size if config.enable_moe_block else 0
    return dataclasses.replace(
        config,
        intermediate_size=width,
        num_experts=None,
        num_experts_per_tok=None,
        moe_intermediate_size=None,
        shared_expert_intermediate_size=None,
        shared_experts_intermediate_size=None,
        norm_topk_prob=False,
        dense_layers=(),
        enable_moe_block=None,
    )
