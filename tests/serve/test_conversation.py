"""A conversation keeps what was said, within the context, in the words the model was taught
with."""

import pytest

from litlora.errors import UserError
from litlora.load import load
from litlora.prompts import STYLES, load_style
from litlora.serve.conversation import Conversation
from litlora.settings import Chat


@pytest.fixture
def talk(base, monkeypatch):
    """A conversation with a random model, and the prompts that reach it."""
    loaded = load(base)
    prompts = []

    def scripted(model, prompt_ids, **settings):
        prompts.append(loaded.tokenizer.decode(prompt_ids))
        yield from loaded.tokenizer.encode(f"answer {len(prompts)}")

    def start(**settings):
        return Conversation(loaded.model, loaded.tokenizer, STYLES["plain"], Chat(**settings))

    return start, prompts, lambda: monkeypatch.setattr("litlora.serve.conversation.generate", scripted)


def test_what_was_said_comes_before_the_next_question(talk):
    start, prompts, script = talk
    script()
    conversation = start()
    assert "".join(conversation.ask("first?")) == "answer 1"
    assert "".join(conversation.ask("second?")) == "answer 2"
    assert prompts == ["first?", "first?answer 1second?"]
    conversation.clear()
    "".join(conversation.ask("third?"))
    assert prompts[-1] == "third?"


def test_a_stopped_answer_is_remembered_as_far_as_it_came(talk):
    start, prompts, script = talk
    script()
    conversation = start()
    answer = conversation.ask("first?")
    next(answer)
    answer.close()  # as Ctrl-C does
    "".join(conversation.ask("second?"))
    assert prompts[-1].startswith("first?") and prompts[-1].endswith("second?")


def test_the_oldest_turns_go_when_the_context_is_full_and_it_is_said(talk):
    start, prompts, script = talk
    script()
    conversation = start(max_new_tokens=8)
    for n in range(6):
        "".join(conversation.ask(f"question {n} " + "fox " * 8))
    assert "question 5" in prompts[-1] and "question 0" not in prompts[-1]
    assert "forgotten" in conversation.notice


def test_a_question_longer_than_the_context_is_refused_and_forgotten(talk):
    start, prompts, script = talk
    script()
    conversation = start()
    "".join(conversation.ask("first?"))
    with pytest.raises(UserError, match="the model's context holds 128"):
        "".join(conversation.ask("fox " * 300))
    "".join(conversation.ask("second?"))
    assert prompts[-1] == "first?answer 1second?"


def test_a_seed_repeats_the_conversation(talk):
    start, _, _ = talk

    def answers(seed):
        conversation = start(seed=seed, max_new_tokens=12, temperature=1.0)
        return ["".join(conversation.ask(question)) for question in ("one", "two")]

    assert answers(5) == answers(5) != answers(6)


def test_the_alpaca_prompt_is_the_published_one():
    render = STYLES["alpaca"].render
    assert render("Add.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert "paired with an input" in render("Add.", "1 2") and "### Input:\n1 2\n\n### Response:\n" in render(
        "Add.", "1 2"
    )


def test_a_strange_style_file_is_named(tmp_path):
    assert load_style(tmp_path) is None
    for text in ("style: martian", "style: [alpaca]", "[", "just text"):
        (tmp_path / "prompt_style.yaml").write_text(text)
        with pytest.raises(UserError, match=r"prompt_style\.yaml"):
            load_style(tmp_path)


def test_the_default_generator_differs_each_time(talk):
    start, _, _ = talk
    first, second = ("".join(start(max_new_tokens=20, temperature=1.0).ask("one")) for _ in range(2))
    assert first != second
