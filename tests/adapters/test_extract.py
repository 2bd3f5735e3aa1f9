"""What is extracted stays what it was while the next tensor is looked at."""

import pytest
import torch

from litlora.adapters.extract import Plan, extract
from litlora.adapters.lowrank import RankRule


@pytest.mark.parametrize("diff_only", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_results_can_be_kept(kind, diff_only):
    """Of scalars, vectors, matrices and transposed views, of one model in another number format."""
    generator = torch.Generator().manual_seed(0)
    source = {
        str(n): torch.randn(shape, generator=generator).to(kind)
        for n, shape in enumerate([(), (30,), (20, 30), (20, 30), (30, 20)])
    }
    source["4"] = source["4"].T
    target = {
        name: tensor.float() + torch.randn(tensor.shape, generator=generator)
        for name, tensor in source.items()
    }
    target["same"] = source["same"] = torch.ones(3)
    found = list(extract(source, target, Plan(RankRule(20), diff_only=diff_only, dtype=torch.float32)))
    assert [one.name for one in found] == ["0", "1", "2", "3", "4"]
    for one in found:
        expected = target[one.name].double() - source[one.name].double()
        result = one.result if one.rank is None else one.result.B @ one.result.A
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
        assert one.norm == pytest.approx(expected.norm().item(), rel=1e-5)
        assert (one.rank is None) == (diff_only or expected.ndim < 2)
