"""Starts of A and B: PEFT's values, PEFT's course of training, and a base that stays as it is."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICKSTART, tiny_config
from torch import nn

from litlora.adapters.quantised import block_linears
from litlora.errors import UserError
from litlora.frozen.low_rank import LowRank
from litlora.frozen.quantize import QUANTIZERS
from litlora.frozen.quantized import QuantizedWeight
from litlora.kernels.lora import Layer, plain_project, project
from litlora.load import load
from litlora.lora import LoRAConfig, adapter_of, add_lora, lora_updates, merge_lora
from litlora.lora.eva import Inputs, start_eva
from litlora.lora.layer import lora_layers
from litlora.lora.starts import (
    Unquantised,
    loftq,
    pissa,
    requantise,
    restart,
    start_lora,
    start_tensors,
)
from litlora.model import GPT

IDS = torch.arange(48).view(4, 12) * 7 % 300
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
SETTINGS = {"rank": 4, "alpha": 6.0, "targets": TARGETS}
VARIANTS = pytest.mark.parametrize("variant", ["lora", "dora"])
INITS = pytest.mark.parametrize("init", ["gaussian", "pissa", "pissa_niter_4", "olora"])


def gpt(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config()).to(dtype)


def both(init: str, variant: str = "lora", **changes) -> tuple[nn.Module, GPT]:
    """A model with PEFT's adapter and one with ours, of the same base and seed."""
    peft = pytest.importorskip("peft")
    names = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "use_rslora": "rslora"}
    settings = {**SETTINGS, **changes}
    config = peft.LoraConfig(
        init_lora_weights=init,
        use_dora=variant == "dora",
        **{theirs: settings[ours] for theirs, ours in names.items() if ours in settings},
    )
    torch.manual_seed(1)
    theirs = peft.inject_adapter_in_model(config, gpt())
    ours = gpt()
    add_lora(ours, LoRAConfig(init=init, variant=variant, **settings))
    return theirs, ours


def losses(model: nn.Module, steps: int) -> list[float]:
    """Of training to predict the next token."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("init", ["pissa", "olora"])
@VARIANTS
def test_the_values_are_those_of_peft(init, variant):
    theirs, ours = both(init, variant)
    for name, layer in lora_layers(ours).items():
        other = theirs.get_submodule(name)
        torch.testing.assert_close(layer.lora_A, other.lora_A["default"].weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(layer.lora_B, other.lora_B["default"].weight, atol=1e-6, rtol=1e-5)
        W = other.get_base_layer().weight
        torch.testing.assert_close(layer.frozen.rows(), W, atol=1e-6, rtol=1e-4)


def test_the_fast_values_are_those_of_peft_and_near_the_exact_ones():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(40, 24, bias=False)))[0]
    U, _, Vt = torch.linalg.svd(torch.randn(24, 40), full_matrices=False)
    W = U * torch.logspace(1, -2, 24) @ Vt
    theirs.get_base_layer().weight.data = W.clone()
    torch.manual_seed(3)
    with torch.no_grad():
        theirs.pissa_init("default", "pissa_niter_4")
    torch.manual_seed(3)
    A, B = pissa(W, 4, 1.5, niter=4)
    torch.testing.assert_close(A, theirs.lora_A["default"].weight.data)
    torch.testing.assert_close(B, theirs.lora_B["default"].weight.data)
    exact_A, exact_B = pissa(W, 4, 1.5)
    assert (B @ A - exact_B @ exact_A).norm() < 0.05 * (exact_B @ exact_A).norm()


def test_a_gaussian_start_has_the_deviation_of_peft():
    model = GPT(tiny_config(hidden_size=256, intermediate_size=512, head_dim=64))
    add_lora(model, LoRAConfig(rank=16, init="gaussian"))
    values = torch.cat([layer.lora_A.flatten() for layer in lora_layers(model).values()])
    assert values.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert all(not layer.lora_B.any() for layer in lora_layers(model).values())


@pytest.mark.slow
@INITS
@VARIANTS
@pytest.mark.parametrize("rslora", [False, True])
def test_the_loss_falls_as_with_peft(init, variant, rslora):
    theirs, ours = both(init, variant, rslora=rslora)
    for name, layer in lora_layers(ours).items():  # where both drew, the same values
        other = theirs.get_submodule(name)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        if init == "gaussian":
            layer.lora_A.data.copy_(A)
        else:
            layer.start_at(A, B, is_residual=True)
    wanted, found = losses(theirs, 50), losses(ours, 50)
    assert wanted[0] - wanted[-1] > 0.3
    assert max(abs(one - other) for one, other in zip(wanted, found, strict=True)) < 1e-4


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@VARIANTS
@torch.no_grad()
def test_nothing_changes_at_first_and_what_is_saved_fits_the_base(init, variant):
    model, base = gpt().eval(), gpt().eval()
    config = LoRAConfig(init=init, variant=variant, rslora=True, rank_pattern={"q_proj": 3}, **SETTINGS)
    add_lora(model, config)
    torch.testing.assert_close(model(IDS), base(IDS), atol=2e-6, rtol=1e-5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)
    adapter, live = adapter_of(model, config), model(IDS)
    assert (live - base(IDS)).abs().max() > 0.1
    assert adapter.config.init == "kaiming" and {u.rank for u in adapter.updates.values()} == {6, 8}
    for name, update in adapter.updates.items():
        W = base.get_submodule(name).weight
        W.copy_(update.added_to(W))
    torch.testing.assert_close(base(IDS), live, atol=1e-5, rtol=1e-4)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_in_bf16_less_is_lost_than_by_rounding_what_is_left_of_the_base():
    exact, ours, rounded = (load(QUICKSTART).model.to(torch.bfloat16) for _ in range(3))
    for model in (ours, rounded):
        add_lora(model, LoRAConfig(init="pissa"))
    for layer in lora_layers(rounded).values():
        layer.linear.weight.data = layer.frozen.rows().to(torch.bfloat16)
        layer.is_residual = False
    wanted = exact.float()(IDS)
    errors = [(model(IDS).float() - wanted).square().mean().sqrt() for model in (ours, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_the_gradients_through_what_is_left_of_a_weight_equal_autograds():
    model = gpt().double()
    add_lora(model, LoRAConfig(init="pissa", **SETTINGS), torch.float64)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.lora_B += torch.randn_like(layer.lora_B)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    W = layer.linear.weight - layer.scale * (layer.start_B @ layer.start_A - layer.lora_B @ layer.lora_A)
    inputs = (x, layer.lora_A, layer.lora_B)
    wanted = torch.autograd.grad((x @ W.T).sin().sum(), inputs)
    for compute in (project, plain_project):
        (y,) = compute(x, [Layer(layer.frozen, None, layer.update)], None)
        torch.testing.assert_close(y, x @ W.T)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), inputs), wanted)


# ---- LoftQ


def quantised(model: GPT, name: str = "nf4") -> GPT:
    """A copy whose layers that TARGETS names are quantised."""
    from litlora.frozen.linear import FrozenLinear

    model = copy.deepcopy(model)
    for layer, linear in list(model.named_modules()):
        if layer.rpartition(".")[2] in TARGETS:
            matrix = QUANTIZERS[name].quantised(linear.weight, layer, None)
            model.set_submodule(layer, FrozenLinear(QuantizedWeight(matrix), linear.bias))
    return model


def of(model: GPT, name: str = "nf4") -> Unquantised:
    return Unquantised(lambda layer: model.get_submodule(layer).weight.detach(), QUANTIZERS[name])


class Here(torch.Tensor):
    """PEFT moves the weight to a GPU."""

    def to(self, *args, device=None, **kwargs):
        return torch.Tensor(self).to(*args, **kwargs)


def peft_loftq(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B, and the values of W in bitsandbytes' nf4."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    utils = pytest.importorskip("peft.utils.loftq_utils")
    packed, state = bitsandbytes.functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    values = bitsandbytes.functional.dequantize_4bit(packed, state)
    packed = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state)
    A, B = utils._loftq_init_new(packed, W.as_subclass(Here), num_bits=4, reduced_rank=rank)
    return A, B, values


@pytest.mark.filterwarnings("ignore")
def test_loftq_finds_what_peft_finds():
    W = torch.randn(96, 64)
    R, L, _ = peft_loftq(W, 8)
    A, B = loftq(W, QUANTIZERS["nf4"].quantised(W, "W", None).rows(), 8, scale=1.0)
    torch.testing.assert_close(A, R, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(B, L, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_further_iterations_are_those_of_the_definition():
    """Each in plain numpy: what is taken out of W, bitsandbytes' nf4 of what is left, and its loss."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    base, scale = gpt(), 1.5
    model, config = quantised(base), LoRAConfig(init="loftq_iter_3", **SETTINGS)
    add_lora(model, config, start=False)
    torch.manual_seed(3)
    taken_out = start_lora(model, config, original=of(base))
    torch.manual_seed(3)
    assert taken_out.keys() == lora_layers(model).keys()
    for name, layer in lora_layers(model).items():
        W = base.get_submodule(name).weight.detach()
        left = W
        for _ in range(3):
            packed, state = bnb.quantize_4bit(left, quant_type="nf4", blocksize=64)
            lost = W - bnb.dequantize_4bit(packed, state)
            U, S, V = torch.svd_lowrank(lost, 8, niter=8)
            A, B = (S / scale).sqrt()[:4, None] * V.T[:4], U[:, :4] * (S / scale).sqrt()[:4]
            rounded = [(factor * scale**0.5).bfloat16() for factor in (A, B)]
            values = W.numpy().copy()
            for a, b in zip(rounded[0].float().numpy(), rounded[1].T.float().numpy(), strict=True):
                values -= b[:, None] * a
            used, left = left, torch.from_numpy(values)
        matrix, product = layer.frozen.matrix, taken_out[name]
        assert torch.equal(matrix.packed, packed.flatten()) and torch.equal(matrix.absmax, state.absmax)
        assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
        exact = W.double() - product.B.double() @ product.A.double()
        torch.testing.assert_close(used.double(), exact, atol=1e-7, rtol=0)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_iterations_lose_as_little_as_those_of_peft(monkeypatch):
    """From the second iteration on, a difference in the last bits becomes another Q that is as near."""
    bnb = pytest.importorskip("bitsandbytes")
    utils = pytest.importorskip("peft.utils.loftq_utils")

    class OnTheCPU:
        def __init__(self, W, **_):
            self.data, self.quant_state = bnb.functional.quantize_4bit(W, quant_type="nf4", blocksize=64)

        def to(self, device):
            return self

    monkeypatch.setattr(bnb.nn, "Params4bit", OnTheCPU)
    base, found = gpt(), []
    for init in ("loftq", "loftq_iter_2", "loftq_iter_5"):
        model, config = quantised(base), LoRAConfig(rank=8, alpha=8, init=init, targets=TARGETS)
        add_lora(model, config, start=False)
        start_lora(model, config, original=of(base))
        ours, theirs = [], []
        for name, layer in lora_layers(model).items():
            W = base.get_submodule(name).weight.detach()
            Q, R, L = utils.loftq_init(W.as_subclass(Here), 4, 8, max(1, config.loftq_iterations))
            ours.append((W - layer.weight).norm())
            theirs.append((W - Q - L @ R).norm())
        found.append(torch.stack(ours).norm().item())
        assert found[-1] == pytest.approx(torch.stack(theirs).norm().item(), rel=0.01)
    assert max(found[1:]) < 0.97 * found[0]


def test_what_was_taken_out_is_that_of_a_resumed_start():
    base = gpt()
    config = LoRAConfig(init="loftq_iter_2", targets=["q_proj", "o_proj"])
    models = [quantised(base, "int8"), quantised(base, "int8")]
    for model in models:
        add_lora(model, config, start=False)
    taken_out = start_lora(models[0], config, original=of(base, "int8"))
    requantise(models[1], taken_out, config, of(base, "int8"))
    restart(models[1], config, start_tensors(models[0]))
    assert {name.rpartition(".")[2] for name in taken_out} == {"q_proj"}, "o_proj is not quantised"
    for name, layer in lora_layers(models[0]).items():
        assert torch.equal(lora_layers(models[1])[name].weight, layer.weight)
    name = next(iter(taken_out))
    wide = LowRank(torch.zeros(1, 32).bfloat16(), torch.zeros(3, 1).bfloat16())
    for odd, error in (
        ({}, f"does not hold what was taken out of {name}"),
        (taken_out | {"lm_head": wide}, "holds what was taken out of lm_head"),
        (taken_out | {name: wide}, r"what was taken out of .* is \(3, 32\)"),
    ):
        with pytest.raises(ValueError, match=error):
            requantise(models[1], odd, config, of(base, "int8"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_falls_as_with_loftq_in_peft():
    """Both find their start by themselves; PEFT's is for alpha = rank."""
    peft = pytest.importorskip("peft")
    theirs, base = gpt(), gpt()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), theirs)
    for name, module in theirs.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            A, B, values = peft_loftq(base.get_submodule(name).weight.detach(), 4)
            module.lora_A["default"].weight.data = A
            module.lora_B["default"].weight.data = B
            module.get_base_layer().weight.data = values
    ours, config = quantised(base), LoRAConfig(rank=4, alpha=4, init="loftq", targets=TARGETS)
    add_lora(ours, config, start=False)
    start_lora(ours, config, original=of(base))
    wanted, found = losses(theirs, 50), losses(ours, 50)
    assert wanted[0] - wanted[-1] > 0.3
    assert max(abs(one - other) for one, other in zip(wanted, found, strict=True)) < 1e-4


@VARIANTS
@torch.no_grad()
def test_loftq_starts_nearer_to_the_base_whatever_the_scale(variant):
    base = gpt().eval()
    plain = quantised(base)
    for alpha in (1.0, 24.0):
        model = quantised(base)
        config = LoRAConfig(rank=8, alpha=alpha, init="loftq", targets=TARGETS, variant=variant)
        add_lora(model, config, start=False)
        start_lora(model, config, original=of(base))
        for name, layer in lora_layers(model).items():
            W = base.get_submodule(name).weight
            before = (W - plain.get_submodule(name).weight).norm()
            assert (W - layer.weight).norm() < 0.75 * before
        assert adapter_of(model, config).needs_quantised
        assert (model(IDS) - base(IDS)).norm() < 0.85 * (plain(IDS) - base(IDS)).norm()


def test_loftq_leaves_alone_what_is_not_quantised():
    base = gpt()
    model, config = quantised(base), LoRAConfig(init="loftq", targets=["q_proj", "o_proj"])
    add_lora(model, config, start=False)
    start_lora(model, config, original=of(base))
    layers = lora_layers(model)
    assert not layers["model.layers.0.self_attn.o_proj"].lora_B.any()
    assert layers["model.layers.0.self_attn.q_proj"].lora_B.any()
    with pytest.raises(UserError, match="init loftq makes up for what quantising loses, and none"):
        add_lora(gpt(), config)


@pytest.mark.slow
@torch.no_grad()
def test_the_figures_of_the_documentation():
    """How far the weights of the quickstart base are off in nf4, with rank 16."""
    model = load(QUICKSTART).model

    def in_nf4(W: torch.Tensor) -> torch.Tensor:
        return QUANTIZERS["nf4"].quantised(W.contiguous(), "W", None).rows()

    squares, total = torch.zeros(4), 0.0
    for name in block_linears(model.config):
        W = model.get_parameter(name).float()
        A, B = pissa(W, 16, 1.0)
        found = [in_nf4(W), B @ A + in_nf4(W - B @ A)]
        added = torch.zeros_like(W)
        for iteration in range(5):
            Q = in_nf4(W - added)
            A, B = loftq(W, Q, 16, 1.0)
            added = B @ A
            if iteration in (0, 4):
                found.append(Q + added)
        squares += torch.stack([(W - one).square().sum() for one in found])
        total += W.square().sum()
    percent = [round(100 * value.item(), 1) for value in (squares / total).sqrt()]
    assert percent == [9.2, 8.0, 8.1, 7.1]


# ---- EVA


def tokens(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, (4, 24), generator=generator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_finds_the_ranks_and_the_values_of_peft(rho):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    batches = []
    for seed in range(3):
        labels = tokens(seed).clone()
        labels[:, : 3 + seed] = -100
        batches.append({"input_ids": tokens(seed), "labels": labels})
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
    )
    wanted = peft.tuners.lora.eva.get_eva_state_dict(
        gpt(),
        batches,
        theirs,
        forward_fn=lambda model, inputs: model(inputs["input_ids"]),
        show_progress_bar=False,
    )
    model, config = gpt().train(), LoRAConfig(rank=4, alpha=6, targets=targets, init="eva", eva_rho=rho)
    add_lora(model, config, start=False)

    def batch(number):
        inputs = batches[number]
        learned = (inputs["labels"].flatten() != -100).nonzero().flatten()
        return lambda: model(inputs["input_ids"]), learned

    expected, state = gpt().eval()(IDS), torch.get_rng_state()
    start_eva(model, config, Inputs(len(batches), batch))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    layers = lora_layers(model)
    assert {name: len(A) for name, A in wanted.items() if len(A)} == {n: x.rank for n, x in layers.items()}
    if rho == 1:
        assert {layer.rank for layer in layers.values()} == {4}
    else:
        assert len({layer.rank for layer in layers.values()}) > 2
    for name, layer in layers.items():
        torch.testing.assert_close(layer.lora_A, wanted[name].float(), atol=1e-4, rtol=1e-3)
        assert layer.scale == 1.5 and layer.alpha == pytest.approx(1.5 * layer.rank)
    torch.testing.assert_close(model.eval()(IDS), expected)
    adapter = adapter_of(model, config)
    assert adapter.config.init == "kaiming" and adapter.config.eva_rho == 2
    assert {name: update.rank for name, update in adapter.updates.items()} == {
        name: layer.rank for name, layer in layers.items()
    }
    trained = peft.get_peft_model(gpt(), theirs)
    prefixed = {f"base_model.model.{name}": A for name, A in wanted.items()}
    peft.initialize_lora_eva_weights(trained, eva_state_dict=prefixed)
    wanted, found = losses(trained, 50), losses(model, 50)
    assert wanted[0] - wanted[-1] > 0.3
    assert max(abs(one - other) for one, other in zip(wanted, found, strict=True)) < 1e-4


def test_eva_says_when_the_batches_are_too_small():
    model, config = gpt(), LoRAConfig(rank=8, init="eva")
    add_lora(model, config, start=False)
    few = Inputs(2, lambda number: (lambda: model(IDS), torch.arange(5)))
    with pytest.raises(UserError, match="no batch has the 16 learned tokens that model.layers.0.self_attn.q"):
        start_eva(model, config, few)


# ---- settings, and what resuming needs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "pissa_niter_0"}, "init pissa_niter_0: choose from kaiming, gaussian, pissa"),
        ({"init": "lora_ga"}, "init lora_ga: choose from"),
        ({"eva_rho": 3.0}, "eva_rho 3 has no effect with init kaiming"),
        ({"init": "eva", "eva_rho": 0.5}, "eva_rho 0.5: must be at least 1"),
        ({"init": "eva", "eva_rho": math.nan}, "eva_rho nan: must be a finite number"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**settings)


def test_starts_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="init pissa: alpha -3 of .* is negative"):
        add_lora(gpt(), LoRAConfig(init="pissa", alpha=-3))
    with pytest.raises(UserError, match="init eva starts by data"):
        add_lora(gpt(), LoRAConfig(init="eva"))
    with pytest.raises(UserError, match="rank 33: .*; its rank can be at most"):
        add_lora(gpt(), LoRAConfig(init="olora", rank=33))


def test_a_start_is_put_back_to_the_bit_or_refused():
    config = LoRAConfig(init="pissa", **SETTINGS)
    first, second = gpt(), gpt()
    add_lora(first, config)
    add_lora(second, config, start=False)
    kept = start_tensors(first)
    restart(second, config, kept)
    for (name, one), other in zip(lora_updates(first).items(), lora_updates(second).values(), strict=True):
        assert torch.equal(one.A, other.A) and torch.equal(one.B, other.B), name
    name = "model.layers.0.self_attn.q_proj.start_A"
    broken = [
        {},
        {**kept, "model.layers.0.self_attn.k_proj.start_A": kept[name]},
        {**kept, name: kept[name][:2]},
        {**kept, name: kept[name].double()},
        {**kept, name: kept[name] * math.inf},
    ]
    for tensors in broken:
        with pytest.raises(ValueError, match="start"):
            restart(second, config, tensors)
