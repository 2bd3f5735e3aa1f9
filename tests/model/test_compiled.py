"""Blocks by compiled code, for one token: the values of torch's operations, to the bit."""

import pytest
import torch
from conftest import tiny_config

from litlora.config import RopeScaling
from litlora.frozen.packed import pack_linears
from litlora.kernels import cpu, cpu_build
from litlora.lora import LoRAConfig, adapter_of, add_lora
from litlora.lora.live import BASE, Switchboard, Way, live_updates, switch_on
from litlora.model import GPT
from litlora.model.cache import CacheBatch

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=str(cpu_build.why_none()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GEMMA = {
    "norm": "rmsnorm_plus_one",
    "hidden_act": "gelu_tanh",
    "norm_position": "both",
    "scale_embeddings": True,
}
CONFIGS = {
    "llama": {},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"norm": "rmsnorm", "qk_norm": "head", "head_dim": 16},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 24.0},
    "gemma3": {
        **GEMMA, "qk_norm": "head", "sliding_window": 4, "full_attention_layers": (1,),
        "rope_local_base_freq": 100.0,
    },
    "granite": {"residual_multiplier": 0.22},
    "olmo2": {"norm_position": "after", "qk_norm": "all_heads"},
    "interleaved": {"rope_interleaved": True, "partial_rotary_factor": 0.5, "mlp_bias": True},
    "chunks": {"attention_chunk_size": 3, "layers_without_rope": (1,)},
    "dynamic": {"rope_scaling": RopeScaling(rope_type="dynamic", factor=2.0), "max_position_embeddings": 8},
}  # fmt: skip
UNKNOWN = {
    "layernorm": {"norm": "layernorm"},
    "relu": {"hidden_act": "relu"},
    "plain": {"mlp": "plain"},
    "clipped": {"clip_qkv": 1.0},
    "odd": {"hidden_size": 40},
    "parallel": {"parallel_residual": True},
    "rotated": {"qk_norm": "head_rotated"},
}


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """No weight in the layout of matrix units, whatever the processor."""
    monkeypatch.setattr("litlora.frozen.packed.packs", lambda _: False)


def model_of(changes, dtype):
    torch.manual_seed(0)
    model = GPT(tiny_config(**changes)).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape))
    return model


STEPS = 6


def logits_of(model, prompts, ways=None, board=None):
    """Of a batch of sequences that go these ways, (STEPS, B, V): a token of each at a time."""
    caches, found, board = [], [], board or Switchboard()
    ways, device = ways or [BASE] * len(prompts), torch.device("cpu")
    for prompt, way in zip(prompts, ways, strict=True):
        cache = model.new_cache(64)
        with board.set_to([way], device):
            model(torch.tensor([prompt]), cache)
        caches.append(cache)
    cache = caches[0] if len(caches) == 1 else CacheBatch(caches)
    for step in range(STEPS):
        ids = torch.tensor([[7 + step]] * len(prompts))
        with board.set_to(ways, device):
            found.append(model.logits(model.hidden(ids, cache))[:, 0])
    return torch.stack(found)


def both_ways(model, prompts, *ways):
    """(by compiled blocks, by their operations one by one, whether compiled code took each token)."""
    calls, decoder = [], model.model
    own = decoder._compiled

    def counted(*given):
        y = own(*given)
        calls.append(y is not None)
        return y

    decoder._compiled = counted
    whole = logits_of(model, prompts, *ways)
    decoder._compiled = lambda *_: None
    pieces = logits_of(model, prompts, *ways)
    decoder._compiled = own
    return whole, pieces, calls


PROMPTS = [[1, 2, 3], [5, 6], [6, 7, 8, 9, 10]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_it_computes_what_the_operations_compute(name, dtype, monkeypatch):
    monkeypatch.setattr("litlora.model.cache.LEAST_ROOM", 4)  # caches grow
    model = model_of(CONFIGS[name], dtype)
    pack_linears(model, leave="none")
    alone = []
    for prompts in ([PROMPTS[0]], [PROMPTS[1]], [PROMPTS[2]], PROMPTS):
        whole, pieces, calls = both_ways(model, prompts)
        assert calls == [True] * STEPS
        assert torch.equal(whole, pieces)
        assert whole.isfinite().all() and whole.std() > 0
        alone.append(whole)
    assert torch.equal(torch.cat(alone[:3], dim=1), alone[3])


@pytest.mark.parametrize("name", UNKNOWN)
@torch.inference_mode()
def test_other_blocks_stay_with_torch(name):
    model = model_of(UNKNOWN[name], torch.float32)
    pack_linears(model, leave="none")
    whole, pieces, calls = both_ways(model, PROMPTS[:1])
    assert calls == [False] * STEPS and torch.equal(whole, pieces)


@torch.inference_mode()
def test_what_lies_in_a_block_may_change():
    model = model_of(CONFIGS["qwen3"], torch.float32)
    pack_linears(model, leave="none")
    before, _, calls = both_ways(model, PROMPTS[:1])
    assert all(calls)
    block, other = model.model.layers[1], model_of({**CONFIGS["qwen3"], "norm_eps": 0.5}, torch.float32)

    def changes(is_known=True):
        whole, pieces, calls = both_ways(model, PROMPTS[:1])
        assert calls == [is_known] * STEPS and torch.equal(whole, pieces)
        return not torch.equal(whole, before)

    assert not changes()
    block.input_layernorm.weight.mul_(2)
    assert changes()
    block.input_layernorm.weight.div_(2)
    assert not changes()
    block.input_layernorm.weight.data = block.input_layernorm.weight.data * 3
    assert changes()
    block.input_layernorm.weight.data = block.input_layernorm.weight.data / 3
    block.post_attention_layernorm = other.model.layers[1].post_attention_layernorm
    assert changes()
    hook = block.register_forward_hook(lambda *_: None)
    assert changes(is_known=False)
    hook.remove()
    model.model.layers[1] = other.model.layers[1]
    assert changes(is_known=False)  # its layers are torch's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_adapters_are_switched_between_tokens(dtype):
    model, board = model_of({}, dtype), Switchboard()
    pack_linears(model, leave="none")
    for seed, name in enumerate(("one", "two")):
        given = model_of({}, dtype)
        torch.manual_seed(seed)
        add_lora(given, LoRAConfig(rank=4, targets="all-linear"))
        for parameter_name, parameter in given.named_parameters():
            if parameter_name.endswith("lora_B"):
                parameter.normal_()
        adapter = adapter_of(given, LoRAConfig(rank=4, targets="all-linear"))
        switch_on(model, board, name, live_updates(model, adapter, dtype))
    found = []
    for way in (Way("one"), Way("two"), Way("one", 0.5), BASE, Way("one")):
        whole, pieces, calls = both_ways(model, PROMPTS[:1], [way], board)
        assert all(calls) and torch.equal(whole, pieces)
        found.append(whole)
    assert torch.equal(found[0], found[4])
    assert all(not torch.equal(a, b) for k, a in enumerate(found[:4]) for b in found[:k])
    for ways in ([Way("one"), Way("two"), BASE], [Way("two"), Way("one", 0.5), Way("one")], [Way("one")] * 3):
        whole, pieces, calls = both_ways(model, PROMPTS, ways, board)
        assert all(calls) and torch.equal(whole, pieces)
        for row, way in enumerate(ways):
            alone = logits_of(model, PROMPTS[row : row + 1], [way], board)
            assert torch.equal(whole[:, row], alone[:, 0])
