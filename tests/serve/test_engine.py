"""Generation: the cache changes nothing, sampling does what its settings say."""

import threading

import pytest
import torch
from conftest import tiny_config

from litlora.errors import UserError
from litlora.model import GPT
from litlora.serve.engine import Sampling, generate, sample


@pytest.fixture
def model():
    return GPT(tiny_config()).eval()


def test_greedy_equals_a_forward_over_everything_each_time(model):
    ids = [3, 1, 4, 1, 5]
    got = list(generate(model, ids, Sampling(max_new_tokens=20)))
    with torch.no_grad():
        for _ in range(20):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    assert got == ids[5:]


def test_it_stops_at_a_stop_token_and_at_the_end_of_the_context(model):
    free = list(generate(model, [1, 2, 3], Sampling(max_new_tokens=10)))
    stop = free[4]
    assert (
        list(generate(model, [1, 2, 3], Sampling(max_new_tokens=10), stop_ids=frozenset([stop])))
        == free[: free.index(stop)]
    )
    assert len(list(generate(model, [1] * 120, Sampling(max_new_tokens=1000)))) == 8


def test_a_prompt_that_leaves_no_room_is_an_error(model):
    with pytest.raises(UserError, match="128 tokens.*context holds 128"):
        next(generate(model, [1] * 128, Sampling(max_new_tokens=1)))
    with pytest.raises(UserError, match="empty"):
        next(generate(model, [], Sampling(max_new_tokens=1)))


def test_single_tokens_go_without_onednn_and_nothing_else_does(model):
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: seen.append((output.size(1), torch.backends.mkldnn.enabled))
    )
    answer = generate(model, [1, 2, 3], Sampling(max_new_tokens=9))
    for _ in range(3):
        next(answer)
        assert torch.backends.mkldnn.enabled
    assert seen == [(3, True), (1, False), (1, False)]


def test_threads_that_decode_together_leave_onednn_as_it_was():
    """The switch is the process's: it is off until the last thread's token is done."""
    inside, seen, answers = threading.Barrier(2), [], {}
    models = {prompt: GPT(tiny_config()).eval() for prompt in (1, 2)}
    expected = {prompt: answer_of(model, prompt) for prompt, model in models.items()}

    def look(*_):
        inside.wait(20)  # for the other thread to be in its forward, too
        seen.append(torch.backends.mkldnn.enabled)

    for model in models.values():
        model.model.layers[0].register_forward_hook(look)

    def decode(prompt):
        answers[prompt] = answer_of(models[prompt], prompt)

    threads = [threading.Thread(target=decode, args=(prompt,)) for prompt in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected
    assert seen == [False] * 40 and torch.backends.mkldnn.enabled


def answer_of(model, prompt):
    return list(generate(model, [prompt], Sampling(max_new_tokens=20)))


def test_a_seed_repeats_the_answer(model):
    def answer(seed):
        sampling = Sampling(max_new_tokens=30, temperature=1.0, seed=seed)
        return list(generate(model, [1, 2], sampling, generator=sampling.generator(torch.device("cpu"))))

    assert answer(1) == answer(1) != answer(2)


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
    assert drawn(logits, temperature=0.01) == {1}


def test_sampling_follows_the_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_new_tokens=1, temperature=1.0)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[sample(probabilities.log(), sampling, generator)] += 1
    torch.testing.assert_close(counts / 4000, probabilities, atol=0.03, rtol=0)
