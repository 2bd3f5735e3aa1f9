"""finetune/distill.py, as a user runs it."""

import csv
import json
import shutil

import pytest
import torch
from conftest import QUICKSTART

from litlora.storage.tensors import open_torch

DISTILL = "finetune/distill.py"
SHORT = ("--data.max_examples", 40, "--train.global_batch_size", 8, "--precision", "32-true")


def adapter_at(file):
    return open_torch(file / "final/lit_model.pth")["model"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def teacher(forked, tmp_path):
    """The quickstart base, trained for a few steps: an adapter."""
    words = (*SHORT, "--train.max_steps", 4, "--seed", 5, "--out_dir", tmp_path / "teacher")
    forked.succeeds("finetune/lora.py", *words, cwd=tmp_path)
    return tmp_path / "teacher/final"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--quantize", "nf4", "--teacher_quantize", "int8")])
def test_it_learns_from_the_teacher_and_merges(more, teacher, forked, tmp_path):
    words = ("--teacher", teacher, *SHORT, "--train.epochs", 9, "--train.max_steps", 12, *more)
    words += ("--train.log_interval", 1, "--out_dir", tmp_path / "out")
    said = forked.succeeds(DISTILL, *words, cwd=tmp_path)
    assert f"teacher: asking {teacher} (" in said
    logged = list(csv.DictReader((tmp_path / "out/metrics.csv").read_text().splitlines()))
    kl = [float(row["kl"]) for row in logged if row["kl"]]
    assert kl[-1] < kl[0]
    merged = ("--lora_path", tmp_path / "out/final", "--out_dir", tmp_path / "merged")
    assert "verified" in forked.succeeds("scripts/merge_lora.py", *merged, cwd=tmp_path)


@pytest.mark.slow
def test_a_chain_resumes_to_the_bit_but_not_with_another_teacher(teacher, forked, tmp_path):
    start = ("--checkpoint_dir", teacher, "--teacher", QUICKSTART, *SHORT, "--lora.dropout", 0.1)
    start += ("--train.save_interval", 2, "--distill.weight", 0.5, "--train.max_steps", 4)
    forked.succeeds(DISTILL, *start, "--out_dir", tmp_path / "expected", cwd=tmp_path)
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "expected/step-000002", out / "step-000002")
    words = (*start, "--out_dir", out, "--resume", "auto")
    said = forked.refuses(DISTILL, *words, "--teacher", teacher, cwd=tmp_path)
    assert "teacher is " in said and "and was " in said
    forked.succeeds(DISTILL, *words, cwd=tmp_path)
    assert same(adapter_at(out), adapter_at(tmp_path / "expected"))


@pytest.mark.slow
def test_a_dry_run_needs_no_teacher(forked, tmp_path):
    words = ("--teacher", QUICKSTART, *SHORT, "--train.max_steps", 1, "--train.auto_batch", "true")
    words += ("--out_dir", tmp_path / "out")
    assert "found by a dry run" in forked.succeeds(DISTILL, *words, cwd=tmp_path)


def test_other_tokens_are_refused_with_the_first_difference(make_checkpoint, forked, tmp_path):
    one, two = make_checkpoint("one"), make_checkpoint("two")
    file = two / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    names = {number: name for name, number in vocab.items()}
    vocab[names[30]], vocab[names[31]] = 31, 30
    file.write_text(json.dumps(content))
    words = ("--checkpoint_dir", one, "--teacher", two, "--out_dir", "out")
    said = forked.refuses(DISTILL, *words, cwd=tmp_path)
    assert f"its token 30 is {names[31]!r}, and the student's is {names[30]!r}" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--teacher"),
        (("--teacher", "nowhere"), "nowhere"),
        (("--teacher", QUICKSTART, "--distill.top_k", 0), "--distill.top_k 0: must be at least 1"),
        (("--teacher", QUICKSTART, "--tokenizer.add_tokens", "auto"), "--teacher does not know new tokens"),
        (("--teacher", QUICKSTART, "--out_dir", QUICKSTART, "--overwrite", "true"), "quickstart"),
    ],
)
def test_mistakes_are_one_line(words, says, forked, tmp_path):
    assert says in forked.refuses(DISTILL, *words, cwd=tmp_path)


def test_data_that_stays_on_the_disk_is_refused(forked, tmp_path):
    record = json.dumps({"instruction": "a" * 500, "output": "b" * 600}) + "\n"
    (tmp_path / "big.jsonl").write_text(record * 16_000)
    words = ("--teacher", QUICKSTART, "--data", tmp_path / "big.jsonl")
    assert "set --data.cache false" in forked.refuses(DISTILL, *words, cwd=tmp_path)
