"""Each kernel equals its plain twin: values, and gradients in float64."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from litlora.frozen.dense import Dense
from litlora.kernels import attention, cross_entropy, flex_attention, lora, norm
from litlora.kernels.attention import Pack
from litlora.kernels.lora import Layer
from litlora.lora import Update


def layer(out, inner, rank=None, *, bias=False, scale=1.0):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    update = None
    if rank:
        update = Update(random(rank, inner).requires_grad_(), random(out, rank).requires_grad_(), scale)
    return Layer(Dense(random(out, inner)), random(out) if bias else None, update)


def trained(x, *layers):
    updates = [one.update for one in layers if one.update is not None]
    return [x, *(factor for update in updates for factor in (update.A, update.B))]


def same_value_and_gradients(kernel, plain, inputs):
    got, wanted = kernel(), plain()
    got, wanted = (value if isinstance(value, list | tuple) else [value] for value in (got, wanted))
    torch.testing.assert_close(list(got), list(wanted), rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(value) for value in wanted]
    gradients = [
        torch.autograd.grad(
            sum((value * weight).sum() for value, weight in zip(values, weights, strict=True)), inputs
        )
        for values in (got, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ranks", [(2, None, 3), (None, None, None), (4,), (1, 2)])
@pytest.mark.parametrize("dropped", [False, True])
def test_layers_of_one_input(ranks, dropped):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    layers = [layer(3 + i, 6, rank, bias=i == 0, scale=0.5 + i) for i, rank in enumerate(ranks)]
    keep = (torch.rand(2, 5, 6) > 0.3).double() if dropped else None
    inputs = trained(x, *layers)
    same_value_and_gradients(
        lambda: lora.project(x, layers, keep), lambda: lora.plain_project(x, layers, keep), inputs
    )
    assert gradcheck(lambda *_: lora.project(x, layers, keep), inputs)


@pytest.mark.parametrize("activation", list(lora.ACTIVATIONS))
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (None, None, None), (None, 2, None)])
def test_gated_mlp(activation, ranks, dropped):
    torch.manual_seed(0)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    layers = [
        layer(9, 6, ranks[0], scale=2.0),
        layer(9, 6, ranks[1], bias=True),
        layer(6, 9, ranks[2], scale=0.1),
    ]
    masks = (
        ((torch.rand(7, 6) > 0.3).double(), (torch.rand(7, 9) > 0.3).double()) if dropped else (None, None)
    )
    inputs = trained(x, *layers)
    arguments = (x, *layers, activation, *masks)
    same_value_and_gradients(
        lambda: lora.gated_mlp(*arguments), lambda: lora.plain_gated_mlp(*arguments), inputs
    )
    assert gradcheck(lambda *_: lora.gated_mlp(*arguments), inputs)


def test_no_gradient_is_computed_below_the_first_adapted_layer():
    x = torch.randn(7, 6, dtype=torch.float64)  # as at the bottom of a model: nothing below it learns
    one = layer(4, 6, 2)
    (y,) = lora.project(x, [one])
    multiplied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            multiplied.extend(args if func is torch.ops.aten.mm.default else ())
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(y.sum(), [one.update.A, one.update.B])
    assert multiplied and not any(
        tensor.shape in (one.weight.shape, one.weight.shape[::-1]) for tensor in multiplied
    )
    (frozen,) = lora.project(x, [layer(4, 6)])
    assert not frozen.requires_grad


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 50), (37, 50), (100, 49), (0, 50), (5, 1)])
@pytest.mark.parametrize("tiles", [(512, 2**20), (32, 7 * 32), (64, 50 * 32), (32, 1)])
@pytest.mark.parametrize("tile", [None, cross_entropy.plain_tile], ids=["in place", "plain"])
def test_head_loss_in_tiles(cap, count, vocabulary, tiles, tile, monkeypatch):
    monkeypatch.setitem(cross_entropy.TILES, "cpu", cross_entropy.Tiles(*tiles))
    torch.manual_seed(0)
    hidden = torch.randn(count, 8, dtype=torch.float64, requires_grad=True)
    weight, targets = 3 * torch.randn(vocabulary, 8, dtype=torch.float64), torch.randint(vocabulary, (count,))
    kernel, plain = cross_entropy.head_loss, cross_entropy.plain_head_loss
    same_value_and_gradients(
        lambda: kernel(hidden, targets, weight, cap, tile),
        lambda: plain(hidden, targets, weight, cap),
        [hidden],
    )


@pytest.mark.parametrize("cap", [None, 2.0])
def test_head_losses_of_single_tokens(cap):
    """Each with a gradient of its own, over several blocks of tokens."""
    hidden, weight = torch.randn(700, 16, dtype=torch.float64), torch.randn(50, 16, dtype=torch.float64)
    targets, factors = torch.randint(50, (700,)), torch.randn(700, dtype=torch.float64)
    results = []
    for compute in (
        lambda x: cross_entropy.head_losses(x, targets, weight, cap),
        lambda x: cross_entropy.plain_head_loss(x, targets, weight, cap, reduction="none"),
    ):
        x = hidden.clone().requires_grad_()
        losses = compute(x)
        (losses * factors).sum().backward()
        results.append((losses.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])
    total = cross_entropy.head_loss(hidden, targets, weight, cap)
    torch.testing.assert_close(results[0][0].sum(), total)


def test_head_loss_of_unlikely_targets_stays_finite():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1, 0])
    loss = cross_entropy.head_loss(hidden, targets, weight)
    assert loss.item() == pytest.approx(1200)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.tensor([[2.0], [-2.0]]))


@pytest.mark.parametrize("tile", [None, cross_entropy.plain_tile], ids=["in place", "plain"])
def test_head_loss_of_a_target_that_is_all_but_certain_keeps_its_gradient(tile):
    """In bf16, probabilities next to 1 would round to 1: a gradient of nothing, or of twice as
    much."""
    hidden = torch.tensor([[8.0, 0.5], [10.0, -0.5]], dtype=torch.bfloat16, requires_grad=True)
    weight, targets = (
        torch.tensor([[1.0, 0.25], [0.0, 1.0], [0.25, -1.0]], dtype=torch.bfloat16),
        torch.tensor([0, 0]),
    )
    exact = hidden.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="sum")
    loss = cross_entropy.head_loss(hidden, targets, weight, None, tile)
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02) and 0 < loss.item() < 0.01
    gradient, (expected,) = torch.autograd.grad(loss, hidden)[0].double(), torch.autograd.grad(wanted, exact)
    assert ((gradient - expected).norm(dim=1) < 0.03 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("block", [10 * 300, 2**22])
def test_head_loss_in_bf16_rounds_the_gradient_once(block, monkeypatch):
    monkeypatch.setitem(cross_entropy.TILES, "cpu", cross_entropy.Tiles(512, block))
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(300, 32).bfloat16()
    targets = torch.randint(300, (64,))
    loss = cross_entropy.head_loss(hidden, targets, weight)
    exact = hidden.detach().double().requires_grad_()
    logits = (hidden.detach() @ weight.t()).double()
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradient = torch.autograd.grad(cross_entropy.plain_head_loss(exact, targets, weight.double()), exact)[0]
    (got,) = torch.autograd.grad(loss, hidden)
    assert (got.double() - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 5, 6)])
def test_one_layer_without_a_gradient(shape, rank):
    torch.manual_seed(0)
    x, one = torch.randn(shape, dtype=torch.float64), layer(4, 6, rank, bias=True, scale=-1.5)
    before = x.clone()
    with torch.inference_mode():
        torch.testing.assert_close(
            lora.project_one(x, one), lora.plain_project(x, [one])[0], rtol=0, atol=1e-12
        )
    assert torch.equal(x, before)


def test_rms_norm():
    torch.manual_seed(0)
    x, weight = (
        torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(6, dtype=torch.float64),
    )
    same_value_and_gradients(
        lambda: norm.rms_norm(x, weight, 1e-5), lambda: norm.plain_rms_norm(x, weight, 1e-5), [x]
    )
    assert gradcheck(lambda x: norm.rms_norm(x, weight, 1e-5), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_computes_in_fp32_and_rounds_once(dtype):
    torch.manual_seed(0)
    x, weight = (100 * torch.randn(9, 64)).to(dtype).requires_grad_(), torch.randn(64).to(dtype)
    wanted = norm.plain_rms_norm(x.double(), weight.double(), 1e-5)
    got = norm.rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    assert (got.double() - wanted).abs().max() <= torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(
    ("window", "softcap", "groups"), list(itertools.product([None, 3], [None, 2.0], [1, 4]))
)
@pytest.mark.parametrize("way", ["packed_attention", "flex_packed_attention"])
def test_packed_attention_equals_each_sequence_alone(way, window, softcap, groups):
    torch.manual_seed(0)
    lengths = [5, 1, 9, 4]
    q, k, v = (
        torch.randn(1, heads, 19, 8, dtype=torch.float64, requires_grad=True) for heads in (4, groups, groups)
    )
    settings = {"window": window, "softcap": softcap}

    def packed():
        if way == "packed_attention":
            return attention.packed_attention(q, k, v, Pack(lengths), scale=0.3, **settings)
        # Without a device for FlexAttention: the same mask and scores, computed plainly.
        options = flex_attention.flex_options(q.device, Pack(lengths), **settings)
        return plain_flex(q, k, v, **options, scale=0.3, enable_gqa=groups != 4)

    def alone():
        masks = [attention.causal_mask(length, 0, window, q.device) for length in lengths]
        parts = zip(*(part.split(lengths, dim=2) for part in (q, k, v)), masks, strict=True)
        return torch.cat([attention.attend(*part, scale=0.3, softcap=softcap) for part in parts], dim=2)

    same_value_and_gradients(packed, alone, [q, k, v])


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_takes_its_share_of_each_softmax(window):
    """Packed, in one piece, of one token behind others, and from what FlexAttention returns."""
    torch.manual_seed(0)
    lengths = [5, 1, 9, 4]
    q, k, v = (torch.randn(1, n, 19, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    sequence = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    sees = (sequence[:, None] == sequence).tril() & ~torch.ones(19, 19).tril(-(window or 19)).bool()

    def scores():
        return (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~sees, -torch.inf)

    def explicit():
        with_sink = torch.cat([scores(), sinks[None, :, None, None].expand(1, 4, 19, 1)], -1)
        return with_sink.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)

    def packed():
        return attention.packed_attention(q, k, v, Pack(lengths), scale=0.3, window=window, sinks=sinks)

    def from_sums():
        plain = attention.packed_attention(q, k, v, Pack(lengths), scale=0.3, window=window)
        return flex_attention.sunk(plain, scores().logsumexp(-1), sinks)

    same_value_and_gradients(packed, explicit, [q, k, v, sinks])
    same_value_and_gradients(from_sums, explicit, [q, k, v, sinks])
    last = (q[:, :, -1:], k[:, :, -(window or 4) :], v[:, :, -(window or 4) :])
    assert torch.allclose(attention.attend(*last, None, scale=0.3, sinks=sinks), explicit()[:, :, -1:])


@pytest.mark.parametrize(
    "groups", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_the_backward_by_matrix_multiplications(groups, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    torch.manual_seed(0)
    pack = Pack([5, 1, 9, 4])
    inputs = [
        torch.randn(1, heads, 19, 8, dtype=torch.float64, requires_grad=True) for heads in (4, groups, groups)
    ]
    kernel, plain = attention.matrix_packed_attention, attention.plain_packed_attention
    same_value_and_gradients(
        lambda: kernel(*inputs, pack, scale=0.3), lambda: plain(*inputs, pack, scale=0.3), inputs
    )
    assert gradcheck(lambda *parts: kernel(*parts, pack, scale=0.3), inputs)


@pytest.mark.parametrize("size", [1.0, 6.0])
def test_packed_attention_in_bf16_errs_little_more_than_torchs(size):
    """Of narrow scores and of wide ones, whose softmax all but picks one."""
    torch.manual_seed(0)
    pack, scale = Pack([40, 300, 7, 65]), 32**-0.5
    inputs = [
        (size * torch.randn(1, 412, heads, 32)).bfloat16().transpose(1, 2).requires_grad_()
        for heads in (8, 2, 2)
    ]
    upstream = torch.randn(1, 8, 412, 32).bfloat16()

    def run(way, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        output = way(*leaves, pack, scale=scale)
        return output, *torch.autograd.grad(output, leaves, upstream.to(dtype))

    exact = run(attention.plain_packed_attention, torch.float64)
    errors = [
        [
            (tensor - wanted).norm() / wanted.norm()
            for tensor, wanted in zip(run(way, torch.bfloat16), exact, strict=True)
        ]
        for way in (attention.packed_attention, attention.plain_packed_attention)
    ]
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 3 * theirs < 0.05


def plain_flex(q, k, v, *, score_mod, block_mask, scale, enable_gqa):
    """What FlexAttention computes: every score through score_mod, and -inf where mask_mod is false."""
    k, v = (part.repeat_interleave(q.size(1) // part.size(1), dim=1) for part in (k, v))
    N = q.size(2)
    query, key = torch.arange(N)[:, None], torch.arange(N)[None, :]
    scores = q @ k.transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, query, key)
    return scores.masked_fill(~block_mask.mask_mod(None, None, query, key), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize(
    "lengths", [[5], [128, 128], [127, 1, 130], [1000], [300, 7, 256, 128, 65, 64, 1, 1, 400], [1] * 300]
)
def test_the_blocks_that_flex_attention_takes_are_those_that_torch_finds(lengths, window):
    N = sum(lengths)
    ours = flex_attention.block_mask(Pack(lengths), window, torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, None, None, N, N, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "q_num_blocks",
        "q_indices",
        "full_q_indices",
    ):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_its_share(p):
    torch.manual_seed(0)
    mask = lora.dropout_mask(torch.empty(401, 333, dtype=torch.bfloat16), p)
    assert mask.shape == (401, 333) and mask.dtype == torch.bfloat16 and set(mask.unique().tolist()) == {0, 1}
    assert 1 - mask.float().mean().item() == pytest.approx(p, abs=0.005)
    assert lora.dropout_share(p) == pytest.approx(p, abs=2**-17)
