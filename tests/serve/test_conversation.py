"""A chat session keeps what was said, within the context, and asks in the style that the model was
trained with."""

import pytest

from litlora.errors import UserError
from litlora.load import load
from litlora.prompts import STYLES, load_style
from litlora.serve.conversation import ChatSession, Speed
from litlora.serve.engine import Engine
from litlora.serve.sampling import Sampling


class Scripted(Engine):
    """An engine that gives numbered answers and keeps the prompts that reach it."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.prompts = []

    def generate(self, prompt_ids, sampling, *, stop_ids, generator=None, way=None):
        self.prompts.append(self.tokenizer.decode(prompt_ids))
        yield from self.tokenizer.encode(f"answer {len(self.prompts)}")


@pytest.fixture
def talk(base):
    """Starts a session with a scripted engine, and that engine's prompts."""
    loaded = load(base)
    engine = Scripted(loaded.model, loaded.tokenizer)

    def start(max_new_tokens=512):
        return ChatSession(engine, STYLES["plain"], Sampling(max_new_tokens=max_new_tokens))

    return start, engine.prompts


@pytest.fixture
def talk_to_model(base):
    """Starts a session with a random model."""
    loaded = load(base)
    engine = Engine(loaded.model, loaded.tokenizer)
    return lambda **sampling: ChatSession(engine, STYLES["plain"], Sampling(temperature=1.0, **sampling))


def test_what_was_said_comes_before_the_next_question(talk):
    start, prompts = talk
    session = start()
    assert "".join(session.ask("first?")) == "answer 1"
    assert "".join(session.ask("second?")) == "answer 2"
    assert prompts == ["first?", "first?answer 1second?"]
    session.clear()
    "".join(session.ask("third?"))
    assert prompts[-1] == "third?"


def test_a_stopped_answer_is_remembered_as_far_as_it_came(talk):
    start, prompts = talk
    session = start()
    answer = session.ask("first?")
    next(answer)
    answer.close()  # as Ctrl-C does
    "".join(session.ask("second?"))
    assert prompts[-1].startswith("first?") and prompts[-1].endswith("second?")


def test_the_oldest_turns_go_when_the_context_is_full_and_it_is_said(talk):
    start, prompts = talk
    session = start(max_new_tokens=8)
    for n in range(6):
        "".join(session.ask(f"question {n} " + "fox " * 8))
    assert "question 5" in prompts[-1] and "question 0" not in prompts[-1]
    assert "forgotten" in session.notice


def test_a_question_longer_than_the_context_is_refused_and_forgotten(talk):
    start, prompts = talk
    session = start()
    "".join(session.ask("first?"))
    with pytest.raises(UserError, match="the model's context holds 128"):
        "".join(session.ask("fox " * 300))
    "".join(session.ask("second?"))
    assert prompts[-1] == "first?answer 1second?"


def test_a_seed_repeats_the_conversation(talk_to_model):
    def answers(seed):
        session = talk_to_model(seed=seed, max_new_tokens=12)
        return ["".join(session.ask(question)) for question in ("one", "two")]

    assert answers(5) == answers(5) != answers(6)


def test_the_alpaca_prompt_is_the_published_one():
    render = STYLES["alpaca"].render
    assert render("Add.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
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


def test_the_default_generator_differs_each_time(talk_to_model):
    first, second = ("".join(talk_to_model(max_new_tokens=20).ask("one")) for _ in range(2))
    assert first != second


def test_a_question_that_is_not_text_is_refused_and_not_remembered(talk):
    start, prompts = talk
    session = start()
    with pytest.raises(UserError, match="^the question is not UTF-8 text; send it as UTF-8$"):
        next(session.ask(b"caf\xe9".decode(errors="surrogateescape")))
    "".join(session.ask("first?"))
    assert prompts == ["first?"]


def test_a_high_speed_is_written_out():
    assert Speed(7, 12345.6).text == "(7 tokens, 12,346 tokens/s)"
    assert Speed(7, 69.04).text == "(7 tokens, 69 tokens/s)"
