"""chat/generate.py: a file of prompts in, their answers out; what was stopped goes on."""

import json
import runpy

import pytest
from conftest import QUICKSTART, REPO

from litlora.cli import parse
from litlora.load import load
from litlora.prompts import STYLES
from litlora.serve.engine import Engine
from litlora.serve.many import Partial, answers, plan
from litlora.serve.prompt import Asker
from litlora.serve.records import read_prompts
from litlora.serve.sampling import Sampling
from litlora.settings import Generate

RECORDS = [
    {"id": "a", "prompt": "What is the capital of France?"},
    {"id": "b", "instruction": "Add the numbers.", "input": "1 2 " * 20},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                  {"role": "user", "content": "Count to three."}]},
]  # fmt: skip


@pytest.fixture
def asked(tmp_path):
    """A file of prompts, and the words of a command that answers it."""
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    words = (
        "--checkpoint_dir",
        QUICKSTART,
        "--prompts",
        file,
        "--max_new_tokens",
        12,
        "--accelerator",
        "cpu",
    )
    return file, ("chat/generate.py", *words, "--prompt_style", "alpaca")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_record_gets_its_answer_in_its_place(asked, forked, tmp_path):
    file, words = asked
    out = tmp_path / "is/made/out.jsonl"
    said = forked.succeeds(*words, "--temperature", 0, "--out_path", out, cwd=tmp_path)
    assert said.startswith(f"3 answers to 3 prompts: {out} (")
    loaded = load(QUICKSTART)
    asker = Asker(loaded.tokenizer, STYLES["alpaca"])
    expected = []
    for prompt in read_prompts(str(file)):
        ids = asker.ids(prompt.conversation)
        got = list(Engine(loaded.model).generate(ids, Sampling(max_new_tokens=12), stop_ids=asker.stop_ids))
        finish = "length" if len(got) == 12 else "stop"
        found = {"answer": loaded.tokenizer.decode(got), "finish": finish, "tokens": len(got)}
        expected.append({**prompt.record, **found})
    assert lines(out) == expected
    assert "exists; name another" in forked.refuses(*words, "--out_path", out, cwd=tmp_path)
    refused = forked.refuses(*words, "--compile", "true", "--out_path", tmp_path / "o.jsonl", cwd=tmp_path)
    assert "--compile true: only a CUDA device" in refused


def test_what_was_stopped_goes_on_and_gives_the_same(asked, forked, tmp_path):
    file, words = asked
    words = (*words, "--n", 3, "--seed", 5, "--batch_size", 2)
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    forked.succeeds(*words, "--out_path", whole, cwd=tmp_path)
    first = lines(whole)
    assert [len(record["answer"]) for record in first] == [3, 3, 3]
    assert len(set(first[0]["answer"])) > 1, "each is drawn by itself"

    loaded, prompts = load(QUICKSTART), read_prompts(str(file))
    settings = parse(Generate, [*map(str, words[1:]), "--out_path", str(again)])
    identity = runpy.run_path(str(REPO / "chat/generate.py"))["identity"](
        settings, prompts, loaded.chain, None
    )
    engine = Engine(loaded.model, loaded.tokenizer, max_batch=2)
    asker = Asker(loaded.tokenizer, STYLES["alpaca"])
    work = plan(prompts, asker, Sampling.of(settings), 3, engine.context)
    begun = Partial(again, identity)
    computing = answers(engine, work, begun.done)
    begun.add(next(computing) for _ in range(4))
    computing.close()
    assert engine.num_running == 0
    with begun.file.open("a") as file:
        file.write('{"prompt": 0, "sam')  # half a line, as a crash leaves it
    refused = forked.refuses(*words, "--top_k", 7, "--out_path", again, cwd=tmp_path)
    assert "left by a run with other prompts, another model or other settings" in refused
    said = forked.succeeds(*words, "--out_path", again, cwd=tmp_path)
    assert said.startswith("4 of 9 answers are there already") and lines(again) == first
    assert not begun.file.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": ""}', "line 1: its prompt is empty"),
        ('{"question": "x"}', "must have one of messages, prompt and instruction; it has 'question'"),
        ('{"prompt": "x", "answer": "y"}', "has 'answer' already"),
        (r'{"prompt": "x", "kept": "\ud800"}', "'kept' cannot be written as JSON"),
        ('{"prompt": "x"}\n{"prompt": "x", "instruction": "y"}', "line 2: must have one of"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "ends with the assistant's message"),
        ('{"messages": [{"role": "user", "content": "x"}], "system": "y"}', "no place for tools or a system"),
        (json.dumps({"prompt": "fox " * 3000}), "the model's context holds 1024, the answer included"),
        ("{", "not valid JSON"),
        ("", "holds no record"),
    ],
)
def test_what_asks_nothing_is_named(asked, forked, tmp_path, text, message):
    file, words = asked
    file.write_text(text)
    assert message in forked.refuses(*words, "--out_path", "out.jsonl", cwd=tmp_path)


def test_answers_follow_a_json_schema(asked, forked, tmp_path):
    _, words = asked
    schema, out = tmp_path / "colour.json", tmp_path / "out.jsonl"
    schema.write_text('{"enum": ["red", "green"]}')
    forked.succeeds(*words, "--json_schema", schema, "--out_path", out, "--n", 2, cwd=tmp_path)
    found = [json.loads(answer) for record in lines(out) for answer in record["answer"]]
    assert len(found) == 6 and {*found} <= {"red", "green"}
    for text, reason in (
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"type": "colour"}', "the JSON schema cannot be used: Invalid type: colour"),
    ):
        schema.write_text(text)
        error = forked.refuses(
            *words, "--json_schema", schema, "--out_path", tmp_path / "o.jsonl", cwd=tmp_path
        )
        assert str(schema) in error and reason in error
