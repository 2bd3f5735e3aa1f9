"""LyCORIS's products, and DoRA's magnitude, as files hold them: the tensors of one layer, checked and
made an update. The formulas are in litlora/lora/dense.py.

    LoHa    hada_w1_a (out, r) and hada_w1_b (r, in), hada_w2_a and hada_w2_b; with hada_t1 (r, r,
            *kernel) and hada_t2 the others are (r, out) and (r, in). s = alpha / r
    LoKr    lokr_w1, or lokr_w1_a and lokr_w1_b; lokr_w2, or lokr_w2_a and lokr_w2_b, with lokr_t2
            (r, r, *kernel) as above. s = alpha / r, and 1 if w1 and w2 are both whole
    DoRA    dora_scale (out, 1, ...), or (1, in, ...) for norms by input; lora_magnitude_vector has
            one value for each output, of an embedding one for each column

A file without alpha has s = 1, as in LyCORIS and ComfyUI.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.formats.lora_keys import FACTORS_OF
from litlora.lora.dense import DecomposedUpdate, DenseUpdate, HadamardUpdate, KroneckerUpdate, Pair
from litlora.lora.update import Update
from litlora.storage.tensors import at_least_16_bits


def product(layer: str, parts: Mapping[str, Tensor], alpha: float | None) -> DenseUpdate:
    """The update of one layer's LoHa or LoKr. Raises CheckpointError for tensors that form none."""
    parts = {name: at_least_16_bits(tensor) for name, tensor in parts.items()}
    kinds = [kind for kind, names in FACTORS_OF.items() if not parts.keys().isdisjoint(names)]
    if len(kinds) > 1:
        raise CheckpointError(f"{layer}: has factors of LoHa and of LoKr; keep one")
    if not all(tensor.is_floating_point() and tensor.numel() for tensor in parts.values()):
        raise CheckpointError(f"{layer}: has a factor that is empty, or whose values are not floating-point")
    try:
        update = (_loha if kinds[0] == "loha" else _lokr)(parts, alpha)
    except (LookupError, RuntimeError):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(parts.items()))
        raise CheckpointError(f"{layer}: {shapes} do not form an update") from None
    return update


def _loha(parts: Mapping[str, Tensor], alpha: float | None) -> HadamardUpdate:
    rank = parts["hada_w1_b"].size(0)
    scale = 1.0 if alpha is None else alpha / rank
    sides, shapes = [], []
    for which in "12":
        names = f"hada_w{which}_a", f"hada_w{which}_b", f"hada_t{which}"
        kernel = parts[names[2]] if "hada_t1" in parts or "hada_t2" in parts else None
        pair, shape = _pair(parts[names[0]], parts[names[1]], kernel)
        sides.append(pair)
        shapes.append(shape)
    if shapes[0] != shapes[1]:
        raise RuntimeError
    return HadamardUpdate(shapes[0], *sides, scale)


def _lokr(parts: Mapping[str, Tensor], alpha: float | None) -> KroneckerUpdate:
    w1, (rows, columns) = _side(parts, "lokr_w1")
    w2, (out, inputs, *kernel) = _side(parts, "lokr_w2")
    ranks = [pair[0].size(1) for pair in (w2, w1) if not isinstance(pair, Tensor)]
    scale = alpha / ranks[0] if ranks and alpha is not None else 1.0
    return KroneckerUpdate((rows * out, columns * inputs, *kernel), w1, w2, scale)


def _side(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor | Pair, tuple[int, ...]]:
    """One side of Kronecker's product, and its shape."""
    halves = [part for part in (f"{name}_a", f"{name}_b", "lokr_t2") if part in parts]
    if name == "lokr_w1":
        halves = [part for part in halves if part != "lokr_t2"]
    if name in parts:
        if halves or parts[name].ndim < 2:
            raise RuntimeError
        return parts[name].flatten(1), tuple(parts[name].shape)
    kernel = parts.get("lokr_t2") if name == "lokr_w2" else None
    return _pair(parts[f"{name}_a"], parts[f"{name}_b"], kernel)


def _pair(a: Tensor, b: Tensor, kernel: Tensor | None) -> tuple[Pair, tuple[int, ...]]:
    """B and A of one matrix, and its shape; with a kernel (Tucker's decomposition), of a
    convolution's weight."""
    if kernel is None:
        if not (a.ndim == b.ndim == 2 and a.size(1) == b.size(0)):
            raise RuntimeError
        return (a, b), (a.size(0), b.size(1))
    return (a.T, tucker(kernel, b).flatten(1)), (a.size(1), b.size(1), *kernel.shape[2:])


def tucker(kernel: Tensor, down: Tensor) -> Tensor:
    """kernel (p, r, *k) times down (r, in): (p, in, *k), in fp32 or better."""
    exact = torch.promote_types(torch.promote_types(kernel.dtype, down.dtype), torch.float32)
    return torch.einsum("p r ..., r i -> p i ...", kernel.to(exact), down.to(exact))


def decomposed(
    layer: str, update: Update | DenseUpdate, magnitude: Tensor, *, of_outputs: bool
) -> DecomposedUpdate:
    """DoRA around an update. `of_outputs`: whether the magnitude can only be one of outputs, however
    it is shaped. Raises CheckpointError for a magnitude of another size."""
    is_transposed = isinstance(update, Update) and update.kind != "linear"
    if is_transposed:
        of_outputs = True
    out, size = update.shape[1 if is_transposed else 0], magnitude.numel()
    by_input = not of_outputs and magnitude.ndim > 1 and magnitude.size(0) == 1 and (out, size) != (1, 1)
    if by_input:
        expected = size > 0 and magnitude.size(1) == size and math.prod(update.shape[1:]) % size == 0
    else:
        expected = size == out
    if not magnitude.is_floating_point() or not expected:
        raise CheckpointError(
            f"{layer}: the magnitude {tuple(magnitude.shape)} fits neither the outputs nor the inputs of "
            f"{tuple(update.shape)}"
        )
    axis = "in" if by_input or is_transposed else "out"
    return DecomposedUpdate(update, at_least_16_bits(magnitude).flatten(), axis)
