"""The best approximation of a matrix by one of low rank: its singular value decomposition, cut off,
exact or randomised.

The randomised one (Halko, Martinsson and Tropp 2011, arXiv:0909.4061) multiplies the matrix by a
few dozen vectors, alternately from either side, instead of decomposing it. It stops when it has
proved that its result is nearly the best.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLERANCE = 0.01
"""The randomised decomposition stops when its error is proved to be at most this share above the
least possible."""
MAX_ROUNDS = 24
"""Multiplications by the matrix after which it returns its result, proved or not."""
OVERSAMPLING = 32
"""Vectors beyond the rank, at least; they cost little, and each round gains more from them."""
NOISE = 5e-7
"""A relative error of this size is fp32's own."""
PYTHAGORAS = 1e-3
"""If more than this share of ‖D‖² is left, it is known well enough from the singular values found
so far to see that the error is not yet near the least."""
FAILURE = 1e-9
"""The probability that the random part of the proof is wrong, for one matrix."""
BLOCK_SIZE = 1 << 19
"""Values computed at a time where a matrix of the whole size would be needed: about what the caches
hold."""


@dataclass(frozen=True)
class RankRule:
    """Which rank a matrix gets: `rank`, or else the smallest, at least 1, that meets every given
    criterion."""

    rank: int | None = None
    energy: float | None = None
    """Share of the squared Frobenius norm to keep."""
    sv_ratio: float | None = None
    """Keep the singular values of at least the largest divided by this."""
    max_error: float | None = None
    """Largest relative error in the Frobenius norm."""

    def choose(self, squares: Tensor, total: float) -> int | None:
        """The rank for a matrix whose largest singular values have these squares (falling), of the
        sum `total`; None if more are needed."""
        if self.rank is not None:
            return self.rank if self.rank <= len(squares) else None
        needed = [1]
        for share in (self.energy, None if self.max_error is None else 1 - self.max_error**2):
            if share is not None:
                needed.append(int((squares.cumsum(0) < share * total).sum()) + 1)
        if self.sv_ratio is not None:
            above = int((squares * self.sv_ratio**2 >= squares[0]).sum())
            needed.append(above if above < len(squares) else above + 1)
        return max(needed) if max(needed) <= len(squares) else None


@dataclass(frozen=True)
class Truncated:
    """U S V, the first singular values and vectors of a matrix D, and how far that is from D."""

    U: Tensor
    """(m, rank), orthonormal columns."""
    S: Tensor
    """(rank,), falling."""
    V: Tensor
    """(rank, n), orthonormal rows."""
    norm: float
    """The Frobenius norm of D."""
    error: float
    """The Frobenius norm of D - U S V."""
    optimum: float
    """Proved: no matrix of this rank is nearer to D than this."""

    @property
    def is_proved(self) -> bool:
        """Whether the error is proved to be within TOLERANCE of the least possible."""
        return self.excess <= TOLERANCE

    @property
    def excess(self) -> float:
        """An upper bound on the share by which the error is above the least possible, apart from
        the rounding errors of the arithmetic."""
        if self.error <= self.optimum:
            return 0.0
        beyond = math.sqrt(max(self.error**2 - (NOISE * self.norm) ** 2, 0.0))
        return max(beyond / self.optimum - 1, 0.0) if self.optimum > 0 else 0.0 if beyond == 0 else math.inf

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of B A = U S V, (rank, n) and (m, rank), each with half of every singular
        value."""
        root = self.S.sqrt()
        return root[:, None] * self.V, self.U * root


def truncate_exact(D: Tensor, rule: RankRule) -> Truncated:
    """The truncated singular value decomposition of D, (m, n) and finite, by decomposing it."""
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    squares = S.double().square()
    rank = rule.choose(squares, squares.sum().item()) or len(S)
    best = Truncated(U[:, :rank], S[:rank], V[:rank], frobenius(D), 0.0, 0.0)
    error = distance(D, *best.factors)
    return replace(best, error=error, optimum=error)


def truncate(D: Tensor, rule: RankRule, seed: int) -> Truncated:
    """The same for a fraction of the work, with an error that is proved to be within TOLERANCE of
    the least possible.

    D is decomposed exactly if a large part of its singular values is needed. After MAX_ROUNDS the
    result may be unproved.
    """
    norm = frobenius(D)
    if norm and not 1e-12 < norm < 1e12:  # its fourth power leaves fp32's range
        # A power of two changes no digit.
        unit = 2.0 ** round(math.log2(norm))
        found = truncate(D / unit, rule, seed)
        return replace(
            found, S=found.S * unit, norm=norm, error=found.error * unit, optimum=found.optimum * unit
        )
    total, least = norm**2, min(D.shape)
    generator = torch.Generator().manual_seed(seed)
    rank = rule.rank or OVERSAMPLING
    width = rank + max(OVERSAMPLING, rank // 2)
    M, basis, S, X = D, torch.linalg.qr(_random(D, 1, width, generator))[0], None, None
    found, turned = None, False
    for turn in range(MAX_ROUNDS):
        if 2 * width > least:
            return truncate_exact(D, rule)
        image = M @ basis
        if S is not None:  # Mᵀ X = basis S
            rank = rule.choose(S.double().square(), total)
            if rank is None:
                width *= 2
                more = torch.cat([basis, _random(M, 1, width // 2, generator)], 1)
                basis, S = torch.linalg.qr(more)[0], None
                continue
            U, V = (X, basis) if not turned else (basis, X)
            found = Truncated(U[:, :rank], S[:rank], V[:, :rank].T, math.sqrt(total), 0.0, 0.0)
            gain, least_kept = _gain(X, S, image, rank), S[-1].item() ** 2
            left = total - S[:rank].double().square().sum().item()
            # μ is rarely much smaller than the smallest value of Θ.
            if left < PYTHAGORAS * total or left - gain(least_kept) >= left / (1 + TOLERANCE) ** 2:
                found = replace(found, error=distance(D, *found.factors))
                optimum = _least_error(M.T, X, found.error, gain, least_kept, 3 + turn, generator)
                found = replace(found, optimum=optimum)
                if found.is_proved:
                    return found
        Q, triangle = torch.linalg.qr(image)
        P, values, W = torch.linalg.svd(triangle.double())
        basis, S, X, M = Q @ P.to(D.dtype), values.to(D.dtype), basis @ W.T.to(D.dtype), M.T
        turned = not turned
    return replace(found, error=distance(D, *found.factors)) if found else truncate_exact(D, rule)


def _gain(X: Tensor, S: Tensor, image: Tensor, rank: int) -> Callable[[float], float]:
    """An upper bound on how much more of ‖M‖² another basis of that rank can explain than X, where
    M X = U S and `image` = Mᵀ U.

    In the basis X and its complement, MᵀM = [[Θ, Rᵀ], [R, C]] with Θ = S². For every t > 0 that is
    at most the block diagonal matrix of Θ + RᵀR / t and C + t. So with C <= μ the r largest
    eigenvalues, whose sum is what an approximation of rank r can explain, add up to no more than
    those of Θ + RᵀR / t, each raised to μ + t if it is smaller. The bound is a function of μ.
    """
    theta = S.double().square()
    residual = ((image - X * S) * S).double()
    t = theta[0] * torch.logspace(-20, 2, 12, base=2, dtype=torch.float64, device=X.device)
    values = torch.linalg.eigvalsh(theta.diag() + residual.T @ residual / t[:, None, None])[:, -rank:]
    return lambda mu: (torch.maximum(values, mu + t[:, None]).sum(1) - theta[:rank].sum()).min().item()


def _least_error(
    M: Tensor,
    X: Tensor,
    error: float,
    gain: Callable[[float], float],
    least_kept: float,
    rounds: int,
    generator: torch.Generator,
) -> float:
    """A lower bound on the error of every approximation of M of the rank at which X has the given
    error; see `_gain` and `_largest`."""

    def bound(mu: float) -> float:
        return math.sqrt(max(error**2 - gain(mu), 0.0))

    proved = bound(error**2)  # C is what X leaves, no more than what a part of X leaves
    needed = error / (1 + TOLERANCE)
    hopeless = bound(least_kept) < needed
    return proved if proved >= needed or hopeless else bound(_largest(M, X, rounds, generator))


def _largest(M: Tensor, X: Tensor, rounds: int, generator: torch.Generator) -> float:
    """An upper bound on the largest eigenvalue μ of C = (1 - XXᵀ) MᵀM (1 - XXᵀ), which fails with
    probability FAILURE at most.

    Normal random vectors Y, s of them, have components along the eigenvector whose squares add up
    to less than c with a probability below (c/2)^(s/2) / Γ(s/2 + 1); and the norm of C^q Y is at
    least μ^q √c.
    """
    vectors = 16
    c = 2 * (FAILURE * math.gamma(vectors / 2 + 1)) ** (2 / vectors)
    Y, log_scale = _random(M, 1, vectors, generator), 0.0
    for _ in range(rounds):
        Y = Y - X @ (X.T @ Y)
        Y = M.T @ (M @ Y)
        Y = Y - X @ (X.T @ Y)
        norm = frobenius(Y)
        if norm == 0:
            return 0.0
        Y, log_scale = Y / norm, log_scale + math.log(norm)
    norm = torch.linalg.matrix_norm(Y.double().T @ Y.double(), 2).sqrt().item()
    return math.exp((log_scale + math.log(norm / math.sqrt(c))) / rounds)


def _random(M: Tensor, axis: int, width: int, generator: torch.Generator) -> Tensor:
    """Normal random vectors to multiply M with along `axis`."""
    return torch.randn(M.size(axis), width, generator=generator).to(M)


def frobenius(D: Tensor) -> float:
    """The Frobenius norm: squares in D's dtype, a block at a time, summed in fp64; all in fp64
    where squares leave fp32's range."""
    total = sum(block.square().sum().double() for block in D.reshape(-1).split(1 << 20)).item()
    if 1e-24 < total < math.inf:
        return math.sqrt(total)
    return torch.linalg.vector_norm(D, dtype=torch.float64).item()


def distance(D: Tensor, A: Tensor, B: Tensor) -> float:
    """The Frobenius norm of D - B A, some rows at a time."""
    total, step = 0.0, max(1, BLOCK_SIZE // D.size(1))
    # One block of memory for all rows: fresh memory costs more than the arithmetic.
    room = D.new_empty(min(step, D.size(0)), D.size(1))
    for rows, block in zip(D.split(step), B.split(step), strict=True):
        left = torch.addmm(rows, block.to(D.dtype), A.to(D.dtype), alpha=-1, out=room[: len(rows)])
        total += frobenius(left) ** 2
    return math.sqrt(total)
