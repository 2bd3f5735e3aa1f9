"""A model with the linear layers of its blocks in few bits: what an adapter was trained on, and what
one is to be trained on (QLoRA)."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from litlora.checkpoint import Chain
from litlora.errors import CheckpointError, UserError, setting
from litlora.frozen.few_bits import Quantized
from litlora.frozen.low_rank import LowRank
from litlora.frozen.quantize import Expected, Quantizer, ToQuantize
from litlora.lora import Adapter
from litlora.model import kind_of
from litlora.storage.pages import Pages
from litlora.transformers_config import Architecture

if TYPE_CHECKING:
    from litlora.adapters.merge import Plan


def block_linears(config: Architecture) -> list[str]:
    """The names of the weights that are quantised: those of the linear layers in the blocks."""
    model = kind_of(config).without_weights(config)
    linears = [name for name, one in model.named_modules() if type(one) is nn.Linear]
    return [f"{name}.weight" for name in linears if name.startswith(model.block_prefix)]


def as_trained(plan: "Plan", config: Architecture, adapter: Adapter, chain: Chain) -> "Plan":
    """The plan of an adapter's base as its training saw it: in few bits, if it was quantised for it.
    Raises BaseMismatchError, once all is computed, for other bits than those."""
    quantized = adapter.base and adapter.base.quantized
    if not quantized:
        return plan
    expected = None
    if not chain.allow_base_mismatch:
        what = f"{adapter.file}: its base, quantised, does not have the bits that it was trained on"
        expected = Expected(quantized.fingerprint, len(block_linears(config)), what)
    taken_out = quantized.taken_out
    for layer, product in taken_out.items():
        tensor = plan.get(f"{layer}.weight")
        if tensor is None or tensor.shape != product.shape:
            shape = None if tensor is None else tuple(tensor.shape)
            raise CheckpointError(
                f"{adapter.file}: takes {tuple(product.shape)} out of {layer}, and the base has {shape} there"
            )
    file = chain.base.file
    return quantised(plan, config, quantized.quantizer, file, expected=expected, taken_out=taken_out)


def quantised(
    plan: "Plan",
    config: Architecture,
    quantizer: Quantizer,
    file: Path,
    *,
    kept: Collection[str] = (),
    expected: Expected | None = None,
    taken_out: Mapping[str, LowRank] = MappingProxyType({}),
) -> "Plan":
    """The plan with the linear layers of the blocks quantised, each when it is first used, but not
    those whose names are in `kept`. `file` is what an error about their values names, `taken_out` what
    is subtracted from some layers first, by the layer's name.

    Raises UserError for a layer that cannot be quantised, or is stored in few bits already.
    """
    names = [name for name in block_linears(config) if name not in kept]
    pages, read, result = Pages(), {name: plan[name].sources() for name in names}, dict(plan)

    def done(values: Tensor, matrix: Quantized) -> None:
        pages.done_with(*read[matrix.name])
        pages.release()  # each at once, not some of them together: loading is to take little memory
        if expected is not None:
            expected.add(matrix.name, matrix)

    for name in names:
        tensor, asked = plan[name], f"{setting('quantize')} {quantizer.name}"
        stored = tensor.start
        if isinstance(stored, Quantized) and not isinstance(stored, ToQuantize) and not tensor.links:
            raise UserError(
                f"{asked}: {file} holds {name} in few bits already ({stored.kind}), and it is used as it is "
                f"stored; leave {setting('quantize')} out"
            )
        if problem := quantizer.problem(tensor.shape):
            raise UserError(f"{asked}: {name} {problem}; int8 and fp8 have no blocks")
        rows, columns = tensor.shape
        facts = (name, file, tensor.dtype, columns, range(rows))
        less = taken_out.get(name.removesuffix(".weight"))
        start = ToQuantize(*facts, tensor.tensor, quantizer, done, less)
        result[name] = dataclasses.replace(tensor, start=start, links=())
    return result
