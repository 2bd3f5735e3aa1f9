"""Every family compared with `transformers`: logits, cache, names and bytes, and config.json in
both directions."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SIZES, make_model, save_folder
from safetensors.torch import load_file

from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError, UserError
from litlora.formats.families import FAMILIES as COVERED
from litlora.formats.families import adapt_config, load_config, read_config, write_config
from litlora.formats.huggingface import write_weights
from litlora.lora import LoRAConfig, add_lora, select_layers
from litlora.model import GPT, KVCache
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling
from litlora.train.said import describe_choice

TOKENS = 30
"""Longer than every window and every original context of the models."""
LATE = list(FAMILIES)[list(FAMILIES).index("olmo3") :]
"""The families whose facts other families have too, one by one: of these most tests are slow."""
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in LATE else name for name in FAMILIES]
STEADY = [name for name in EVERY if name not in ("llama-dynamic", "phi4-mini")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name) -> (directory, transformers' model), made once for this module."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def get(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            made[name] = directory, save_folder(name, directory)
        return made[name]

    return get


def open_model(directory: Path) -> GPT:
    source = open_checkpoint(directory)
    return GPT.from_tensors(source.config, source.tensors).eval()


def limit(name: str) -> float:
    """What logits may differ by. Gemma 3n and 4 do not scale their scores down, so that their rounding counts
    more. Outputs of linear attention are normalised, which magnifies the
    rounding of small ones, and chunks of other tokens round differently: tests/test_delta_net.py
    compares them in float64."""
    return 1e-4 if name.startswith(("qwen3-next", "qwen3-5", "gemma3n", "gemma4")) else 1e-5


@torch.no_grad()
def in_pieces(model: GPT, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = KVCache(model.config, len(ids), ids.size(1), dtype=torch.float32, device=ids.device)
    return torch.cat([model(piece, cache) for piece in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, folder):
    directory, theirs = folder(name)
    ids = torch.randint(SIZES["vocab_size"], (2, TOKENS))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, open_model(directory)(ids)
    assert expected.abs().max() > 0.3  # there is something to compare
    assert (logits - expected).abs().max() <= limit(name)


@pytest.mark.parametrize("name", EVERY)
def test_token_by_token_equals_transformers(name, folder):
    directory, theirs = folder(name)
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))
    past, expected = None, []
    with torch.no_grad():
        for token in ids.unbind(1):
            step = theirs(token[:, None], past_key_values=past, use_cache=True)
            past = step.past_key_values
            expected.append(step.logits)
    assert (
        in_pieces(open_model(directory), ids, [1] * TOKENS) - torch.cat(expected, 1)
    ).abs().max() <= limit(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gemma4-26b"])
def test_greedy_answers_are_those_of_transformers(name, folder):
    directory, theirs = folder(name)
    ids = torch.randint(SIZES["vocab_size"], (1, 9))
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)  # or it would take token 0 for padding
    expected = theirs.generate(ids, **settings)[0, 9:].tolist()
    engine = Engine(open_model(directory))
    assert list(engine.generate(ids[0].tolist(), Sampling(max_new_tokens=TOKENS))) == expected


@pytest.mark.parametrize("name", STEADY)
def test_several_tokens_behind_a_past_see_what_they_should(name, folder):
    """Two scalings are left out: their frequencies depend on the length, and those in the cache do
    not change with it (as in transformers)."""
    model = open_model(folder(name)[0])
    ids = torch.randint(SIZES["vocab_size"], (2, TOKENS))
    with torch.no_grad():
        difference = (in_pieces(model, ids, [4, 7, 1, 1, 12, 5]) - model(ids)).abs().max()
    assert difference <= limit(name)


@pytest.mark.parametrize("name", [*STEADY[:1], *(pytest.param(n, marks=pytest.mark.slow) for n in LATE)])
def test_packed_sequences_equal_separate_ones(name, folder):
    """Each of them longer than the windows; positions start again at 0."""
    model = open_model(folder(name)[0])
    lengths = [9, 1, 12, 8]
    sequences = [torch.randint(SIZES["vocab_size"], (1, length)) for length in lengths]
    with torch.no_grad():
        packed = model.logits(model.model(torch.cat(sequences, dim=1), lengths=lengths))
        separate = torch.cat([model(sequence) for sequence in sequences], dim=1)
    assert (packed - separate).abs().max() <= limit(name)


@pytest.mark.parametrize(
    "name",
    # a router's scores are fp32, too coarse for such small steps
    [
        pytest.param(name, marks=() if name == "granite" else pytest.mark.slow)
        for name in LATE
        if name not in ("olmoe", "flex-olmo", "qwen3-next", "qwen3-5-moe", "gpt-oss")
    ],
)
def test_gradients_are_the_slope_of_the_loss(name, folder):
    """Of adapters on all linear layers, packed, in float64, along a random direction."""
    source = open_checkpoint(folder(name)[0])
    # Gemma 3n's cut has no slope at its edge, which steps may cross.
    smooth = dataclasses.replace(source.config, activation_sparsity=None, sparse_mlp_layers=None)
    model = GPT.from_tensors(smooth, source.tensors).eval().double()
    add_lora(model, LoRAConfig(rank=4, targets="all-linear"), torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids, lengths = torch.randint(SIZES["vocab_size"], (1, TOKENS)), [13, 17]

    def loss() -> torch.Tensor:
        return model.logits(model.model(ids, lengths=lengths)).logsumexp(-1).sum()

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, part in zip(trained, direction, strict=True):
                parameter += step * part
            return loss().item()

    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.1 * torch.randn_like(parameter))
    direction = [torch.randn_like(parameter) for parameter in trained]
    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(trained, direction, strict=True)).item()

    def difference(step: float) -> float:
        above, below = moved(step), moved(-2 * step)
        moved(step)
        return (above - below) / (2 * step)

    # The error of a difference grows with the square of its step: two of them tell how much.
    measured = (4 * difference(5e-7) - difference(1e-6)) / 3
    assert abs(slope) > 0.01 and abs(measured - slope) <= 1e-6 * abs(slope) + 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_there_and_back_gives_the_same_bytes(name, folder, tmp_path):
    directory, _ = folder(name)
    kind, source = load_config(directory)[0], open_checkpoint(directory)
    write_weights(tmp_path, source.tensors, source.config, kind, 10**9, apart=source.apart)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert (
            tensor.shape == after[tensor_name].shape
            and tensor.numpy().tobytes() == after[tensor_name].numpy().tobytes()
        )


@pytest.mark.parametrize("name", EVERY)
def test_a_config_made_here_is_the_same_model(name, folder, tmp_path):
    """Without the original config.json, as for a model that never was a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    directory, theirs = folder(name)
    kind, config = load_config(directory)
    values = write_config(config, kind)
    assert read_config(json.loads(json.dumps(values))) == (kind, config)
    (tmp_path / "config.json").write_text(json.dumps(values))
    write_weights(tmp_path, open_checkpoint(directory).tensors, config, kind, 10**9)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("name", EVERY)
def test_some_family_can_express_every_model(name, folder):
    config = load_config(folder(name)[0])[1]
    values = write_config(config)
    assert read_config(values)[1] == config


def test_presets_mean_the_same_in_every_family():
    """Together they choose every linear layer but the head, and a run says so by kind."""
    import transformers

    for name, (kind, settings) in FAMILIES.items():
        config = getattr(transformers, kind)(**settings)
        model = GPT.without_weights(read_config(config.to_dict())[1])
        linears = [part for part, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        chosen = {preset: select_layers(model, preset) for preset in ("attention", "mlp", "all-linear", "qv")}
        assert sorted(chosen["attention"] + chosen["mlp"] + ["lm_head"]) == sorted(linears), name
        assert all(re.search(r"\.(self|linear)_attn\.", layer) for layer in chosen["attention"]), name
        assert chosen["all-linear"] == [layer for layer in linears if layer != "lm_head"], name
        assert set(chosen["qv"]) < set(chosen["attention"]), name
        if model.config.num_experts is None:
            with pytest.raises(UserError, match="targets experts: no linear layer"):
                select_layers(model, "experts")
        else:
            experts = select_layers(model, "experts")
            assert experts == [layer for layer in chosen["mlp"] if ".experts." in layer], name


def test_what_a_preset_chose_is_said_by_kind():
    model = GPT(read_config({**LLAMA, "num_hidden_layers": 3})[1])
    assert describe_choice(model) is None
    add_lora(model, LoRAConfig(targets="mlp"))
    attention = "3 q_proj, 3 k_proj, 3 v_proj, 3 o_proj"
    chosen = "3 gate_proj, 3 up_proj, 3 down_proj"
    assert describe_choice(model) == f"{chosen}; none on {attention}, 1 lm_head"


def test_every_covered_family_is_tested(folder):
    # transformers has Kimi K2's class by its other name alone
    assert {load_config(folder(name)[0])[0] for name in FAMILIES} | {"kimi_k2"} == set(COVERED)


def test_kimi_k2_is_read_by_its_own_name(folder, tmp_path):
    directory, _ = folder("deepseek-v3")
    values = json.loads((directory / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoConfig": "x.Y"}}))
    shutil.copy(directory / "model.safetensors", tmp_path)
    assert load_config(tmp_path) == ("kimi_k2", load_config(directory)[1])
    assert open_checkpoint(tmp_path).fingerprint == open_checkpoint(directory).fingerprint


def test_a_model_that_has_generated_can_be_trained():
    ours = GPT(read_config(LLAMA)[1])
    with torch.inference_mode():
        ours(torch.tensor([[1, 2, 3]]))
    ours(torch.tensor([[1, 2]])).sum().backward()


def test_gradients_reach_every_expert():
    """Even one that no token picked: its adapter must have a gradient."""
    model = make_model("mixtral")
    kind, config = read_config({**model.config.to_dict(), "architectures": ["MixtralForCausalLM"]})
    ours = GPT(config)
    ours(torch.tensor([[1]])).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**changes):
    return {name: value for name, value in {**LLAMA, **changes}.items() if value is not ...}


GEMMA3N = {"model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"], "num_kv_shared_layers": 0}
GEMMA4 = {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "enable_moe_block": True}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
NEW = {"model_type": "brandnew", "architectures": ["BrandnewForCausalLM"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            llama(architectures=["MambaForCausalLM"], model_type="mamba"),
            "MambaForCausalLM.* needs state-space layers",
        ),
        (llama(**NEW, kv_lora_rank=512), "it needs multi-head latent attention"),
        (llama(**NEW, is_encoder_decoder=True), "it needs an encoder"),
        (llama(**NEW, layer_types=["mamba", "conv"]), "it needs state-space layers, short convolutions"),
        (llama(**NEW, layer_types=[["mamba"], None]), "it needs layers of type"),
        (llama(**NEW, n_routed_experts=64), r"mixture of experts \(64 experts\)"),
        (llama(**NEW, residual_multiplier=0.22), r"it needs residual_multiplier \(0.22\)"),
        (llama(**NEW, residual_multiplier=1.0, alibi=True), "it needs ALiBi positions;"),
        (llama(**NEW, hidden_act="laplace"), "it needs the activation 'laplace'"),
        (llama(**NEW, add_attention_sink=True), "it needs attention sinks"),
        (llama(**NEW, quantization_config={"quant_method": "hqq"}), "it needs weights quantized by 'hqq'"),
        (llama(**NEW, auto_map={"AutoConfig": "x.Y"}), "it needs its own remote code"),
        (llama(**NEW), "it needs a reader of its settings"),
        (
            llama(**NEW, vision_config={"depth": 2}, text_config={"model_type": "qwen3"}),
            "an image encoder; a folder of its language model alone is covered .Qwen3ForCausalLM",
        ),
        (llama(**NEW, audio_config={"depth": 2}, text_config={"model_type": ["a"]}), "an audio encoder, and"),
        (llama(**NEW, vision_config=7, text_config=[]), "it needs an image encoder;"),
        (llama(architectures=["Brandnew"], model_type="brandnew"), "'Brandnew'.* is not covered"),
        (
            llama(architectures=["LlamaForSequenceClassification"]),
            "LlamaForSequenceClassification.* of the family llama only LlamaForCausalLM is covered",
        ),
        (llama(architectures=["PaliGemmaForX"], model_type="paligemma", vision_config={"a": 1}), "an image"),
        (llama(architectures=None, model_type=None), "is not covered: config.json names no model_type"),
        (llama(rope_scaling={"rope_type": "magic", "factor": 2.0}), "'magic' is not implemented"),
        (
            llama(rope_scaling={"type": "default", "mrope_section": [16, 24, 24]}),
            "mrope_section is not implemented",
        ),
        (llama(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor missing"),
        (
            llama(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
            "not implemented for this architecture",
        ),
        (llama(hidden_act="relu6"), "'relu6' is not implemented"),
        (
            llama(num_attention_heads=5, num_key_value_heads=5),
            r"hidden_size \(32\) is not a multiple of num_attention_heads \(5\)",
        ),
        (
            llama(num_key_value_heads=3),
            r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)",
        ),
        (llama(num_attention_heads=0), "not a usable configuration|must be positive|missing"),
        (llama(hidden_size="32"), "not a usable configuration|hidden_size"),
        (llama(hidden_size=...), "hidden_size missing"),
        (llama(num_hidden_layers=2.5), "num_hidden_layers is 2.5"),
        (llama(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (llama(**GEMMA3N, altup_active_idx=1), "altup_active_idx is 1; only 0 is implemented"),
        (llama(**GEMMA3N, altup_num_inputs=1), "altup_num_inputs must be at least 2"),
        (llama(**{**GEMMA3N, "intermediate_size": [48, 64]}), "intermediate_size: only one size for all"),
        (llama(**GEMMA3N, activation_sparsity_pattern=[0.9, 0.5]), "only one sparsity beside 0"),
        (llama(**GEMMA3N, activation_sparsity_pattern=[0.9]), "has 1 entries; there are 2 layers"),
        (llama(**GEMMA3N, activation_sparsity_pattern=[1, 1]), "activation_sparsity must be below 1"),
        (llama(**{**GEMMA3N, "num_kv_shared_layers": 2}), "no layer before layer 0 has the keys"),
        (llama(**GEMMA4, num_experts=4), "top_k_experts missing"),
        (llama(hidden_size=10**30), "no model is that large"),
        (llama(architectures={"a": 1}, model_type=[]), "is not covered"),
        (llama(partial_rotary_factor=1e308), "partial_rotary_factor"),
        (llama(quantization_config={"quant_method": "hqq"}), "quantized by 'hqq'"),
        (llama(model_type="falcon", architectures=["FalconForCausalLM"], alibi=True), "alibi is True"),
        (llama(**QWEN2, layer_types=["linear_attention", "full_attention"]), "linear_attention"),
        (llama(**QWEN2, layer_types=["full_attention"]), "1 entries; there are 2 layers"),
        (llama(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)


WHAT_IS_MISSING = {
    "granite_swa": "attention sinks",
    "granitemoe": "a reader of its fused experts",
    "lfm2": "short convolutions",
}
NEEDED = {
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {"head_dim": 128},
}
"""Settings without whose defaults in transformers there is no model."""


def test_every_architecture_of_transformers_is_read_or_refused_with_what_is_missing():
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    named = [
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items(),
    ]
    reasons = {}
    for kind, architecture in named:
        try:
            values = CONFIG_MAPPING[kind]().to_dict()
        except Exception:  # transformers gives this class no defaults that it accepts
            values = {"model_type": kind}
        values |= NEEDED.get(kind, {})
        try:
            read = read_config({**values, "architectures": [architecture]})[0]
        except CheckpointError as error:
            reasons[kind] = str(error)
            refused = rf"architecture '{architecture}' \(model_type '.+'\) is not covered: "
            # transformers reads the text of a multimodal folder under this name as well
            twice = kind in ("llama4", "qwen3_5", "qwen3_5_moe")
            refused += (
                f"of the family {kind} only \\w*ForConditionalGeneration is" if twice else "it needs \\w.*; "
            )
            assert re.match(refused, reasons[kind]) and "\n" not in reasons[kind], kind
            assert kind not in COVERED, reasons[kind]
        else:
            assert read in COVERED
    for kind, what in WHAT_IS_MISSING.items():
        assert re.search(f"it needs {what}", reasons[kind]), reasons[kind]
    unknown = [kind for kind, reason in reasons.items() if "do not tell" in reason]
    assert len(unknown) < 0.15 * len(reasons), unknown


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        load_config(tmp_path)


def test_names_of_before_2025_mean_the_same():
    """`rope_theta` and `rope_scaling`, GPT-NeoX's `rotary_pct`, Phi-3's `su`."""
    new = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert read_config(new) == read_config(
        llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    )
    neox = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    new = llama(
        **neox, rope_parameters={"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    )
    assert read_config(new) == read_config(llama(**neox, rotary_pct=0.5, rotary_emb_base=2e4))
    phi3 = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
    }
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert read_config(llama(**phi3, rope_scaling={"type": "su", **factors})) == read_config(
        llama(**phi3, rope_scaling={"type": "longrope", **factors})
    )


def test_released_files_say_less_than_others():
    """Falcon's give no context, Gemma's say gelu and mean its tanh form, GPT-2's do not say that
    the head is tied."""
    falcon = {
        "alibi": False,
        "architectures": ["FalconForCausalLM"],
        "bias": False,
        "hidden_size": 4544,
        "model_type": "falcon",
    }
    falcon |= {
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
    }
    config = read_config({**falcon, "parallel_attn": True, "vocab_size": 65024})[1]
    assert (config.max_position_embeddings, config.num_key_value_heads, config.head_dim) == (2048, 1, 64)
    assert config.tie_word_embeddings and config.shared_norm and config.intermediate_size == 4 * 4544
    gemma = llama(
        model_type="gemma",
        architectures=["GemmaForCausalLM"],
        hidden_act="gelu",
        hidden_activation=None,
        head_dim=8,
    )
    assert read_config(gemma)[1].hidden_act == "gelu_tanh" and read_config(gemma)[1].tie_word_embeddings
    gpt2 = {
        **GPT2,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
    config = read_config({**gpt2, "activation_function": "gelu_new"})[1]
    assert (
        config.tie_word_embeddings
        and config.intermediate_size == 3072
        and config.max_position_embeddings == 1024
    )


def test_a_stale_config_is_not_used():
    """The base's config.json is used for a model made from it, except for what belongs to the
    vocabulary."""
    config = read_config(LLAMA)[1]
    assert adapt_config(LLAMA, config) == {**LLAMA, "tie_word_embeddings": False}
    assert "auto_map" not in adapt_config(
        {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, config
    )
    grown = read_config(llama(vocab_size=100, tie_word_embeddings=True))[1]
    assert adapt_config(LLAMA, grown) == {**LLAMA, "vocab_size": 100, "tie_word_embeddings": True}
    assert adapt_config(LLAMA, read_config(llama(intermediate_size=64))[1]) is None
    assert adapt_config({"model_type": "mamba"}, config) is None
