"""LoRA layers: exact against PEFT and autograd, reversible to the bit, on any module, never without
effect."""

import copy

import pytest
import torch
from conftest import tiny_config
from torch import nn

from litlora.errors import UserError
from litlora.lora import LoRALinear, adapter_of, add_lora, merge_lora, project, unmerge_lora, unwrap_lora
from litlora.lora.select import select_layers
from litlora.model import GPT
from litlora.settings import LoRAConfig

IDS = torch.arange(24).view(2, 12)


def randomise(model: nn.Module) -> None:
    """B away from zero, as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@torch.no_grad()
def test_fresh_adapter_changes_nothing():
    model = GPT(tiny_config()).eval()
    expected = model(IDS)
    add_lora(model, LoRAConfig())
    assert torch.equal(model(IDS), expected)


def test_only_the_adapter_trains_and_in_fp32():
    model = GPT(tiny_config()).bfloat16()
    names = add_lora(model, LoRAConfig(rank=4))
    assert len(names) == 2 * 7
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}
    assert all(t.dtype == torch.float32 for t in adapter_of(model, LoRAConfig()).tensors.values())
    assert model.model.layers[0].mlp.up_proj.linear.weight.dtype == torch.bfloat16
    assert model(IDS).dtype == torch.bfloat16


def test_merge_keeps_outputs_and_restores_names():
    model = GPT(tiny_config()).eval()
    names = [name for name, _ in model.named_parameters()]
    add_lora(model, LoRAConfig(rank=4))
    randomise(model)
    live = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-6, rtol=1e-5)
    unwrap_lora(model)
    torch.testing.assert_close(model(IDS), live, atol=1e-6, rtol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(type(m) is not LoRALinear for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_the_very_bits(dtype):
    model = GPT(tiny_config()).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, LoRAConfig(rank=4))
    randomise(model)
    for _ in range(3):
        merge_lora(model)
        merge_lora(model)  # merging twice adds the update once
        unmerge_lora(model)
    unwrap_lora(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_merge_rounds_once():
    linear = nn.Linear(64, 48).bfloat16()
    layer = LoRALinear(linear, rank=4, alpha=3.0)
    nn.init.normal_(layer.lora_B)
    exact = linear.weight.double() + 0.75 * layer.lora_B.double() @ layer.lora_A.double()
    merged = layer.merge().weight
    assert merged.dtype == torch.bfloat16
    # Rounding the fp32 sum and rounding the exact sum may differ in a tie only.
    assert (merged != exact.to(torch.bfloat16)).float().mean() < 1e-3


def test_gradients_equal_float64_autograd():
    """Against the formula h = W x + b + (alpha / r) B A x, differentiated by autograd."""
    layer = LoRALinear(nn.Linear(6, 5).double(), rank=2, alpha=7.0, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    y = torch.randn(3, 6, dtype=torch.float64).copy_(x).requires_grad_()
    expected = y @ layer.linear.weight.T + layer.linear.bias + 3.5 * (y @ A.T) @ B.T
    got = layer(x)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    wanted = torch.autograd.grad((expected * weights).sum(), (y, A, B))
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), (x, layer.lora_A, layer.lora_B)), wanted
    )


def test_outputs_and_gradients_equal_peft():
    from peft import LoraConfig, get_peft_model
    from test_model import hugging_face_twin

    theirs, ours = hugging_face_twin(tiny_config())
    ours = copy.deepcopy(ours)
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=12, target_modules=targets))
    add_lora(ours, LoRAConfig(rank=4, alpha=12, targets=targets))
    randomise(ours)
    trainable = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    pairs = [
        (name.removeprefix("base_model.model.").removesuffix(".default.weight"), p) for name, p in trainable
    ]
    parameters = dict(ours.named_parameters())
    assert {name for name, _ in pairs} == {name for name, p in parameters.items() if p.requires_grad}
    with torch.no_grad():
        for name, p in pairs:
            p.copy_(parameters[name])
    ids = torch.randint(400, (2, 30))
    got, wanted = ours(ids), theirs(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    got.square().mean().backward()
    wanted.square().mean().backward()
    for name, p in pairs:
        torch.testing.assert_close(parameters[name].grad, p.grad, atol=1e-6, rtol=1e-4)


def test_dropout_touches_the_adapter_only():
    model = TwoLayers()
    x = torch.randn(5, 8)
    expected = model(x)
    add_lora(model, LoRAConfig(rank=2, dropout=0.9))
    assert torch.equal(model.train()(x), expected), "with B at zero, dropout must not show"
    randomise(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# ---- any module


def test_a_hand_made_mlp_learns_through_its_adapter():
    model, x, y = TwoLayers(), torch.randn(64, 8), torch.randn(64, 4)
    assert add_lora(model, LoRAConfig(rank=2)) == ["first", "second"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    live = model(x)
    merge_lora(model)
    unwrap_lora(model)
    torch.testing.assert_close(model(x), live, atol=1e-6, rtol=1e-5)
    assert list(model.state_dict()) == ["first.weight", "first.bias", "second.weight"]


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
def test_transformer_encoder_layer_meets_its_adapter_in_every_mode(mode):
    """In eval mode without gradients this layer reads linear1.weight and never calls linear1."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    add_lora(layer, LoRAConfig(rank=2, targets=["linear1", "linear2"]))
    layer.train(mode == "train")
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(mode != "eval without gradients"):
        before = layer(x)
        randomise(layer)
        live = layer(x)
        assert not torch.allclose(before, live)
        merge_lora(layer)
        unwrap_lora(layer)
        torch.testing.assert_close(layer(x), live, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"], ["self_attn.out_proj", "linear1"]])
def test_a_layer_whose_forward_is_bypassed_is_refused_by_name(targets):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(UserError, match="self_attn.out_proj cannot be adapted"):
        add_lora(layer, LoRAConfig(rank=2, targets=targets))
    assert all(type(m) is not LoRALinear for m in layer.modules()), "a refusal must leave the model as it was"


def test_a_linear_that_computes_something_else_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(UserError, match="Doubled computes something else"):
        add_lora(nn.Sequential(Doubled(4, 4)), LoRAConfig(rank=2))


def test_one_layer_under_two_names_stays_one():
    model = nn.Sequential(shared := nn.Linear(4, 4), nn.ReLU(), shared)
    add_lora(model, LoRAConfig(rank=2))
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)
    unwrap_lora(model)
    assert model[0] is model[2] is shared


# ---- targets


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        ("qv", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["self_attn.q_proj", "lm_head"], {"q_proj", "lm_head"}),
        ([r".*layers\.1\.mlp\..*"], {"gate_proj", "up_proj", "down_proj"}),
        (r".*\.(q|k)_proj", {"q_proj", "k_proj"}),
    ],
)
def test_targets_select(targets, leaves):
    names = select_layers(GPT(tiny_config()), targets)
    assert {name.rpartition(".")[2] for name in names} == leaves


@pytest.mark.parametrize(
    "targets", [["query"], ["q_proj", "nope"], ["norm"], ["self_attn"], ["proj"], ["(", "q_proj"]]
)
def test_a_target_that_matches_no_linear_layer_is_an_error(targets):
    with pytest.raises(UserError, match=r"^targets "):
        select_layers(GPT(tiny_config()), targets)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": -3},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": 0.0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": 0.9999},
        {"targets": []},
        {"targets": ""},
    ],
    ids=str,
)
def test_settings_that_make_no_adapter_are_refused(settings):
    with pytest.raises(UserError, match=rf"^{next(iter(settings))} "):
        LoRAConfig(**settings)


def test_a_rank_above_the_layers_size_names_the_layer():
    with pytest.raises(UserError, match="^rank 17: .*k_proj is 16 x 32"):
        add_lora(GPT(tiny_config()), LoRAConfig(rank=17))


def test_a_second_adapter_on_top_is_refused():
    model = TwoLayers()
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(UserError, match="already has an adapter"):
        add_lora(model, LoRAConfig(rank=2))


def test_layers_of_one_input_with_dropouts_of_their_own():
    """The mask is shared by layers of one share only: each is scaled by its own."""
    torch.manual_seed(0)
    one, other = (LoRALinear(nn.Linear(64, 4), 2, 4.0, dropout) for dropout in (0.0, 0.5))
    nn.init.normal_(one.lora_B)
    x = torch.randn(3, 64)
    torch.testing.assert_close(project(x, one.train(), other.train())[0], one.eval()(x))
