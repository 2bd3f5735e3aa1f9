"""rsLoRA, ranks and alphas by pattern, and modules trained whole beside the adapter."""

import math

import pytest
import torch
from conftest import tiny_config

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import reference_to, resolve, write_adapter
from litlora.errors import CheckpointError, UserError
from litlora.load import attach_adapter, build, load
from litlora.lora import Adapter, LoRALinear, adapter_of, add_lora
from litlora.lora.select import layer_rank, layer_scale, select_layers
from litlora.model import GPT
from litlora.settings import LoRAConfig

PATTERNS = LoRAConfig(
    rank=8,
    alpha=16,
    rank_pattern={r".*layers\.0\.mlp\..*": 2, "q_proj": 4, "qv": 3},
    alpha_pattern={"v_proj": 5},
)


def test_the_first_pattern_that_matches_counts():
    def settings(name: str) -> tuple[int, float]:
        return layer_rank(PATTERNS, name), layer_scale(PATTERNS, name)

    assert settings("model.layers.0.mlp.up_proj") == (2, 16 / 2)
    assert settings("model.layers.1.mlp.up_proj") == (8, 16 / 8)
    assert settings("model.layers.1.self_attn.q_proj") == (4, 16 / 4)
    assert settings("model.layers.1.self_attn.v_proj") == (3, 5 / 3)


@pytest.mark.parametrize("pattern", ["(|)" * 40 + "X", ".?" * 60 + "X"])
def test_a_target_that_re_searches_for_ever_is_answered_at_once(pattern):
    with pytest.raises(UserError, match="no linear layer has that name"):
        select_layers(GPT(tiny_config()), [pattern])


@pytest.mark.parametrize(
    "pattern", [r"(?!.*(mlp|[kvo]_proj)).*layers.*", r".*(q)_proj(?<=q_proj)", r"(.*\.)*q_proj"]
)
def test_a_target_may_be_any_regular_expression_of_python(pattern):
    model = GPT(tiny_config())
    assert select_layers(model, [pattern]) == select_layers(model, ["q_proj"])


@pytest.mark.slow  # five seconds of computing
def test_a_target_that_only_re_can_match_ends_too():
    with pytest.raises(UserError, match="takes longer than 5 s to match"):
        select_layers(GPT(tiny_config()), [r"(?!lm_head)(([a-z_.0-9]+)+)+!"])


@pytest.mark.parametrize("pattern", ["(?=q){99999999999}", "a{99999999999}", "(" * 99 + "?"])
def test_a_target_that_is_no_regular_expression_is_one_line(pattern):
    with pytest.raises(UserError, match="neither a layer's name nor a regular expression"):
        select_layers(GPT(tiny_config()), [pattern])


def test_rslora_scales_by_the_root_of_the_rank():
    assert layer_scale(LoRAConfig(rank=16, alpha=8, rslora=True), "x") == 8 / math.sqrt(16)
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5, bias=False)
    layer = LoRALinear(linear, rank=4, alpha=3.0, rslora=True)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6)
    expected = linear(x) + 3 / 2 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.merge()(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"nowhere": 2}}, "rank_pattern nowhere: matches none of the layers"),
        ({"alpha_pattern": {"lm_head": 2.0}}, "alpha_pattern lm_head: matches none of the layers"),
        ({"rank_pattern": {"q_proj": 99}}, "^rank_pattern 99: .*q_proj is 32 x 32"),
        ({"modules_to_save": ["nowhere"]}, "modules_to_save nowhere: no module has that name"),
        ({"modules_to_save": ["self_attn"]}, "has an adapter; leave it out of one of the two"),
    ],
)
def test_a_pattern_or_module_that_means_nothing_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        add_lora(GPT(tiny_config()), LoRAConfig(**settings))


def test_a_tied_head_cannot_be_trained_by_itself():
    with pytest.raises(UserError, match="shares its weight with another module"):
        add_lora(GPT(tiny_config(tie_word_embeddings=True)), LoRAConfig(modules_to_save=["lm_head"]))


@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"x": 0}}, {"alpha_pattern": {"x": 0.0}}, {"alpha_pattern": {"x": math.nan}}],
)
def test_a_pattern_to_a_rank_or_alpha_that_makes_no_adapter_is_refused(settings):
    with pytest.raises(UserError, match="x: "):
        LoRAConfig(**settings)


def test_whole_modules_and_patterns_survive_the_file(base, tmp_path):
    loaded = load(base)
    model, chain = loaded.model, loaded.chain
    settings = LoRAConfig(
        rank=8, rank_pattern={"q_proj": 2}, rslora=True, modules_to_save=["lm_head", "model.norm"]
    )
    before = chain.base.tensors["lm_head.weight"].clone()
    add_lora(model, settings)
    trained = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name
    ]
    assert trained == ["model.norm.weight", "lm_head.weight"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    assert torch.equal(chain.base.tensors["lm_head.weight"], before), (
        "the base must stay as it is: its fingerprint is yet to be taken"
    )
    adapter = adapter_of(model, settings).trained_on(reference_to(chain.base, tmp_path / "adapter"))
    write_adapter(tmp_path / "adapter", adapter, chain.config, sidecars_from=[base])
    x = torch.arange(20).reshape(2, 10)
    found = resolve(tmp_path / "adapter")
    tensors, config = merge_chain(found)
    live = build(found.config, found.base.tensors, found.base)
    attach_adapter(live, found.top)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.allclose(build(config, tensors, found.base).eval()(x), expected, atol=1e-5)
        assert torch.equal(live.eval()(x), expected)


def test_a_tensor_that_the_settings_do_not_explain_is_refused(base, tmp_path):
    chain = resolve(base)
    model = build(chain.config, chain.base.tensors, chain.base)
    add_lora(model, LoRAConfig(rank=2))
    updates = adapter_of(model, LoRAConfig(rank=2)).updates
    whole = {"model.norm.weight": torch.ones(32)}
    adapter = Adapter(LoRAConfig(rank=2), updates, whole, reference_to(chain.base, tmp_path / "adapter"))
    write_adapter(tmp_path / "adapter", adapter, chain.config, sidecars_from=[base])
    with pytest.raises(CheckpointError, match="model.norm.weight is not part of an adapter"):
        resolve(tmp_path / "adapter")
