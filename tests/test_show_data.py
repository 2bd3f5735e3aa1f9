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
from litlora.train.preview import figures, histogram
from litlora.train.preview_text import marked

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
    words += ("--data.max_examples", 400)
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
    (repeats,) = [notice for notice in found["notices"] if "repeat others" in notice]
    assert "(--data.drop_duplicates true leaves them out)" in repeats and f"data: {repeats}" in run


def test_a_refusal_leads_to_the_settings_that_read_the_records(tmp_path, forked, show):
    turns = [{"speaker": "CUSTOMER", "text": "1 + 2?"}, {"speaker": "AGENT", "text": "3"}]
    data = write(tmp_path / "x.jsonl", *[{"dialog": turns}] * 2)
    words = ("--data", data, "--data.val_fraction", 0)
    refused = partial(forked.refuses, SHOW, cwd=tmp_path)
    columns = ("--data.columns", "{messages: dialog, role: speaker, content: text}")
    assert f"if \"dialog\" are its messages: {columns[0]} '{columns[1]}'\n" in refused(*words)
    assert "by another name: --data.roles '{CUSTOMER: ROLE}'\n" in refused(*words, *columns)
    roles = ("--data.roles", "{CUSTOMER: user, AGENT: assistant}")
    (tokens,) = show(*words, *columns, *roles)["conversations"][0]["examples"]
    assert "".join(t["text"] for t in tokens if t["learned"]) == "3<|endoftext|>"


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


PAIRS = (
    {"prompt": "What is 1 + 2?", "chosen": "3", "rejected": "It is four."},
    {"prompt": "Name a color.", "chosen": "Blue", "rejected": "Dog"},
    {"prompt": "Name a color.", "chosen": "word " * 60, "rejected": "No"},
)


PAIRS_FILE, LONG_PAIRS = "pairs.jsonl", "long.jsonl"


def texts(conversation, learned):
    """Of each example of a record, the tokens that are learned, or those that are not."""
    return ["".join(t["text"] for t in each if t["learned"] is learned) for each in conversation["examples"]]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_pairs_are_shown_as_dpo_sees_them(tmp_path, output, show, loss):
    data = write(tmp_path / "x.jsonl", *PAIRS)
    words = ("--data", data, "--data.val_fraction", 0, "--preference.loss", loss)
    words += ("--train.max_seq_length", 60, "--train.max_steps", 1, "--precision", "32-true")
    run = output("finetune/dpo.py", *words, "--out_dir", tmp_path / "out")
    found = show(*words)
    first, _, cut = found["conversations"]
    assert first["answers"] == (["chosen", "rejected"] if loss == "dpo" else ["good", "bad"])
    assert texts(first, True) == ["3<|endoftext|>", "It is four.<|endoftext|>"]
    prompts = texts(first, False)
    assert prompts[0] == prompts[1] and "What is 1 + 2?" in prompts[0]
    assert first["prompt"] == [sum(not t["learned"] for t in each) for each in first["examples"]]
    assert (first["cut"], cut["cut"], len(cut["examples"][0])) == (0, 1, 60)
    said = re.search(r"data: (\d+) examples to train on, 0 to validate; (\d+) tokens", run)
    train = found["train"]
    assert list(map(int, said.groups())) == [train["examples"], train["tokens"]]
    assert train["tokens"] == sum(len(each) for c in found["conversations"] for each in c["examples"])
    sides = train["answers"]
    assert [sides[name]["examples"] for name in first["answers"]] == [3, 3]
    assert sum(side["learned_tokens"] for side in sides.values()) == train["learned_tokens"]
    stored = show("--config", tmp_path / "out/hyperparameters.yaml")
    assert (stored["train"], stored["steps"]) == (train, found["steps"])


def test_labelled_answers_and_pairs_as_text(tmp_path, output):
    records = [{"prompt": "a", "completion": "yes", "label": True}]
    records += [{"prompt": "a", "completion": "oh no", "label": False}]
    data = write(tmp_path / "x.jsonl", *records)
    text = output(SHOW, "--data", data, "--data.val_fraction", 0, "--preference.loss", "kto")
    assert (
        "good" in text and "-- bad\n" in text and re.search(r"bad: 1 examples, \d+ tokens, \d+ learned", text)
    )
    pairs = write(tmp_path / "y.jsonl", *PAIRS)
    text = output(SHOW, "--data", pairs, "--data.val_fraction", 0, "--preference.loss", "simpo")
    assert re.search(r"-- rejected, after the same \d+ tokens\n\[\[It", text)
    assert "\n1 steps, 1 an epoch" in text  # of finetune/dpo.py's one epoch


def test_what_distillation_learns_is_shown(tmp_path, output, show):
    data = write(tmp_path / "x.jsonl", *[{"instruction": str(n), "output": "b"} for n in range(4)])
    words = ("--data", data, "--data.val_fraction", 0, "--precision", "32-true", "--train.max_steps", 1)
    run = output("finetune/distill.py", *words, "--teacher", QUICKSTART, "--out_dir", tmp_path / "out")
    found = show("--config", tmp_path / "out/hyperparameters.yaml")
    assert f"; {found['train']['tokens']} tokens" in run
    again = show(*words, "--teacher", QUICKSTART)
    assert (found["train"], found["steps"], found["conversations"]) == tuple(
        again[name] for name in ("train", "steps", "conversations")
    )
    assert "answers" not in found["train"] and len(found["conversations"]) == 3


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
        (["--teacher", "nowhere"], "nowhere"),
        (["--data", PAIRS_FILE], "scripts/show_data.py with preference.loss dpo shows them"),
        (["--preference.loss", "dpo"], "--data: required"),
        (
            ["--data", PAIRS_FILE, "--preference.loss", "dpo", "--train.mask_prompt", "false"],
            "--train.mask_prompt false and --preference.loss dpo: a preference is about answers alone",
        ),
        (["--data", PAIRS_FILE, "--preference.loss", "dop"], "--preference.loss"),
        (
            ["--data", LONG_PAIRS, "--preference.loss", "dpo", "--train.max_seq_length", 60],
            "are the same up to --train.max_seq_length, where they are cut",
        ),
        (["--data", "x.jsonl", "--exampels", 1], "no such option, did you mean --examples"),
    ],
)
def test_mistakes_are_one_line(tmp_path, forked, words, says):
    write(tmp_path / PAIRS_FILE, *PAIRS)
    write(tmp_path / LONG_PAIRS, {"prompt": "a", "chosen": "word " * 99 + "b", "rejected": "word " * 99})
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
