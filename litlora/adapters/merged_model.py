"""A model's files with LoRA files added: which tensors are written, in which dtype, one at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from litlora.adapters.apply import Addition, added
from litlora.errors import CheckpointError, setting
from litlora.formats.scaled import FLOAT8, Scale, ScaledModel, shapes
from litlora.storage.dtypes import dtype_name
from litlora.storage.pages import Pages


class MergedModel:
    """The tensors of a model with `additions`, in `dtype`; integers keep theirs.

    Without a `dtype` every tensor is stored as the model stores it: in 8 bits with a new scale where
    it has one. What nothing is added to keeps its bits.
    """

    def __init__(
        self, model: Mapping[str, Tensor], additions: Mapping[str, list[Addition]], dtype: torch.dtype | None
    ) -> None:
        self._model, self._additions, self._dtype = model, additions, dtype
        self._stored = model.stored if isinstance(model, ScaledModel) else dict(model)
        self._weight_of: dict[str, str] = {}
        if isinstance(model, ScaledModel):
            self._weight_of = {scale.name: name for name, scale in model.scales.items()}
        self._scales: dict[str, Scale] = {}
        self._pages = Pages()
        if dtype is None and not any(tensor.dtype in FLOAT8 for tensor in self._stored.values()):
            raise CheckpointError(
                f"{setting('output_dtype')} fp8: is for a model that is stored in 8 bits, which this one is "
                "not; choose a dtype of 16 bits"
            )

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """The bytes of each tensor that is written, and of one of its values."""
        found = {}
        for name, tensor in (self._stored if self._dtype is None else shapes(self._model)).items():
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            found[name] = (tensor.numel() * dtype.itemsize, dtype.itemsize)
        return found

    def tensor(self, name: str) -> Tensor:
        """One of them."""
        result = self._in(self._dtype, name) if self._dtype is not None else self._as_stored(name)
        self._pages.done_with(self._stored[name])
        return result

    def _in(self, dtype: torch.dtype, name: str) -> Tensor:
        return added(name, self._model[name], self._additions.get(name, []), dtype)

    def _as_stored(self, name: str) -> Tensor:
        weight, stored = self._weight_of.get(name, name), self._stored[name]
        if weight not in self._additions:
            return stored
        scale = self._model.scales.get(weight) if isinstance(self._model, ScaledModel) else None
        if scale is None and stored.dtype not in FLOAT8:
            return self._in(stored.dtype, name)
        W = self._in(torch.float32, weight)
        if scale is None:
            if W.abs().max() > torch.finfo(stored.dtype).max:
                raise CheckpointError(
                    f"{name}: the result has values beyond what {dtype_name(stored.dtype)} without a scale "
                    f"can hold; choose another {setting('output_dtype')}"
                )
            return W.to(stored.dtype)
        # The scale comes first in the file; the weight is then computed again.
        if weight not in self._scales:
            self._scales[weight] = scale.renewed(W, self._stored[weight].dtype)
        renewed = self._scales[weight]
        return renewed.stored if name != weight else renewed.divided(W, stored.dtype)
