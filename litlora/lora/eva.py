"""EVA: A, and the rank of each layer, by what the layer is given (Paischer et al. 2024,
arXiv:2410.07170), with the steps of PEFT's `initialize_lora_eva_weights`.

The rows of A are the principal components of a layer's inputs at the learned tokens. The sum of all
ranks is dealt out anew: a component gets a place by the share of its layer's variance that it
explains, and a layer has at most rho times its rank. The components are found batch by batch, until
those that count turn no more. B is zero, so that nothing changes at first.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import UserError, setting
from litlora.lora.layer import LoRALinear, lora_layers
from litlora.lora.mode import evaluating
from litlora.settings import LoRAConfig

TAU = 0.99
"""The cosine between a component and itself one batch earlier from which it counts as found."""
MOST_BATCHES = 1000
OVERSAMPLING, ITERATIONS, SEED = 2, 4, 42
"""Of the random projection by which the singular vectors of a batch are found."""


class Components:
    """The principal components of rows that come in batches (Ross et al. 2008), centred."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.vectors: Tensor | None = None
        """(count, in), the largest variance first."""
        self.shares: Tensor | None = None
        """(count,): of the variance."""
        self.found = torch.zeros(count, dtype=torch.bool)
        """(count,): whether the last batch turned it by little."""
        self._rows = 0
        self._mean = self._variance = self._values = torch.zeros(())

    def add(self, X: Tensor) -> None:
        """A batch of rows (n, in), at least `count`."""
        X, exact = X.float(), torch.float32 if X.device.type == "mps" else torch.float64
        rows, mean = len(X), X.mean(dim=0, dtype=exact)
        X = X - mean.to(X.dtype)
        # Chan et al. 1979: the variances of two parts, and the distance of their means.
        total = self._rows + rows
        apart = (self._mean - mean) * (self._rows * rows / total) ** 0.5 if self._rows else mean * 0
        self._variance = self._variance + X.to(exact).square().sum() + apart.square().sum()
        if self.vectors is not None:
            X = torch.vstack([self._values[:, None] * self.vectors, X.to(exact), apart])
        S, Vt = _singular(X, self.count)
        vectors = Vt[: self.count]
        if self.vectors is not None:
            self.found = (F.cosine_similarity(vectors, self.vectors) >= TAU).cpu()
        self._mean = (self._mean * self._rows + mean * rows) / total
        self.vectors, self._values, self._rows = vectors, S[: self.count], total
        self.shares = (self._values.square() / self._variance).cpu()


def _singular(X: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values of X and their right vectors (k, in), k at least `count`. The
    largest entry of each is positive."""
    with torch.random.fork_rng(devices=[X.device] if X.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        _, S, V = torch.svd_lowrank(X, min(OVERSAMPLING * count, *X.shape), niter=ITERATIONS)
    largest = V.gather(0, V.abs().argmax(dim=0, keepdim=True))
    return S, (V * largest.sign()).T


@dataclass(frozen=True)
class Inputs:
    """What a model is given, in batches that come again and again."""

    count: int
    """How many batches there are."""
    batch: Callable[[int], tuple[Callable[[], object], Tensor]]
    """Gives a batch by its number: a function that runs the model on it, and the places (M,) of the
    learned tokens among all its tokens."""


@torch.no_grad()
def start_eva(model: nn.Module, config: LoRAConfig, inputs: Inputs) -> None:
    """Give the fresh adapter of a model the start and the ranks of EVA. Layers that get no rank are
    plain layers again.

    Raises UserError for batches that are too small for the rank, or do not settle the components.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoRALinear)}
    search = _Search(layers, config.eva_rho)
    with evaluating(model):
        search.group(inputs.batch(0))
        for number in range(MOST_BATCHES):
            if number == inputs.count and (name := search.unseen()):
                raise UserError(
                    f"{setting('init')} eva: no batch has the {search.components[name].count} learned tokens "
                    f"that {name} needs, its rank times {setting('eva_rho')}; lower one of the two, or make "
                    f"batches larger ({setting('micro_batch_tokens')}, {setting('micro_batch_size')})"
                )
            if not search.open():
                break
            search.step(inputs.batch(number % inputs.count))
        else:
            raise UserError(
                f"{setting('init')} eva: the components of {search.open()[0]} were not found in "
                f"{MOST_BATCHES} batches; use larger batches, or another start"
            )
    for name, layer in lora_layers(model).items():
        rank = search.ranks.get(name)
        if rank == 0:
            model.set_submodule(name, layer.linear)
        elif rank is not None:
            if rank != layer.rank:
                layer.set_rank(rank)
            layer.lora_A.copy_(search.components[search.leader[name]].vectors[:rank])


@dataclass
class _Search:
    """The components of every layer, as far as they are known."""

    layers: dict[str, LoRALinear]
    rho: float
    leader: dict[str, str] = field(default_factory=dict)
    """{layer: the first one that has the same inputs}."""
    components: dict[str, Components] = field(default_factory=dict)
    """Of each leader."""
    ranks: dict[str, int] = field(default_factory=dict)

    def group(self, batch: tuple[Callable[[], object], Tensor]) -> None:
        """Find out which layers have the same inputs."""
        digests: dict[str, bytes] = {}

        def take(name: str, rows: Tensor) -> None:
            digests[name] = hashlib.sha256(rows.contiguous().view(torch.uint8).cpu().numpy()).digest()

        self._run(batch, list(self.layers), take)
        first: dict[bytes, str] = {}
        most: dict[str, int] = {}
        for name, layer in self.layers.items():
            self.leader[name] = leader = first.setdefault(digests[name], name)
            most[leader] = max(most.get(leader, 0), min(round(layer.rank * self.rho), layer.in_features))
        self.components = {name: Components(count) for name, count in most.items()}
        self.ranks = {name: most[leader] for name, leader in self.leader.items()}

    def open(self) -> list[str]:
        """The leaders of which a component that counts has not been found yet."""
        most = {leader: 0 for leader in self.components}
        for name, leader in self.leader.items():
            most[leader] = max(most[leader], self.ranks[name])
        return [name for name, one in self.components.items() if not one.found[: most[name]].all()]

    def unseen(self) -> str | None:
        """A leader that no batch was large enough for."""
        return next((name for name, one in self.components.items() if one.vectors is None), None)

    def step(self, batch: tuple[Callable[[], object], Tensor]) -> None:
        """Take in the inputs of a batch, and deal out the ranks."""

        def take(name: str, rows: Tensor) -> None:
            if len(rows) >= self.components[name].count:
                self.components[name].add(rows)

        self._run(batch, self.open(), take)
        if self.unseen() is None:
            self._deal()

    def _deal(self) -> None:
        """The budget, the sum of all ranks, goes to the components that explain the largest shares."""
        order = [*self.components, *(name for name, leader in self.leader.items() if name != leader)]
        names, shares = [], []
        for name in order:
            own = self.components[self.leader[name]].shares
            names += [name] * len(own)
            shares.append(own)
        budget = sum(layer.rank for layer in self.layers.values())
        places = torch.cat(shares).argsort(descending=True)[:budget].tolist()
        dealt = Counter(names[place] for place in places)
        ranks = {name: dealt[name] for name in order}
        for name, leader in self.leader.items():
            if ranks[name] > ranks[leader]:  # of equal shares, as PEFT deals them out
                ranks[name], ranks[leader] = ranks[leader], ranks[name]
        # B has no more columns than outputs to set apart.
        self.ranks = {name: min(rank, self.layers[name].out_features) for name, rank in ranks.items()}

    def _run(
        self,
        batch: tuple[Callable[[], object], Tensor],
        names: list[str],
        take: Callable[[str, Tensor], None],
    ) -> None:
        """Run a batch, and hand over the inputs (M, in) of these layers at its learned tokens."""
        run, learned = batch

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda layer, args: take(name, args[0].flatten(0, -2)[learned])

        handles = [self.layers[name].register_forward_pre_hook(hook(name)) for name in names]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
