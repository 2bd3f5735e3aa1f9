"""The randomised decomposition: as good as it says it is, whatever the spectrum."""

import math

import pytest
import torch

from litlora.adapters.lowrank import TOLERANCE, RankRule, distance, frobenius, truncate, truncate_exact

SIZE = 400
INDEX = torch.arange(1, SIZE + 1)


def with_spectrum(values: torch.Tensor, m: int = SIZE, n: int = SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(size, len(values), generator=generator))[0] for size in (m, n))
    return (U * values) @ V.T


SPECTRA = {
    "flat": with_spectrum(torch.ones(SIZE)),
    "noise": torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)),
    "slow": with_spectrum(INDEX**-0.3),
    "harmonic": with_spectrum(1.0 / INDEX),
    "fast": with_spectrum(0.9**INDEX),
    "gap": with_spectrum(torch.where(INDEX <= 16, 1.0, 0.01)),
    "gap beyond the rank": with_spectrum(torch.where(INDEX <= 20, 1.0, 0.01)),
    "of low rank": with_spectrum(torch.ones(16)),
    "below the rank": with_spectrum(torch.ones(5)),
    "wide": with_spectrum(1.0 / INDEX, m=SIZE, n=3 * SIZE),
    "tall": with_spectrum(1.0 / INDEX, m=3 * SIZE, n=SIZE),
    "tiny numbers": 1e-15 * with_spectrum(1.0 / INDEX),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_within_a_hundredth_of_the_least_and_the_proof_holds(name):
    D = SPECTRA[name]
    found = truncate(D, RankRule(16), seed=0)
    values = torch.linalg.svdvals(D.double())
    least = values[16:].square().sum().sqrt().item()
    noise = 1e-6 * found.norm
    A, B = found.factors
    assert A.shape == (16, D.size(1)) and B.shape == (D.size(0), 16)
    assert math.isclose(
        found.error, (D.double() - B.double() @ A.double()).norm().item(), rel_tol=1e-3, abs_tol=noise
    )
    assert found.error <= 1.01 * least + noise
    assert found.is_proved and found.excess <= TOLERANCE
    assert found.optimum <= least + noise, "a lower bound that is above the least error proves nothing"


def test_too_few_rounds_are_told(monkeypatch):
    monkeypatch.setattr("litlora.adapters.lowrank.MAX_ROUNDS", 2)
    found = truncate(SPECTRA["noise"], RankRule(16), seed=0)
    assert not found.is_proved and found.excess > TOLERANCE


@pytest.mark.parametrize("name", ["harmonic", "gap", "of low rank"])
def test_the_error_that_is_told_without_a_proof_is_the_error(name, monkeypatch):
    monkeypatch.setattr("litlora.adapters.lowrank.MAX_ROUNDS", 2)
    D = SPECTRA[name]
    found = truncate(D, RankRule(16), seed=0)
    A, B = found.factors
    assert not found.is_proved
    assert math.isclose(found.error, (D.double() - B.double() @ A.double()).norm().item(), rel_tol=1e-5)


def test_a_seed_decides():
    D = SPECTRA["noise"]
    first, again, other = (truncate(D, RankRule(16), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.U, again.U) and not torch.equal(first.U, other.U)


def test_exact_is_the_truncated_decomposition():
    D = SPECTRA["harmonic"]
    found = truncate_exact(D, RankRule(16))
    values = torch.linalg.svdvals(D.double())
    assert (
        math.isclose(found.error, values[16:].square().sum().sqrt().item(), rel_tol=1e-4)
        and found.excess == 0
    )
    A, B = found.factors
    torch.testing.assert_close(
        A.norm(dim=1), B.norm(dim=0), msg="each factor has half of every singular value"
    )


@pytest.mark.parametrize(
    "decompose", [truncate_exact, lambda D, rule: truncate(D, rule, 0)], ids=["exact", "randomised"]
)
@pytest.mark.parametrize(
    "rule",
    [
        RankRule(energy=0.9),
        RankRule(max_error=0.1),
        RankRule(sv_ratio=20.5),
        RankRule(sv_ratio=20.5, max_error=0.1),
    ],
    ids=str,
)
def test_the_rank_is_the_smallest_that_meets_the_criteria(rule, decompose):
    values = 1.0 / INDEX.double()
    lost = 1 - values.square().cumsum(0) / values.square().sum()
    shares = [
        share for share in (rule.energy and 1 - rule.energy, rule.max_error and rule.max_error**2) if share
    ]
    rank = max([int((lost > share).sum()) + 1 for share in shares] + [int(rule.sv_ratio or 1)])
    found = decompose(SPECTRA["harmonic"], rule)
    assert abs(len(found.S) - rank) <= (0 if decompose is truncate_exact else 1)
    assert rule.max_error is None or found.error <= rule.max_error * found.norm * (1 + 1e-6)


def test_distance_goes_in_blocks(monkeypatch):
    D, A, B = torch.randn(50, 40), torch.randn(3, 40), torch.randn(50, 3)
    whole = frobenius(D - B @ A)
    monkeypatch.setattr("litlora.adapters.lowrank.BLOCK_SIZE", 120)
    assert math.isclose(distance(D, A, B), whole, rel_tol=1e-6)
