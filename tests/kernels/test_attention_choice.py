"""Which way of attention a pack takes, and the ways that only a GPU takes, as far as a CPU shows them."""

import pytest
import torch
from test_kernels import same_value_and_gradients

from litlora.kernels import attention
from litlora.kernels.attention import Case, Pack, choose

CASE = Case(
    device="cuda",
    dtype=torch.bfloat16,
    head_dim=128,
    is_one=False,
    within=True,
    plain_scores=True,
    has_varlen=True,
    needs_backward=True,
)


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        ("varlen", {}),
        ("varlen", {"within": False, "needs_backward": False, "dtype": torch.float16}),
        ("varlen", {"is_one": True, "within": False}),
        ("one", {"is_one": True}),
        ("one", {"is_one": True, "dtype": torch.float32, "has_varlen": False}),
        ("plain", {"has_varlen": False}),
        ("plain", {"dtype": torch.float32}),
        ("plain", {"head_dim": 512}),
        ("plain", {"head_dim": 100}),
        ("flex", {"plain_scores": False}),
        ("flex", {"plain_scores": False, "is_one": True, "dtype": torch.float32}),
        ("matrix", {"device": "cpu", "is_one": True}),
        ("plain", {"device": "cpu", "within": False}),
        ("plain", {"device": "cpu", "plain_scores": False}),
        ("plain", {"device": "cpu", "needs_backward": False}),
        ("plain", {"device": "cpu", "dtype": torch.float64}),
        ("plain", {"device": "mps", "has_varlen": False}),
    ],
)
def test_the_way_of_attention(way, changes):
    assert choose(CASE._replace(**changes)) == way


def documented_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn, by what its documentation says."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    bounds = cu_seq_q.tolist()
    assert max_q == max_k >= max(torch.tensor(bounds).diff()) and bounds[-1] == len(q)
    assert enable_gqa == (q.size(1) != k.size(1))
    k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
    outputs = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        here = torch.arange(end - start)
        behind = here[:, None] - here
        left, right = window_size
        sees = (behind >= -right) & ((behind <= left) | (left < 0))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        shares = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, v[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_flash_attention_of_a_pack_gets_what_it_asks_for(window, groups, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented_varlen)
    torch.manual_seed(0)
    pack = Pack([5, 1, 9, 4])
    inputs = [
        torch.randn(1, heads, 19, 8, dtype=torch.float64, requires_grad=True) for heads in (4, groups, groups)
    ]
    assert len(pack.bounds) == 17, "empty sequences make few sizes"
    same_value_and_gradients(
        lambda: attention.varlen_packed_attention(*inputs, pack, window=window, scale=0.3),
        lambda: attention.plain_packed_attention(*inputs, pack, window=window, scale=0.3),
        inputs,
    )


@pytest.mark.parametrize("sinks", [False, True])
def test_a_long_sequence_looks_through_its_window_in_blocks(sinks, monkeypatch):
    torch.manual_seed(0)
    sink = {"sinks": torch.randn(4, dtype=torch.float64, requires_grad=True)} if sinks else {}
    inputs = [torch.randn(1, heads, 70, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def way():
        return attention.plain_packed_attention(*inputs, Pack([7, 63]), window=5, scale=0.3, **sink)

    whole = way()
    monkeypatch.setattr(attention, "LARGEST_MASK", 7**2)
    monkeypatch.setattr(attention, "WINDOWED_QUERIES", 16)
    same_value_and_gradients(way, lambda: whole, [*inputs, *sink.values()])


def test_positions_of_a_pack_are_those_of_each_sequence():
    pack = Pack([5, 1, 9, 4])
    assert pack.places.tolist() == [place for length in pack.lengths for place in range(length)]
    assert pack.bounds.tolist() == [0, 5, 6, 15, *[19] * 13]
