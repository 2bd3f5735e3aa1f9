"""The embedding and the output head of a tied model before a merge that unties them, and what
adapters add to the output of each, as PEFT computes it.

Shares no code with the untying of merge.py: `verify` finds a mistake there by the logits.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.adapters.merge import EMBEDDING, HEAD, MergedTensor, Plan
from litlora.lora import Adapter, Update
from litlora.lora.variants import variant_named
from litlora.model import GPT
from litlora.transformers_config import Architecture


@dataclass(frozen=True)
class Unmerged:
    """A model before its last merge, and the adapters of that merge with their weights."""

    plan: Plan
    config: Architecture
    adapters: list[tuple[Adapter, float]]

    def is_untied_by(self, merged: Architecture) -> bool:
        """Whether the merge gives the model an output head of its own, by updates that `add_live`
        can compute."""
        updates = (self._update(adapter, name) for adapter, _ in self.adapters for name in (EMBEDDING, HEAD))
        plain = all(update is None or variant_named(update.variant).is_plain for update in updates)
        return plain and self.config.tie_word_embeddings and not merged.tie_word_embeddings

    def ends(self) -> Plan:
        """The embedding and the output head that the updates are added to: the tied weight, or what
        a sole adapter holds in its place."""
        tied = self.plan[EMBEDDING]
        return {name: self._end(name, dataclasses.replace(tied, name=name)) for name in (EMBEDDING, HEAD)}

    def _end(self, name: str, tied: MergedTensor) -> MergedTensor:
        held = self._held(self.adapters[0][0], name) if self._is_sole else None
        return tied if held is None else dataclasses.replace(tied, start=held, links=())

    def add_live(self, model: GPT) -> None:
        """Let the embedding and the output head of a model add what the adapters add."""

        def embed(module: nn.Embedding, args: tuple[Tensor], rows: Tensor) -> Tensor:
            rows = rows.float()
            return rows + self._added(EMBEDDING, rows, lambda weight: F.embedding(args[0], weight).float())

        def head(module: nn.Linear, args: tuple[Tensor], logits: Tensor) -> Tensor:
            plain = logits if module.bias is None else logits - module.bias.float()
            return logits + self._added(HEAD, plain, lambda weight: F.linear(args[0], weight))

        model.model.embed_tokens.register_forward_hook(embed)
        model.lm_head.register_forward_hook(head)

    def _added(self, name: str, out: Tensor, times: Callable[[Tensor], Tensor]) -> Tensor:
        """What the adapters add to `out`, the output of the embedding or the head; `times` computes
        the output that another weight has for the same input."""
        total = torch.zeros_like(out)
        for adapter, weight in self.adapters:
            held = None if self._is_sole else self._held(adapter, name)
            if held is not None:
                total += weight * (times(held) - out)
            if (update := self._update(adapter, name)) is not None:
                A, B = update.A.float(), update.B.float()
                # The embedding looks up rows of B A; the head multiplies by all of them.
                product = times(B) @ A if name == EMBEDDING else F.linear(times(A), B)
                total += weight * update.scale * product
        return total

    @property
    def _is_sole(self) -> bool:
        return len(self.adapters) == 1 and self.adapters[0][1] == 1

    @staticmethod
    def _update(adapter: Adapter, name: str) -> Update | None:
        return adapter.updates.get(name.removesuffix(".weight"))

    def _held(self, adapter: Adapter, name: str) -> Tensor | None:
        """The weight that an adapter brings for one of the two: its own, or the one below an update
        of the other, as the two share it."""
        other = EMBEDDING if name == HEAD else HEAD
        if name in adapter.whole:
            return adapter.whole[name]
        return adapter.whole.get(other) if self._update(adapter, other) is not None else None
