"""scripts/show_data.py: what it shows is what training takes."""

import json
import re
from array import array
from functools import partial

import pytest
from conftest import QUICKSTART

from litlora.console import say_marked
from litlora.data.examples import Example
from litlora.tokenizer import Tokenizer
from litlora.train.preview import figures, histogram, marked

SHOW = "scripts/show_data.py"


@pytest.fixture
def output(forked, tmp_path):
    """What a command prints."""
    return partial(forked.succeeds, cwd=tmp_path)


@pytest.fixture
def show(output):
    return lambda *words: json.loads(output(SHOW, "--json", *words))


def write(file, *records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_figures_are_those_of_the_run(tmp_path, output, show):
    """The same options to both commands."""
    words = ("--train.max_steps", 1, "--train.max_seq_length", 50, "--precision", "32-true")
    run = output("finetune/lora.py", *words, "--out_dir", tmp_path / "out")
    found = show(*words)
    said = re.search(r"data: ([\d,]+) examples to train on, ([\d,]+) to validate; ([\d,]+) tokens", run)
    numbers = [int(number.replace(",", "")) for number in said.groups()]
    assert numbers == [found["train"]["examples"], found["val"]["examples"], found["train"]["tokens"]]
    assert all(f"data: {notice}" in run for notice in found["notices"])
    assert any("were cut" in notice for notice in found["notices"])
    assert found["steps"]["steps"] == 1
    stored = show("--config", tmp_path / "out/hyperparameters.yaml")
    assert stored["train"] == found["train"] and stored["steps"] == found["steps"]


def test_tokens_that_a_run_adds_are_shown_as_such(tmp_path, output, show):
    data = write(tmp_path / "x.jsonl", *[{"instruction": "a", "output": "b"}] * 2)
    words = ("--data", data, "--data.val_fraction", 0, "--prompt_style", "chatml")
    words += ("--tokenizer.add_tokens", "auto", "--train.max_steps", 1, "--precision", "32-true")
    run = output("finetune/lora.py", *words, "--out_dir", tmp_path / "out")
    found = show(*words)
    assert re.search(r" 0 to validate; (\d+) tokens", run).group(1) == str(found["train"]["tokens"])
    assert found["notices"][0] == "tokenizer: added <|im_start|> (2048), <|im_end|> (2049)" in run
    ((tokens,),) = [conversation["examples"] for conversation in found["conversations"][:1]]
    assert (tokens[0]["id"], tokens[0]["text"]) == (2048, "<|im_start|>")
    assert [(t["id"], t["text"]) for t in tokens if t["learned"]][-1] == (2049, "<|im_end|>")
    assert not any("into pieces" in notice for notice in found["notices"])


def test_tokens_and_their_marks(tmp_path, output, show):
    """An answer in Chinese, whose characters are spread over tokens."""
    record = {"instruction": "Say \u4f60\u597d \U0001f600.", "output": "\u4f60\u597d \U0001f600"}
    data = write(tmp_path / "x.jsonl", record, {"instruction": "a", "output": ""})
    found = show("--data", data, "--data.val_fraction", 0)
    first, second = found["conversations"]
    assert first["place"].endswith("x.jsonl, line 1")
    (tokens,) = first["examples"]
    assert "".join(t["text"] for t in tokens if t["learned"]) == record["output"] + "<|endoftext|>"
    assert f"### Instruction:\n{record['instruction']}\n" in "".join(t["text"] for t in tokens)
    tokenizer = Tokenizer(QUICKSTART)
    assert tokenizer.decode([t["id"] for t in tokens if t["learned"]]) == record["output"]
    assert [t["text"] for t in second["examples"][0] if t["learned"]] == ["<|endoftext|>"]
    text = output(SHOW, "--data", data, "--data.val_fraction", 0)
    assert re.search(r"\[\[[^\[]+<\|endoftext\|>\]\]", text).group().replace("|", "") in (
        f"[[{record['output']}<endoftext>]]"
    )
    assert "2 examples to train on" in text and "answers are empty" in text


def test_prompts_that_are_learned_too_are_marked(tmp_path, show):
    data = write(
        tmp_path / "x.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}
    )
    (tokens,) = show("--data", data, "--train.mask_prompt", "false")["conversations"][0]["examples"]
    assert [t["learned"] for t in tokens] == [False] + [True] * (len(tokens) - 1)


def test_duplicates_and_what_is_left_out(tmp_path, show):
    long = {"instruction": "word " * 400, "output": "b"}
    record = {"instruction": "a", "output": "b"}
    data = write(tmp_path / "x.jsonl", long, record, record, record)
    found = show("--data", data, "--data.val_fraction", 0, "--train.max_seq_length", 100)
    assert found["train"]["examples"] == 3 and found["train"]["duplicates"] == 2
    assert "no example is left" in found["conversations"][0]["left_out"]
    assert any("1 examples left out" in notice for notice in found["notices"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--examples", -1], "--examples -1: must be at least 0"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--tokenizer.add_tokens", "auto"], "--tokenizer.add_tokens auto: the prompt style alpaca has no"),
        (["--checkpoint_dir", "nowhere"], "nowhere"),
        (["--data", "x.jsonl", "--exampels", 1], "no such option, did you mean --examples"),
    ],
)
def test_mistakes_are_one_line(tmp_path, forked, words, says):
    assert says in forked.refuses(SHOW, *words, cwd=tmp_path)


def test_nothing_is_written(tmp_path, output):
    output(SHOW, "--out_dir", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_histogram_counts_every_length_once():
    for lengths in ([7], [1, 9], list(range(3, 100)), [5] * 10 + [2000]):
        bars = histogram(lengths)
        assert len(bars) <= 8
        counts = [sum(bar["from"] <= length <= bar["to"] for length in lengths) for bar in bars]
        assert counts == [bar["examples"] for bar in bars] and sum(counts) == len(lengths)
        assert (bars[0]["from"], bars[-1]["to"]) == (min(lengths), max(lengths))
    assert histogram([]) == []


def test_figures_of_spans():
    examples = [Example(array("i", [1, 2, 3, 4]), ((1, 2), (3, 4))), Example(array("i", [5, 6]), ())]
    found = figures(examples, True)
    assert (found["tokens"], found["learned_tokens"], found["nothing_learned"]) == (6, 2, 1)


def test_the_middle_of_a_long_example_is_left_out():
    tokens = [{"id": 0, "text": str(index), "learned": index > 10} for index in range(4000)]
    text = "".join(text for text, _ in marked(tokens))
    assert text.startswith("0|1|2|") and text.endswith("|3998|3999")
    assert " ... 2,500 tokens ... " in text and "|2000|" not in text


def test_what_could_steer_a_terminal_is_not_printed(capsys):
    say_marked([("a\x1b[2J", False), ("b\u202e", True)])
    assert capsys.readouterr().out == "a[2J[[b]]\n"
