"""Generation: batches, caches and adapters change no answer, sampling does what its settings say."""

import gc
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import random_adapter, tiny_config
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litlora.checkpoint import resolve
from litlora.config import ModelConfig
from litlora.errors import UserError
from litlora.formats.families.example import example_config
from litlora.kernels import cpu
from litlora.load import load
from litlora.lora import LoRAConfig, adapter_of, add_lora, merge_lora
from litlora.lora.live import BASE, Way
from litlora.model import GPT
from litlora.serve.answer import Request
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling, are_finite, penalised, sample

FAMILIES = ["llama", "gemma3_text", "gpt2", "qwen3_moe", "qwen3_next", "phi3", "gpt_oss", "deepseek_v3"]
FAMILIES += ["gemma4_text", "gemma3n_text", "llama4_text"]
"""Full attention; windows with positions of their own; learned positions; experts; linear attention;
windows alone; sinks; latent attention; layers that share their keys and have experts beside the
MLP; several residual streams; chunks."""
MORE = {
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "full_attention_layers": [1, 3],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 400,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "full_attention_layers": [1, 3],
        "activation_sparsity": 0.8,
        "sparse_mlp_layers": [0, 2],
    },
}


@pytest.fixture(params=[False, True], ids=["in step", "ahead"])
def ahead(request):
    """Whether tokens are drawn before the last ones are known, as on a CUDA device."""
    return request.param


@pytest.fixture
def model():
    return GPT(tiny_config()).eval()


def prompts(count, longest=40):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 400, (length,), generator=generator).tolist() for length in lengths]


def alone(model, prompt, count):
    return list(Engine(model).generate(prompt, Sampling(max_new_tokens=count)))


def together(engine, asked, count=20, **sampling):
    """The ids of several answers, which join the batch at different times."""
    answers = []
    for number, (prompt, way) in enumerate(asked):
        request = Request(
            prompt=prompt, sampling=Sampling(max_new_tokens=count + number, **sampling), way=way, text=False
        )
        answers.append(engine.submit(request))
        engine.step()
    while engine.step():
        pass
    return [[token.id for token in answer] for answer in answers]


def test_greedy_equals_a_forward_over_everything_each_time(model):
    ids = [3, 1, 4, 1, 5]
    got = list(Engine(model).generate(ids, Sampling(max_new_tokens=20)))
    with torch.no_grad():
        for _ in range(20):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    assert got == ids[5:]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("phi3", "gpt2", "qwen3_moe")))
        for name in FAMILIES
    ],
)
def test_a_batch_gives_what_each_request_gives_alone(family):
    facts = {**example_config(family).to_dict(), **MORE.get(family, {})}
    model = GPT(ModelConfig.from_dict({**facts, "vocab_size": 400, "max_position_embeddings": 128})).eval()
    asked = [(prompt, Way(None)) for prompt in prompts(6)]
    expected = [alone(model, prompt, 12 + n) for n, (prompt, _) in enumerate(asked)]
    for ahead in (False, True):
        engine = Engine(model, max_batch=3, ahead=ahead)
        assert together(engine, asked, count=12) == expected, ahead
        assert not engine.num_running and not engine.num_waiting


KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"variant": "dora"}}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_one_batch_give_what_each_gives_alone(make_checkpoint, tmp_path, kind, ahead):
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    base = make_checkpoint("base")
    loaded = load(base)
    engine = Engine(loaded.model, ahead=ahead)
    merged = {None: load(base).model}
    for seed, name in enumerate("ab"):
        settings = LoRAConfig(rank=4, targets=targets, **KINDS[kind])
        directory = random_adapter(tmp_path / name, base, settings, seed=seed)
        engine.add_adapter(name, resolve(directory).top)
        merged[name] = load(directory).model
    ways = [None, "a", "b", "a", None, "b"]
    asked = [(prompt, Way(way)) for prompt, way in zip(prompts(6), ways, strict=True)]
    answers = together(engine, asked)
    expected = [alone(merged[way], prompt, 20 + n) for n, (prompt, (way, _)) in enumerate(asked)]
    assert answers == expected
    assert answers[1] != alone(merged[None], asked[1][0], 21), "the adapter must matter"
    assert together(engine, [(asked[1][0], Way("a", 0.0))]) == [alone(merged[None], asked[1][0], 20)]

    answer = engine.submit(
        Request(prompt=asked[1][0], sampling=Sampling(max_new_tokens=21), way=Way("a"), text=False)
    )
    engine.step()
    engine.remove_adapter("a")  # the answer that goes through it is finished first
    assert [token.id for token in answer] == expected[1]
    with pytest.raises(UserError, match="^a: there is no adapter of this name; there is b$"):
        engine.submit(replace(answer.request))
    engine.remove_adapter("b")
    assert type(loaded.model.lm_head) is torch.nn.Linear


def test_an_engine_that_owns_its_model_answers_the_same_and_keeps_no_adapter(make_checkpoint, tmp_path):
    """Few rows then go by compiled code, with the adapter in one call where all go one way."""
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj", "lm_head"]
    base = make_checkpoint("base", hidden_size=64, intermediate_size=96)
    settings = LoRAConfig(rank=4, targets=targets)
    directories = [random_adapter(tmp_path / name, base, settings, seed=n) for n, name in enumerate("ab")]
    loaded, merged = load(base), {None: load(base).model}
    engine = Engine(loaded.model, owns_model=True)
    for name, directory in zip("ab", directories, strict=True):
        engine.add_adapter(name, resolve(directory).top)
        merged[name] = load(directory).model
    mlp = loaded.model.model.layers[0].mlp
    assert cpu.library() is None or None not in (mlp.gate_proj.part, mlp.up_proj.part, mlp.down_proj.part)
    for ways in ([None] * 3, ["a"] * 3, ["b"], ["a"], ["a", None, "b"]):
        asked = [(prompt, Way(way)) for prompt, way in zip(prompts(len(ways)), ways, strict=True)]
        expected = [alone(merged[way], prompt, 20 + n) for n, (prompt, (way, _)) in enumerate(asked)]
        assert together(engine, asked) == expected, ways
    weaker = [together(engine, [(prompts(1)[0], Way("a", strength))])[0] for strength in (0.0, 0.5, 1.0)]
    assert weaker[0] == alone(merged[None], prompts(1)[0], 20) and weaker[0] != weaker[2]
    kept = [weakref.ref(update.A) for update in mlp.gate_proj.updates.values()]
    for name in "ab":
        engine.remove_adapter(name)
    engine.step()
    gc.collect()
    assert len(kept) == 2 and [reference() for reference in kept] == [None, None]


OTHERS = {
    "a weight that is read": ("deepseek_v3", {"targets": ["kv_b_proj"]}),
    "biases": ("qwen2", {"targets": ["q_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize(("family", "settings"), OTHERS.values(), ids=OTHERS)
def test_an_adapter_acts_on(family, settings, tmp_path):
    """Latent attention reads the weight of kv_b_proj instead of calling the layer."""
    facts = {**example_config(family).to_dict(), "vocab_size": 400, "max_position_embeddings": 128}
    model, merged = (GPT(ModelConfig.from_dict(facts)).eval() for _ in range(2))
    merged.load_state_dict(model.state_dict())
    config = LoRAConfig(rank=4, alpha=16, **settings)
    add_lora(merged, config)
    for parameter in merged.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter = replace(adapter_of(merged, config), file=tmp_path / "none")
    merge_lora(merged)
    engine = Engine(model)
    engine.add_adapter("a", adapter)
    asked = [(prompt, way) for prompt, way in zip(prompts(4), (Way("a"), BASE, BASE, Way("a")), strict=True)]
    answers = together(engine, asked)
    models = {BASE: engine.model, Way("a"): merged}
    assert answers == [alone(models[way], prompt, 20 + n) for n, (prompt, way) in enumerate(asked)]
    assert answers[0] != alone(model, asked[0][0], 20)


def test_strength_scales_the_update(base, tmp_path):
    settings = LoRAConfig(rank=4, targets=["q_proj", "up_proj"], alpha=8)
    engine, model = Engine(load(base).model), load(base).model
    adapter = resolve(random_adapter(tmp_path / "a", base, settings)).top
    engine.add_adapter("a", adapter)
    with torch.no_grad():
        for layer, update in adapter.updates.items():
            weight = model.get_submodule(layer).weight
            update.add_to(weight, weight, factor=0.5)
    for prompt in prompts(4):
        way = Way("a", 0.5)
        assert list(engine.generate(prompt, Sampling(max_new_tokens=20), way=way)) == alone(model, prompt, 20)


def test_an_adapter_that_cannot_be_switched_is_refused(base, tmp_path):
    engine = Engine(load(base).model)
    whole = random_adapter(tmp_path / "whole", base, LoRAConfig(rank=2, modules_to_save=["model.norm"]))
    with pytest.raises(UserError, match="replaces model.norm.weight as a whole.*merge it"):
        engine.add_adapter("whole", resolve(whole).top)
    embedding = random_adapter(tmp_path / "e", base, LoRAConfig(rank=2, targets=["embed_tokens"]))
    with pytest.raises(UserError, match="changes model.embed_tokens, which is not a linear layer"):
        engine.add_adapter("embedding", resolve(embedding).top)
    assert engine.adapters == []


def test_the_next_turn_computes_what_is_new_alone(model, ahead):
    engine, seen = Engine(model, ahead=ahead), []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.size(1)))
    first = prompts(1)[0] * 3
    said = list(engine.generate(first, Sampling(max_new_tokens=10)))
    seen.clear()
    turn = [*first, *said, 7, 8, 9]
    request = Request(prompt=turn, sampling=Sampling(max_new_tokens=5), text=False)
    answer = engine.submit(request)
    again = [token.id for token in answer]
    assert seen == [4, 1, 1, 1, 1] and answer.num_reused == len(turn) - 4
    assert again == alone(model, turn, 5)
    running = engine.submit(request)  # one that runs is shared, too
    engine.step()
    shares = engine.submit(replace(request, prompt=[*turn[:30], 5]))
    assert [token.id for token in shares] == alone(model, [*turn[:30], 5], 5)
    assert shares.num_reused == 30 and [token.id for token in running] == again


def test_a_long_prompt_lets_others_go_on():
    model = GPT(tiny_config(max_position_embeddings=2048)).eval()
    engine = Engine(model)
    first = engine.submit(Request(prompt=[1, 2], sampling=Sampling(max_new_tokens=50), text=False))
    engine.step()
    long = [*range(300)] * 5
    second = engine.submit(Request(prompt=long, sampling=Sampling(max_new_tokens=4), text=False))
    engine.step()
    engine.step()
    assert first.num_tokens == 3 and second.num_tokens == 0
    assert [token.id for token in second] == alone(model, long, 4)


def test_what_is_cancelled_makes_room(model, ahead):
    engine = Engine(model, max_batch=2, ahead=ahead)
    answers = [
        engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=60), text=False))
        for prompt in prompts(3)
    ]
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    answers[0].cancel()
    assert answers[0].finish == "cancelled" and (engine.num_running, engine.num_waiting) == (1, 1)
    stopped = iter(answers[2])
    next(stopped)
    stopped.close()  # as whoever waits for an answer goes away
    assert engine.num_running == 1 and answers[2].finish == "cancelled"
    assert len(list(answers[1])) == 60


def test_caches_stay_within_their_room(model, ahead):
    engine = Engine(model, max_batch=8, cache_tokens=60, ahead=ahead)
    asked = [(prompt, Way(None)) for prompt in prompts(6, longest=12)]
    most = []
    model.model.layers[0].register_forward_hook(lambda *_: most.append(engine.num_running))
    assert together(engine, asked) == [alone(model, prompt, 20 + n) for n, (prompt, _) in enumerate(asked)]
    assert max(most) == 2


def test_it_stops_at_a_stop_token_and_at_the_end_of_the_context(model):
    free = list(Engine(model).generate([1, 2, 3], Sampling(max_new_tokens=10)))
    stop = free[4]
    engine = Engine(model)
    got = list(engine.generate([1, 2, 3], Sampling(max_new_tokens=10), stop_ids=frozenset([stop])))
    assert got == free[: free.index(stop)]
    assert len(list(engine.generate([1] * 120, Sampling(max_new_tokens=1000)))) == 8


def test_stop_texts_end_an_answer_and_are_not_shown(base):
    loaded = load(base)
    engine = Engine(loaded.model, loaded.tokenizer)

    def text(*stops):
        sampling = Sampling(max_new_tokens=40, stop=stops)
        answer = engine.submit(Request(prompt=[1, 2, 3], sampling=sampling))
        return "".join(token.text for token in answer), answer.finish

    whole, finish = text()
    assert finish == "length" and len(whole) > 20
    for stop in (whole[10:13], whole[10:11], whole[12:19]):
        assert text("\x00", stop) == (whole[: whole.index(stop)], "stop")
    assert text(whole + "x") == (whole, "length"), "what was held back comes at the end"


def test_a_prompt_that_leaves_no_room_is_an_error(model):
    with pytest.raises(UserError, match="128 tokens.*context holds 128"):
        Engine(model).generate([1] * 128, Sampling(max_new_tokens=1))
    with pytest.raises(UserError, match="empty"):
        Engine(model).generate([], Sampling(max_new_tokens=1))


def test_a_token_that_is_broken_ends_its_answer_alone(model):
    engine = Engine(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    ask = Request(prompt=[5], sampling=Sampling(max_new_tokens=3), text=False)
    bad, good = engine.submit(ask), engine.submit(replace(ask, prompt=[6]))
    with pytest.raises(UserError, match="logits are not finite"):
        list(bad)
    assert [token.id for token in good] == alone(model, [6], 3)


def test_a_token_that_cannot_be_drawn_ends_its_answer_alone(model):
    engine = Engine(model)
    ask = Request(prompt=[6], sampling=Sampling(max_new_tokens=3), text=False)
    bad = engine.submit(replace(ask, sampling=Sampling(max_new_tokens=3, temperature=1.0), generator="none"))
    good = engine.submit(ask)
    with pytest.raises(TypeError, match="generator"):
        list(bad)
    assert [token.id for token in good] == alone(model, [6], 3)


def test_requests_that_come_and_go_while_others_are_computed_stop_nothing(model):
    """The queue is read by the thread that computes, while others add to it and cancel."""
    engine, ended, interval = Engine(model, max_batch=2), [], sys.getswitchinterval()
    ask = Request(prompt=[1, 2, 3], sampling=Sampling(max_new_tokens=20), text=False)
    waiting = [engine.submit(ask) for _ in range(2000)]

    def compute():
        while engine.num_waiting < 3000:
            engine.step()
        ended.append(True)

    sys.setswitchinterval(1e-5)
    try:
        thread = threading.Thread(target=compute)
        thread.start()
        while thread.is_alive() and engine.num_waiting < 3000:
            waiting.append(engine.submit(ask))
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert ended and not any(answer.error for answer in waiting)


def test_threads_that_ask_together_get_their_own_answers_and_no_switch_of_the_process_moves(model):
    engine, seen, answers = Engine(model), set(), {}
    expected = {number: alone(model, prompt, 20) for number, prompt in enumerate(prompts(6))}
    model.model.layers[0].register_forward_hook(lambda *_: seen.add(torch.backends.mkldnn.enabled))

    def ask(number, prompt):
        answers[number] = list(engine.generate(prompt, Sampling(max_new_tokens=20)))

    threads = [threading.Thread(target=ask, args=entry) for entry in enumerate(prompts(6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected and seen == {True}


def test_a_seed_repeats_the_answer_whatever_runs_beside_it(model):
    def answer(seed, engine):
        return list(engine.generate([1, 2], Sampling(max_new_tokens=30, temperature=1.0, seed=seed)))

    busy = Engine(model)
    for prompt in prompts(3):
        busy.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=60, temperature=2.0), text=False))
    assert answer(1, Engine(model)) == answer(1, busy) != answer(2, busy)


def test_logprobs_are_those_of_the_model(model):
    engine = Engine(model)
    sampling = Sampling(max_new_tokens=4, temperature=5.0, seed=0, logprobs=3)
    ids = [1, 2]
    for token in engine.submit(Request(prompt=ids, sampling=sampling, text=False)):
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert token.logprob.value == pytest.approx(expected[token.id].item(), abs=1e-5)
        assert [entry.id for entry in token.top] == expected.topk(3).indices.tolist()
        ids = [*ids, token.id]


def drawn(logits, **settings):
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_new_tokens=1, **settings)
    return {int(sample(logits, sampling, generator)) for _ in range(300)}


def test_sampling_settings():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert drawn(logits, temperature=0) == {1}
    assert drawn(logits, temperature=1.0) == {0, 1, 2, 3}
    assert drawn(logits, temperature=1.0, top_k=2) == {1, 3}
    assert drawn(logits, temperature=1.0, top_k=9) == {0, 1, 2, 3}
    assert drawn(logits, temperature=1.0, top_p=0.65) == {1, 3}
    assert drawn(logits, temperature=1.0, top_p=0.75) == {1, 2, 3}
    assert drawn(logits, temperature=1.0, top_p=1e-9) == {1}
    assert drawn(logits, temperature=1.0, min_p=0.6) == {1, 3}
    assert drawn(logits, temperature=0.01) == {1}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 0.8},
    ],
)
def test_what_can_be_drawn_is_what_transformers_leaves(settings):
    """With the same probabilities: the frequencies of what was drawn are those."""
    logits, prompt = torch.randn(40) * 3, [1, 2, 3, 3]
    sampling = Sampling(max_new_tokens=1, **settings)
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(settings.get("repetition_penalty", 1.0))])
    steps.append(TemperatureLogitsWarper(settings["temperature"]))
    steps += [TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []
    steps += [TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    steps += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    expected = steps(torch.tensor([prompt]), logits[None].clone())[0].softmax(-1)
    counts, generator = torch.zeros(40), torch.Generator().manual_seed(0)
    for _ in range(3000):
        counts[sample(penalised(logits, sampling, prompt[:2], prompt[2:]), sampling, generator)] += 1
    assert not counts[expected == 0].any()
    torch.testing.assert_close(counts / 3000, expected, atol=0.04, rtol=0)


def test_draws_are_those_of_multinomial_and_leave_the_same_generator():
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    for temperature in (0.3, 1.0, 4.0) * 40:
        logits = torch.randn(400)
        chosen = sample(logits, Sampling(max_new_tokens=1, temperature=temperature), ours)
        assert chosen == torch.multinomial((logits / temperature).softmax(-1), 1, generator=theirs)[0]
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_logit_that_is_not_finite_is_seen(dtype):
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 17, 399):
            logits = torch.randn(400).to(dtype)
            assert are_finite(logits)
            logits[place] = value
            assert not are_finite(logits)


def test_a_penalty_beyond_the_range_of_the_dtype_still_lets_a_token_be_drawn():
    sampling = Sampling(max_new_tokens=1, temperature=1.0, repetition_penalty=1e-9)
    logits = penalised(torch.tensor([2.0, 3.0, -1.0]).half(), sampling, [1], [])
    assert {int(sample(logits, sampling)) for _ in range(20)} == {1}


def test_presence_and_frequency_count_the_answer_alone():
    logits = torch.zeros(5)
    sampling = Sampling(max_new_tokens=1, presence_penalty=0.5, frequency_penalty=0.25)
    assert penalised(logits, sampling, [0, 4], [1, 1, 2]).tolist() == [0, -1, -0.75, 0, 0]
    with pytest.raises(UserError, match="min_p 2: must be from 0 to 1"):
        Sampling(max_new_tokens=1, min_p=2)
