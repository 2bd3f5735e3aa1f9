"""The GPT against `transformers`, its cache against itself, and loading without a copy."""

import subprocess
import sys

import pytest
import torch
from conftest import REPO, tiny_config

from litlora.errors import CheckpointError
from litlora.kernels.buckets import bucketed
from litlora.model import GPT, KVCache


def hugging_face_twin(config):
    """A random Llama of `transformers`, and ours with the same tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too: ones and zeros would hide a mistake
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return theirs, GPT.from_tensors(config, dict(theirs.named_parameters())).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 16, "rope_theta": 5e5},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)
def test_logits_equal_transformers(changes):
    theirs, ours = hugging_face_twin(tiny_config(**changes))
    ids = torch.randint(400, (3, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"norm": "layernorm"}, {"mlp": "plain", "hidden_act": "relu"}], ids=str)
def test_other_blocks_compute_what_they_say(changes):
    """Against the formulas, written out, in float64."""
    config = tiny_config(num_hidden_layers=1, **changes)
    model = GPT(config).double()
    block, x = model.model.layers[0], torch.randn(1, 5, config.hidden_size, dtype=torch.float64)
    if config.norm == "layernorm":
        norm = block.input_layernorm
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        centred = x - x.mean(-1, keepdim=True)
        expected = (
            centred / (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight
            + norm.bias
        )
        torch.testing.assert_close(norm(x), expected)
    else:
        mlp = block.mlp
        torch.testing.assert_close(mlp(x), (x @ mlp.up_proj.weight.T).clamp(min=0) @ mlp.down_proj.weight.T)


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 1, 11], [19, 1], [20]], ids=str)
def test_the_cache_changes_nothing(pieces):
    model = GPT(tiny_config()).eval()
    ids = torch.randint(400, (2, 20))
    with torch.no_grad():
        expected = model(ids)
        cache = KVCache(model.config, 2, 20, dtype=torch.float32, device=torch.device("cpu"))
        got = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_padding_on_the_right_changes_no_real_token():
    model = GPT(tiny_config()).eval()
    ids = torch.randint(400, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], 1))[:, :12], model(ids)
        )


def test_loading_neither_copies_nor_initialises():
    tensors = dict(GPT(tiny_config()).named_parameters())
    state = torch.get_rng_state()
    model = GPT.from_tensors(tiny_config(), tensors)
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn for weights that are given"
    assert all(p.data_ptr() == tensors[name].data_ptr() for name, p in model.named_parameters())


def test_a_tied_head_is_the_embedding():
    config = tiny_config(tie_word_embeddings=True)
    tensors = dict(GPT(config).named_parameters())
    assert "lm_head.weight" not in tensors
    model = GPT.from_tensors(config, tensors)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_do_not_fit_are_named():
    config = tiny_config()
    tensors = dict(GPT(config).named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        GPT.from_tensors(config, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(CheckpointError, match="does not have: model.extra"):
        GPT.from_tensors(config, {**tensors, "model.extra": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(3, 3\)"):
        GPT.from_tensors(config, {**tensors, name: torch.zeros(3, 3)})


@pytest.mark.parametrize("length", [4, 8])
def test_sequences_added_to_fill_a_bucket_stay_within_the_context(length):
    """A pack of many short examples in bf16 gets more empty tokens than there are positions to be
    learned."""
    model = GPT(tiny_config(positions="learned", max_position_embeddings=8)).bfloat16()
    lengths = [length] * (1100 // length) + [1]
    ids = torch.randint(400, (1, sum(lengths)))
    padded, packed, _ = bucketed(ids, lengths, torch.arange(1), model.lm_head.weight)
    assert padded.size(1) == sum(packed) > sum(lengths) and packed[: len(lengths)] == lengths
    got = model.model(padded, lengths=packed)
    assert got.shape == (1, sum(packed), 32)
    torch.testing.assert_close(got[:, :length], model.model(ids[:, :length]), atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_the_first_rotary_tables_of_two_threads_are_right():
    """In a process of its own: the first cosine that torch computes in a process is what matters."""
    program = """
import threading
import torch
from litlora.kernels.rotary import RotaryTable
together, found, like = threading.Barrier(2), [None, None], torch.zeros(1)
def compute(number):
    table = RotaryTable(48, 10000.0, None, 1024)
    together.wait()
    found[number] = table.rows(0, 96, like)
threads = [threading.Thread(target=compute, args=(number,)) for number in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
again = RotaryTable(48, 10000.0, None, 1024).rows(0, 96, like)
assert all(torch.equal(a, b) for rows in found for a, b in zip(rows, again))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPO)
