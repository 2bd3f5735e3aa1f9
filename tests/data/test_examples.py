"""Examples: prompt, answer, and the end of the text, which is always there."""

import shutil
from array import array

import pytest
from conftest import QUICKSTART, SHARED

from litlora.data.conversation import Conversation, Message, Place
from litlora.data.examples import Example, content_line, split, tokenize
from litlora.data.sources import SAMPLE_FILE, read_dataset
from litlora.errors import DataError
from litlora.prompts import STYLES
from litlora.settings import JSON
from litlora.tokenizer import Tokenizer

STYLE = STYLES["alpaca"]


def record(instruction="Count.", input="", output="one two three"):
    messages = Message("user", instruction, input=input), Message("assistant", output, train=True)
    return Conversation(messages, Place("x.json", "record 0"))


def prompt_length(example):
    """Where the answer begins: an example of one exchange has one span, up to its end."""
    ((start, stop),) = example.learned
    assert stop == len(example.ids)
    return start


def test_an_example_is_prompt_answer_and_end(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    (example,) = tokenize([record(input="to three")], tokenizer, STYLE, 500).examples
    assert tokenizer.decode(list(example.ids[: prompt_length(example)])) == STYLE.render("Count.", "to three")
    assert tokenizer.decode(list(example.ids[prompt_length(example) :])) == "one two three"
    assert example.ids[-1] == tokenizer.eos_id


def test_the_end_is_learned_also_when_the_answer_is_cut(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    long = record(output="seven " * 200)
    whole = tokenize([record(), long], tokenizer, STYLE, 1000)
    assert whole.num_cut == 0
    limit = prompt_length(whole.examples[0]) + 10
    cut = tokenize([record(output="one"), long], tokenizer, STYLE, limit)
    assert (cut.num_cut, cut.num_left_out) == (1, 0)
    assert all(example.ids[-1] == tokenizer.eos_id and len(example.ids) <= limit for example in cut.examples)
    assert cut.examples[1].ids[:-1] == whole.examples[1].ids[: limit - 1]


def test_a_prompt_that_fills_the_length_is_left_out_and_counted(tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    done = tokenize([record(), record(instruction="Count. " * 100)], tokenizer, STYLE, 120)
    assert (len(done.examples), done.num_left_out) == (1, 1)
    with pytest.raises(DataError, match="no example is left.*20 tokens.*x.json, record 0"):
        tokenize([record()], tokenizer, STYLE, 20)


def test_an_empty_answer_teaches_the_end(tokenizer_dir):
    (example,) = tokenize([record(output="")], Tokenizer(tokenizer_dir), STYLE, 500).examples
    assert len(example.ids) == prompt_length(example) + 1


def test_the_real_data_keeps_every_end(tmp_path):
    path, file = SHARED / "data/alpaca_zh_demo.json", SHARED / "tokenizers/gpt_neox_20b_tokenizer.json"
    if not (path.is_file() and file.is_file()):
        pytest.skip(f"{path} or {file} is not at hand")
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    tokenizer = Tokenizer(tmp_path)
    done = tokenize(read_dataset(JSON(path=str(path))).conversations, tokenizer, STYLE, 256)
    assert len(done.examples) + done.num_left_out == 1000
    assert done.num_cut > 100, "Chinese takes many tokens here; the cut must be exercised"
    assert all(
        example.ids[-1] == tokenizer.eos_id and prompt_length(example) < len(example.ids) <= 256
        for example in done.examples
    )


def test_the_split_is_seeded_whole_and_disjoint():
    records = [record(instruction=str(n)) for n in range(101)]
    train, val = split(records, 0.1, seed=3)
    assert len(val) == 10 and sorted([*train, *val], key=lambda c: int(c.messages[0].content)) == records
    assert (train, val) == split(records, 0.1, seed=3) != split(records, 0.1, seed=4)
    assert split(records, 0.0, seed=3) == (records, [])
    assert [len(part) for part in split(records[:2], 0.01, seed=3)] == [1, 1]
    assert [len(part) for part in split(records[:1], 0.5, seed=3)] == [1, 0]


def test_a_message_that_is_not_for_training_is_not_learned(tokenizer_dir):
    question, answer = record().messages
    told = Conversation((question, Message("assistant", answer.content)), Place("x.json", "record 0"))
    tokenizer = Tokenizer(tokenizer_dir)
    (learned,), (unlearned,) = (tokenize([c], tokenizer, STYLE, 500).examples for c in (record(), told))
    assert learned.ids == unlearned.ids and unlearned.learned == ()


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ("user user assistant", "must have turns .* it has user, user, assistant; "),
        ("assistant", "must have turns .* it has assistant; "),
        ("user assistant system", "must have turns .* it has user, assistant, system; "),
        ("system", "has a system message, for which the prompt style alpaca has no place"),
        ("", "must have turns .* it has no message; "),
        ("user " * 30, "must have turns .* it has user, user, user, user, user, user and 24 more; "),
    ],
)
def test_messages_that_are_not_turns_are_refused_by_their_place(tokenizer_dir, roles, says):
    odd = Conversation(tuple(Message(role, "x") for role in roles.split()), Place("x.json", "record 0"))
    with pytest.raises(DataError, match=f"x.json, record 0: {says}"):
        tokenize([odd], Tokenizer(tokenizer_dir), STYLE, 500)


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json", "sample"])
def test_byte_level_prompts_and_answers_are_those_that_earlier_versions_encoded_apart(name, tmp_path):
    path, file = SHARED / "data" / name, SHARED / "tokenizers/gpt_neox_20b_tokenizer.json"
    tokenizer_dir = QUICKSTART
    if name == "sample":
        path = SAMPLE_FILE
    elif not (path.is_file() and file.is_file()):
        pytest.skip(f"{path} or {file} is not at hand")
    else:
        shutil.copy(file, tmp_path / "tokenizer.json")
        tokenizer_dir = tmp_path
    tokenizer = Tokenizer(tokenizer_dir)
    conversations = read_dataset(JSON(path=str(path))).conversations[::3]
    made = tokenize(conversations, tokenizer, STYLE, 100_000)
    asked = [STYLE.render(c.messages[0].content, c.messages[0].input) for c in conversations]
    prompts = tokenizer.encode_batch(asked, begin=True)
    answers = tokenizer.encode_batch([c.messages[1].content for c in conversations])
    assert [(list(e.ids), e.learned) for e in made.examples] == [
        ([*prompt, *answer, tokenizer.eos_id], ((len(prompt), len(prompt) + len(answer) + 1),))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert made.notices(100_000) == []


def test_the_line_of_one_span_to_the_end_is_the_one_that_stored_runs_have():
    """Runs that began before examples had spans hashed this line: they must resume."""
    ids = array("i", range(9))
    assert content_line(Example(ids, ((4, 9),))) == "9 4\n"
    others = [((4, 8),), ((0, 9),), ((0, 2), (4, 9)), ((0, 2), (4, 8)), ((4, 9), (0, 2)), ()]
    assert len({content_line(Example(ids, spans)) for spans in others} | {"9 4\n"}) == len(others) + 1
