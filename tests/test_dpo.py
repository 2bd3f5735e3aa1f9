"""finetune/dpo.py, as a user runs it."""

import csv
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from conftest import QUICKSTART, REPO, AfterStep, extra_sinks

from litlora.cli import parse
from litlora.data.labelled import tokenize_labelled
from litlora.data.pairs import tokenize_pairs
from litlora.data.skipped import Skipped
from litlora.data.sources import read_dataset
from litlora.errors import DataError
from litlora.prompts import STYLES
from litlora.settings import Files, FinetuneDPO
from litlora.storage.tensors import open_torch
from litlora.tokenizer import Tokenizer

DPO = "finetune/dpo.py"
EXACT = ("--precision", "32-true", "--train.epochs", 9)


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Answers that the quickstart's sample has, and the answers to other questions."""
    from litlora.data.sources import SAMPLE_FILE

    records = [record for record in json.loads(SAMPLE_FILE.read_text())[:60] if not record["input"]]
    draw = random.Random(0)
    found = []
    for record in records:
        other = draw.choice([r["output"] for r in records if r["output"] != record["output"]])
        found.append({"prompt": record["instruction"], "chosen": record["output"], "rejected": other})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", found)


@pytest.fixture(scope="module")
def labelled(pairs):
    """The same answers, each with a label."""
    found = []
    for pair in map(json.loads, pairs.read_text().splitlines()):
        answers = ((pair["chosen"], True), (pair["rejected"], False))
        found += [{"prompt": pair["prompt"], "completion": text, "label": label} for text, label in answers]
    return write(pairs.with_name("labelled.jsonl"), found)


def rows(out):
    return [row for row in csv.DictReader((out / "metrics.csv").read_text().splitlines()) if row["loss"]]


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        pytest.param("dpo", (), id="dpo"),
        pytest.param("orpo", (), id="orpo"),
        *(pytest.param(name, (), id=name, marks=pytest.mark.slow) for name in ("ipo", "simpo")),
        pytest.param("dpo", ("--quantize", "nf4"), id="dpo-nf4", marks=pytest.mark.slow),
    ],
)
def test_it_learns_to_prefer_and_merges(loss, more, pairs, forked, tmp_path):
    words = ["--data", pairs, "--out_dir", tmp_path / "out", "--preference.loss", loss, *more, *EXACT]
    words += [
        "--train.max_steps",
        6,
        "--train.log_interval",
        1,
        "--train.learning_rate",
        1e-3,
        "--train.epochs",
        9,
    ]
    done = forked.run(DPO, *words, cwd=tmp_path)
    assert done["status"] == 0, done["stderr"]
    assert ("reference: computing" in done["stdout"]) == (loss in ("dpo", "ipo"))
    assert "the records are of the form preference" in done["stdout"] and "| accuracy " in done["stdout"]
    logged = rows(tmp_path / "out")
    assert float(logged[-1]["margin"]) > float(logged[0]["margin"])
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    if loss == "dpo":
        assert float(logged[0]["loss"]) == pytest.approx(0.693147, abs=1e-5)
    if loss != "dpo":
        return
    merged = ["--lora_path", tmp_path / "out/final/lit_model.pth", "--out_dir", tmp_path / "merged"]
    done = forked.run("scripts/merge_lora.py", *merged, cwd=tmp_path)
    assert done["status"] == 0 and "verified" in done["stdout"], done


def run_in_process(*words):
    import importlib.util

    spec = importlib.util.spec_from_file_location("finetune_dpo", REPO / DPO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(parse(FinetuneDPO, [str(word) for word in words]))


@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("--quantize", "nf4"), marks=pytest.mark.slow)],
    ids=["kto", "kto-nf4"],
)
def test_kto_learns_from_labels(more, labelled, forked, tmp_path):
    words = ["--data", labelled, "--out_dir", tmp_path / "out", "--preference.loss", "kto", *more, *EXACT]
    words += ["--train.max_steps", 8, "--train.log_interval", 1, "--train.learning_rate", 1e-3]
    said = forked.succeeds(DPO, *words, cwd=tmp_path)
    assert "the records are of the form labelled" in said and "| kl " in said
    logged = rows(tmp_path / "out")
    assert float(logged[0]["loss"]) == pytest.approx(0.5, abs=1e-5) and float(logged[0]["kl"]) == 0
    assert float(logged[-1]["margin"]) > 0 and float(logged[-1]["loss"]) < 0.5


@pytest.mark.slow
def test_two_devices_learn_by_kto_what_one_does(labelled, tmp_path):
    """In a subprocess each: the estimate of KL is over the examples of both."""
    words = [sys.executable, REPO / DPO, "--data", labelled, "--preference.loss", "kto", *EXACT]
    # By SGD, whose step is as small as the rounding of a gradient: Adam divides a gradient by its size,
    # and makes a whole step of the rounding of one near 0.
    words += ["--train.max_steps", 4, "--train.log_interval", 1, "--train.optimizer", "sgd"]
    words += ["--train.learning_rate", 0.3, "--train.max_grad_norm", 0, "--accelerator", "cpu"]
    for name, devices in (("one", 1), ("two", 2)):
        more = ["--devices", devices, "--out_dir", tmp_path / name]
        done = subprocess.run(map(str, words + more), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (open_torch(tmp_path / name / "final/lit_model.pth")["model"] for name in ("one", "two"))
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-7, rtol=1e-6)
    for first, second in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for figure in ("loss", "margin", "kl"):
            assert float(second[figure]) == pytest.approx(float(first[figure]), abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_dry_run_needs_no_reference(loss, pairs, forked, tmp_path):
    words = ["--data", pairs, "--out_dir", tmp_path / "out", "--preference.loss", loss, *EXACT]
    words += ["--train.max_steps", 1, "--train.auto_batch", "true"]
    assert "found by a dry run" in forked.succeeds(DPO, *words, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_chain_resumes_to_the_bit(loss, pairs, forked, tmp_path):
    """On an adapter: the reference is the model with that adapter, also after a resume."""
    sft = [
        "--data.source",
        "sample",
        "--train.max_steps",
        2,
        "--out_dir",
        tmp_path / "sft",
        "--precision",
        "32-true",
    ]
    assert forked.run("finetune/lora.py", *sft, cwd=tmp_path)["status"] == 0
    words = ["--checkpoint_dir", tmp_path / "sft/final", "--data", pairs, "--train.max_steps", 6]
    words += [*EXACT, "--lora.dropout", 0.1, "--train.log_interval", 2, "--preference.loss", loss]
    run_in_process(*words, "--out_dir", tmp_path / "expected")
    out = [*words, "--out_dir", tmp_path / "out", "--resume", "auto"]
    with extra_sinks(AfterStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM))), pytest.raises(SystemExit):
        run_in_process(*out)
    run_in_process(*out)
    one, two = ((tmp_path / name / "final/lit_model.pth").read_bytes() for name in ("expected", "out"))
    assert open_torch(tmp_path / "out/final/lit_model.pth")["litlora"]["base"]["path"].endswith("sft/final")
    assert len(one) == len(two)
    first, second = (
        open_torch(tmp_path / name / "final/lit_model.pth")["model"] for name in ("expected", "out")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def made(tmp_path, *records, style="plain", skipped=None):
    source = Files(path=str(write(tmp_path / "x.jsonl", records)), val_fraction=0.0)
    data = read_dataset(source, "pairs").conversations
    return tokenize_pairs(data, Tokenizer(QUICKSTART), STYLES[style], 64, skipped)


def learned(example):
    ids = [list(example.ids[start:stop]) for start, stop in example.learned]
    return [Tokenizer(QUICKSTART).decode(each) for each in ids]


USER, BETTER, WORSE = (
    {"role": "user", "content": "Say hi."},
    {"role": "assistant", "content": "Hi."},
    {"role": "assistant", "content": "No!"},
)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Say hi.", "chosen": "Hi.", "rejected": "No!"},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
    ],
    ids=["text", "messages", "prompt in both"],
)
def test_every_layout_is_the_same_pair(record, tmp_path):
    (pair,) = made(tmp_path, record).examples
    assert learned(pair.chosen) == ["Hi."] and learned(pair.rejected) == ["No!"]
    eos = Tokenizer(QUICKSTART).eos_id
    assert pair.chosen.ids[-1] == pair.rejected.ids[-1] == eos
    begin = pair.chosen.learned[0][0]
    assert begin > 0 and pair.chosen.ids[:begin] == pair.rejected.ids[:begin]


LABELLED = [
    {"prompt": "Say hi.", "completion": "Hi.", "label": True},
    {"prompt": [USER], "completion": [WORSE], "label": False},
    {"prompt": "Say hi.", "completion": "Hi.", "label": "TRUE"},
    {"prompt": "Say hi.", "completion": "No!", "label": 0},
]


def labelled_examples(file, *records):
    source = Files(path=str(write(file, records)), val_fraction=0.0)
    data = read_dataset(source, "labels").conversations
    return tokenize_labelled(data, Tokenizer(QUICKSTART), STYLES["plain"], 64)


def test_labels_are_as_pairs_taken_apart(tmp_path):
    pair = {"prompt": "Say hi.", "chosen": "Hi.", "rejected": "No!"}
    apart = labelled_examples(tmp_path / "pairs.jsonl", pair, pair).examples
    assert [example.is_desirable for example in apart] == [True, True, False, False]
    good, bad, *others = labelled_examples(tmp_path / "labelled.jsonl", *LABELLED).examples
    assert good == apart[0] and bad == apart[2] and others == [good, bad]
    assert learned(good.answer) == ["Hi."] and learned(bad.answer) == ["No!"]


def test_labelled_answers_that_do_not_fit_are_counted(tmp_path):
    long = {"prompt": "word " * 100, "completion": "a", "label": True}
    found = labelled_examples(tmp_path / "x.jsonl", long, LABELLED[0])
    assert len(found.examples) == 1 and found.num_left_out == 1
    with pytest.raises(DataError, match="no example is left"):
        labelled_examples(tmp_path / "y.jsonl", long)


def test_lora_refuses_labels_and_says_how_to_ignore_them(forked, tmp_path):
    write(tmp_path / "labelled.jsonl", LABELLED)
    words = ["--data", "labelled.jsonl", "--out_dir", tmp_path / "out"]
    said = forked.refuses("finetune/lora.py", *words, cwd=tmp_path)
    assert "labelled.jsonl, line 1: is of the form labelled" in said
    assert "--data.format prompt_completion --data.ignore '[label]'" in said


def test_of_two_texts_what_they_share_is_the_prompt(tmp_path):
    """As Anthropic's helpful-harmless data has them."""
    texts = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
    (pair,) = made(tmp_path, texts).examples
    (start, stop), ids = pair.chosen.learned[0], pair.chosen.ids
    assert ids[:start] == pair.rejected.ids[:start] and ids[start] != pair.rejected.ids[start]
    assert "hello".endswith(learned(pair.chosen)[0].strip()) and stop == len(ids)


def test_pairs_that_do_not_fit_are_counted_and_same_answers_refused(tmp_path):
    long = {"prompt": "word " * 100, "chosen": "a", "rejected": "b"}
    found = made(tmp_path, long, {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert len(found.examples) == 1 and found.num_left_out == 1
    same = {"prompt": "p", "chosen": "a", "rejected": "a"}
    with pytest.raises(DataError, match=r"x.jsonl, line 1: chosen and rejected are the same"):
        made(tmp_path, same)
    skipped = Skipped()
    found = made(tmp_path, same, {**same, "rejected": "b"}, skipped=skipped)
    assert len(found.examples) == 1 and skipped.number == 1
    assert "line 1: chosen and rejected are the same" in skipped.notices()[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--data: required"),
        (
            ["--data", "sft.jsonl"],
            "sft.jsonl, line 1: is of the form prompt_completion, one",
        ),
        (["--data", "pairs.jsonl", "--preference.beta", 0], "--preference.beta 0.0: must be a positive"),
        (
            ["--data", "pairs.jsonl", "--train.mask_prompt", "false"],
            "--train.mask_prompt false and --preference.loss dpo: a preference",
        ),
        (["--data", "pairs.jsonl", "--preference.loss", "rank"], "--preference.loss"),
        (["--data", "labelled.jsonl"], "good or bad: choose --preference.loss kto"),
        (
            ["--data", "sft.jsonl", "--preference.loss", "kto"],
            "without a label; --preference.loss kto",
        ),
        (
            ["--data", "odd.jsonl", "--preference.loss", "kto"],
            '"label" must be true, a good answer',
        ),
        (
            ["--data", "labelled.jsonl", "--preference.loss", "kto", "--train.global_batch_size", 1],
            "--train.global_batch_size 1: --preference.loss kto estimates",
        ),
        (
            ["--data", "pairs.jsonl", "--preference.gamma", 2],
            "--preference.gamma has no effect on --preference.loss dpo",
        ),
        (
            ["--data", "pairs.jsonl", "--preference.loss", "orpo", "--preference.label_smoothing", 0.1],
            "--preference.label_smoothing has no effect on --preference.loss orpo",
        ),
    ],
)
def test_mistakes_are_one_line(words, says, pairs, forked, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(pairs.read_text())
    write(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "b"}])
    write(tmp_path / "labelled.jsonl", LABELLED)
    write(tmp_path / "odd.jsonl", [{**LABELLED[0], "label": "good"}])
    assert says in forked.refuses(DPO, *words, cwd=tmp_path)
