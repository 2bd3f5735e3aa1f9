"""Steps that a device is given ahead of what the host knows."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from litlora.config import RopeScaling
from litlora.errors import UserError
from litlora.formats.families.example import example_config
from litlora.formats.families.table import FAMILIES
from litlora.model import GPT
from litlora.serve.answer import Request
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling, sample
from litlora.serve.steps import why_no_rows

CHOICES = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 6, "logprobs": 2},
]


def answers(engine, choices, stops=frozenset()):
    submitted = []
    for number, choice in enumerate(choices):
        sampling = Sampling(max_new_tokens=100 - 12 * number if number else 280, **choice)
        request = Request(prompt=[1, 2, 3 + number], sampling=sampling, stop_ids=stops, text=False)
        submitted.append(engine.submit(request))
        engine.step()
    return [([token.id for token in answer], answer.finish) for answer in submitted]


@pytest.mark.parametrize("choices", [CHOICES[:3], CHOICES], ids=["drawn on the device", "with the host"])
def test_what_is_drawn_ahead_is_what_is_drawn_in_step(choices):
    """Over more tokens than a row has at first, and beyond tokens that end an answer."""
    model = GPT(tiny_config(max_position_embeddings=512)).eval()
    first = answers(Engine(model), choices)
    assert answers(Engine(model, ahead=True), choices) == first
    assert len({len(tokens) for tokens, _ in first}) == len(choices)
    stops = frozenset(tokens[20 + number] for number, (tokens, _) in enumerate(first))
    expected = answers(Engine(model), choices, stops)
    assert answers(Engine(model, ahead=True), choices, stops) == expected
    assert "stop" in {finish for _, finish in expected}


def test_an_answer_that_breaks_leaves_nothing_to_the_others():
    """Neither beside it, over more tokens than its row has, nor in whoever gets the row next: what is
    not seen is multiplied by 0, which a NaN outlasts."""
    model = GPT(tiny_config(max_position_embeddings=512)).eval()
    asked = [
        Request(prompt=[n], sampling=Sampling(max_new_tokens=count, temperature=1.0, seed=n), text=False)
        for n, count in enumerate((290, 40, 20, 60))
    ]
    expected = [[token.id for token in Engine(model).submit(request)] for request in asked]
    others = {id for ids in expected[::2] + expected[3:] for id in ids}
    stop = next(id for number, id in enumerate(expected[1]) if number > 25 and id not in others)
    never = next(id for id in range(4, 400) if id not in {stop, *others, *expected[1]})
    expected[1] = expected[1][: expected[1].index(stop)]
    with torch.no_grad():  # a step too many is computed of the token that ends an answer
        model.model.embed_tokens.weight[[never, stop]] = torch.nan
    engine = Engine(model, max_batch=2, ahead=True)
    asked[1] = replace(asked[1], stop_ids=frozenset([stop]))
    good, broken, *later = map(engine.submit, (asked[0], replace(asked[0], prompt=[never]), *asked[1:]))
    with pytest.raises(UserError, match="logits are not finite"):
        list(broken)
    assert [[token.id for token in answer] for answer in (good, *later)] == expected


def test_what_was_cancelled_is_the_beginning_of_another():
    model = GPT(tiny_config()).eval()
    engine, sampling = Engine(model, ahead=True), Sampling(max_new_tokens=60)
    answer = engine.submit(Request(prompt=[*range(9)], sampling=sampling, text=False))
    tokens = iter(answer)
    said = [next(tokens).id for _ in range(20)]
    answer.cancel()
    turn = [*range(9), *said, 7]
    again = engine.submit(Request(prompt=turn, sampling=sampling, text=False))
    assert [token.id for token in again] == [*Engine(model).generate(turn, sampling)]
    assert again.num_reused >= len(turn) - 2


def test_a_step_that_fails_ends_its_answers_and_nothing_else():
    model = GPT(tiny_config()).eval()
    engine, sampling = Engine(model, ahead=True), Sampling(max_new_tokens=60)
    asked = [engine.submit(Request(prompt=[n, 2], sampling=sampling, text=False)) for n in range(3)]
    for _ in range(10):
        engine.step()

    def fail(*_):
        raise MemoryError("no room")

    with_fault = model.model.layers[1].register_forward_hook(fail)
    engine.step()
    with_fault.remove()
    for answer in asked:
        with pytest.raises(MemoryError, match="no room"):
            list(answer)
    assert not engine.num_running
    assert [*engine.generate([1, 2], sampling)] == [*Engine(model).generate([1, 2], sampling)]


def test_models_whose_sequences_cannot_have_rows():
    reasons = {name: why_no_rows(example_config(name)) for name in FAMILIES}
    without = {name for name, reason in reasons.items() if reason}
    assert without == {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
    assert "linear attention" in reasons["qwen3_next"]
    scaling = RopeScaling(rope_type="dynamic", factor=2.0)
    assert "dynamic rotations" in why_no_rows(tiny_config(rope_scaling=scaling))
    model = GPT(example_config("qwen3_next")).eval()
    with pytest.raises(UserError, match="cannot be compiled: its layers with linear attention"):
        Engine(model, compiled=True)


@torch.inference_mode()
def take_steps(model, rows, step):
    """(a token that was drawn, the logits (rows, V)) after two steps."""
    cache, ids = model.new_static_cache(rows, 256), torch.ones(rows, 1, dtype=torch.int64)
    for _ in range(2):
        logits = step(ids, cache)
        drawn = sample(logits[0], Sampling(max_new_tokens=1, temperature=0.7, top_k=9, top_p=0.9, min_p=0.1))
        ids = logits.argmax(-1)[:, None]
    return drawn, logits


def step_of(model):
    return lambda ids, cache: model.logits(model.hidden(ids, cache)[:, -1])


def test_no_step_waits_for_a_value_of_the_device():
    config = tiny_config()
    with FakeTensorMode():
        tensors = {name: torch.empty(p.shape) for name, p in GPT.without_weights(config).named_parameters()}
        model = GPT.from_tensors(config, tensors).eval()
        drawn, logits = take_steps(model, 4, step_of(model))
        assert logits.shape == (4, config.vocab_size)
        with pytest.raises(DataDependentOutputException):  # which a value that is read raises
            drawn.item()


@pytest.mark.slow
def test_a_step_is_one_graph():
    """Without a break, for a batch of any size."""
    model = GPT(tiny_config()).eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(step_of(model), backend=count, fullgraph=True)
    for rows in (1, 2, 4, 8):
        # Eagerly, norms go by code of our own, which sums in another order.
        plain, found = (take_steps(model, rows, step)[1] for step in (step_of(model), compiled))
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_a_compiled_step_gives_the_same_answers():
    """By the compiler itself, in batches of several sizes; only a CUDA device repeats what it recorded."""
    model = GPT(tiny_config(num_hidden_layers=1)).eval()
    choices = [{"temperature": float(number == 1), "seed": number} for number in range(3)]
    assert answers(Engine(model, compiled=True), choices) == answers(Engine(model), choices)
