"""Llama 4: what its chunks, its router and its released settings ask for beside what every family does."""

import pytest
import torch
from conftest import tiny_config
from families import save_folder

from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError
from litlora.formats.families import read_config
from litlora.kernels.attention import Shared
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.model.router import ExpertRouter
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling

TEXT = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
SCOUT = {
    "attention_chunk_size": 8192,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "model_type": "llama4_text",
    "moe_layers": None,
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "attn_temperature_tuning": 4,
    "vocab_size": 202048,
}


@pytest.fixture
def both(tmp_path):
    """(our model, that of transformers)."""
    torch.manual_seed(0)
    theirs = save_folder("llama4", tmp_path)
    source = open_checkpoint(tmp_path)
    return GPT.from_tensors(source.config, source.tensors).eval(), theirs


def test_greedy_answers_are_those_of_transformers(both):
    """From a prompt within its first chunk, over the next ones; and from one of several chunks."""
    model, theirs = both
    for length in (3, 7, 17):
        prompt = (torch.arange(length) * 13 + 5).remainder(96)[None]
        with torch.no_grad():
            every = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None}
            expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False, **every)
        answer = Engine(model).generate(prompt[0].tolist(), Sampling(max_new_tokens=24, temperature=0))
        assert list(answer) == expected[0, length:].tolist()


def test_answers_that_share_their_prompt_are_what_they_are_alone(both):
    model, _ = both
    one, other = torch.randint(96, (1, 19)), torch.randint(96, (1, 12))
    other[:, :10] = one[:, :10]  # more than a chunk
    copies = torch.tensor([*range(19), *range(10), 19, 20])
    kept = torch.tensor([*range(19), 29, 30])
    with torch.no_grad():
        apart = torch.cat([model.hidden(one), model.hidden(other)], dim=1)
        ids = torch.cat([one, other], dim=1)[:, kept]
        together = model.hidden(ids, lengths=[19, 12], shared=Shared(copies, kept))
    assert (together[:, copies] - apart).abs().max() < 1e-5


def test_an_adapter_on_the_experts_alone_learns(both):
    model, _ = both
    add_lora(model, LoRAConfig(rank=4, alpha=8, targets="experts"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".mlp.experts." in name for name in trained)
    before = {name: p.detach().clone() for name, p in trained.items()}
    ids, optimizer = torch.randint(96, (2, 20)), torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())


def test_scores_too_large_for_a_sigmoid_still_tell_which_expert_is_best():
    config = tiny_config(
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        router_scoring="sigmoid",
        scale_expert_inputs=True,
    )
    router = ExpertRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([20.0, 40.0, 30.0, -5.0])[:, None] / config.hidden_size)
        shares, picked = router.pick(torch.ones(1, config.hidden_size))
    assert picked.tolist() == [[1]] and shares.tolist() == [[1.0]]


def test_settings_as_they_are_released_are_read():
    kind, config = read_config(
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": SCOUT}
    )
    assert kind == "llama4_text" and config.head_dim == 128 and not config.dense_layers
    assert config.layers_without_rope == config.full_attention_layers == tuple(range(3, 48, 4))
    assert config.floor_scale == 8192 and config.query_scale_beta == 0.1
    assert config.num_experts_per_tok == 1 and config.shared_experts_intermediate_size == 8192
    maverick = {**SCOUT, "interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False}
    _, config = read_config({**TEXT, **maverick, "rope_scaling": None, "max_position_embeddings": 2**20})
    assert config.dense_layers == tuple(range(0, 48, 2)) and config.qk_norm == "none"
    assert config.intermediate_size == 16384 and config.moe_intermediate_size == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries; there are 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types: sliding_attention is not implemented"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"attention_chunk_size": None}, "attention_chunk_size missing"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0"),
        ({"interleave_moe_layer_step": 0}, "not a usable configuration"),
        ({"moe_layers": 7}, "not a usable configuration"),
        ({"intermediate_size_mlp": None}, "intermediate_size_mlp missing"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_config({**TEXT, "max_position_embeddings": 1000, **SCOUT, **changes})
