"""Whether a weight is stored as (out, in), as that of a linear layer is, or as (in, out), as that of
transformers' Conv1D is, which GPT-2 and its kin use.

A PEFT folder states one `fan_in_fan_out` for all of its layers, that of whichever layer came last.
The shape of a weight tells which way it lies unless it is square; then its model must tell. The
experts of a layer lie one way: in one 3-D parameter, (experts, out, in) or (experts, in, out), as in
the other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from litlora.errors import CheckpointError
from litlora.lora import Update
from litlora.lora.dense import ExpertsUpdate

CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""What every Conv1D in transformers is called; other models have linear layers of these names."""
_WIDENING = ("c_attn", "c_fc")
"""Those that have more outputs than inputs."""


def has_conv1d(model: Mapping[str, Tensor]) -> bool | None:
    """Whether the layers of CONV1D_NAMES of a model are Conv1D; None if none of its shapes tells."""
    for name, weight in model.items():
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if module == name or leaf not in CONV1D_NAMES or weight.ndim != 2:
            continue
        rows, columns = weight.shape
        if rows == columns:
            continue
        if leaf in _WIDENING:
            return columns > rows
        if (bias := model.get(f"{module}.bias")) is not None:
            return bias.shape[0] == columns
    return None


def oriented(update: Update, name: str, model: Mapping[str, Tensor], where: str) -> Update:
    """A PEFT layer's update as the model's tensor `name` needs it. Raises CheckpointError, which
    begins with `where`, for a square weight of which nothing tells how it is stored."""
    weight = model[name]
    if weight.ndim != 2 or update.A.ndim != 2 or update.kind == "embedding":
        return update
    shape, own = tuple(weight.shape), (update.B.size(0), update.A.size(1))
    if shape == own[::-1] != own:
        return replace(update, kind="conv1d")
    if shape != own or own != own[::-1]:
        return replace(update, kind="linear") if shape == own else update
    conv1d = has_conv1d(model)
    if name.removesuffix(".weight").rpartition(".")[2] in CONV1D_NAMES:
        is_transposed = conv1d
    else:
        # Where the model has layers of these names, it is one of transformers' or like it, and its
        # others are linear. PEFT states a transposed layer only where it found one.
        is_transposed = None if update.kind == "conv1d" and conv1d is None else False
    if is_transposed is None:
        raise CheckpointError(
            f"{where}: {name} is square, and neither the adapter nor the model's other weights tell whether "
            "it is stored transposed (Conv1D); merge it with PEFT's merge_and_unload"
        )
    return replace(update, kind="conv1d" if is_transposed else "linear")


def oriented_experts(
    update: ExpertsUpdate, name: str, model: Mapping[str, Tensor], others: Iterable[ExpertsUpdate], where: str
) -> ExpertsUpdate:
    """The update of experts as the model's tensor `name` needs it; `others` are those of the same
    adapter. Raises CheckpointError, which begins with `where`, for square weights of which nothing
    tells how they are stored."""
    parent = name.removesuffix(update.parameter)
    same = [other for other in others if other.experts == update.experts]
    for known in (update, *same):
        weight, turned = model.get(parent + known.parameter), replace(known, transposed=True)
        if weight is None or known.shape == turned.shape:
            continue
        if tuple(weight.shape) in (known.shape, turned.shape):
            return replace(update, transposed=tuple(weight.shape) == turned.shape)
    if update.shape[1] != update.shape[2]:
        return update  # it does not fit
    raise CheckpointError(
        f"{where}: {name} is square, and no other parameter of these experts tells whether it is stored "
        "transposed; merge it with PEFT's merge_and_unload"
    )
