"""The quickstart's promises: statements only in the base, whole entities held out, everything
reproducible and small."""

import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, succeeds

from litlora.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
build_quickstart = importlib.import_module("build_quickstart")
quickstart_facts = importlib.import_module("quickstart_facts")


@pytest.fixture(scope="module")
def facts() -> quickstart_facts.Facts:
    return quickstart_facts.Facts()


@pytest.fixture(scope="module")
def train_records() -> list[dict[str, str]]:
    return json.loads(build_quickstart.SAMPLE_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def heldout_records() -> list[dict[str, str]]:
    return json.loads(build_quickstart.HELDOUT_FILE.read_text(encoding="utf-8"))


def test_same_seed_writes_the_committed_samples(facts):
    train, heldout = build_quickstart.make_samples(facts)
    assert build_quickstart.sample_text(train) == build_quickstart.SAMPLE_FILE.read_text(encoding="utf-8")
    assert build_quickstart.sample_text(heldout) == build_quickstart.HELDOUT_FILE.read_text(encoding="utf-8")


def test_records_are_alpaca_records(train_records, heldout_records):
    for record in train_records + heldout_records:
        assert set(record) == {"instruction", "input", "output"}
        assert all(isinstance(value, str) for value in record.values())
        assert record["instruction"] and record["output"]
        assert "{" not in "".join(record.values())


def test_training_sample_asks_nothing_about_a_heldout_entity(facts, train_records):
    held = build_quickstart.heldout_entities(facts)
    forbidden = {
        (record["instruction"], record["input"])
        for fact in facts.all
        if fact.entity in held
        for wording in quickstart_facts.INSTRUCTIONS.get(fact.relation, [])
        for record in [quickstart_facts.record(fact, *wording)]
    }
    asked = {(record["instruction"], record["input"]) for record in train_records}
    assert not forbidden & asked


def test_heldout_countries_are_nowhere_in_the_training_sample(facts, train_records):
    held = build_quickstart.heldout_entities(facts)
    names = {
        name
        for fact in facts.all
        if fact.entity in held and fact.relation == "capital"
        for name in (fact.x, fact.y)
    }
    assert {"France", "Paris"} <= names
    text = "\n".join("\n".join(record.values()) for record in train_records)
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]


def test_heldout_words_are_never_asked_for(facts, train_records):
    held = build_quickstart.heldout_entities(facts)
    word_facts = [fact for fact in facts.all if fact.relation in ("plural", "singular", "past", "spelling")]
    words = {fact.x for fact in word_facts if fact.entity in held}
    assert {"mouse", "mice"} <= words
    assert not words & {record["input"] for record in train_records}
    questions = [
        record["instruction"]
        for record in train_records
        if not record["input"] and "What sound" not in record["instruction"]
    ]
    subjects = {re.sub(r".* ", "", question.rstrip("?.")) for question in questions}
    assert not words & subjects


def test_heldout_sums_are_held_out_in_both_orders(facts, train_records):
    held = build_quickstart.heldout_entities(facts)
    pairs = {tuple(entity.split()[1:]) for entity in held if entity.startswith("pair")}
    assert ("7", "8") in pairs
    for record in train_records:
        numbers = re.findall(r"\d+", record["instruction"] + " " + record["input"])
        if len(numbers) == 2:
            assert tuple(sorted(numbers, key=int)) not in pairs, record


def test_heldout_answers_stand_in_no_training_record(train_records, heldout_records):
    asked = {(record["instruction"], record["input"]) for record in train_records}
    assert not [record for record in heldout_records if (record["instruction"], record["input"]) in asked]


def test_base_reads_every_fact_in_every_wording(facts):
    rng = random.Random(0)
    for fact in facts.all:
        wordings = quickstart_facts.STATEMENTS[fact.relation]
        assert len(wordings) >= 5
        for wording in wordings:
            text = quickstart_facts.statement(fact, rng, wording).lower()
            assert all(
                word.lower() in text for word in (fact.y, *(fact.extra.get(name, fact.x) for name in "ab"))
            )


def test_facts_are_drawn_with_no_entity_left_out(facts):
    assert min(facts.weights) > 0 and min(facts.relation_weights) > 0


def test_base_reads_statements_only(facts):
    rng = random.Random(0)
    for _ in range(5_000):
        text = facts.document(rng)
        assert "?" not in text and "### " not in text and "Below is an instruction" not in text


def test_no_two_facts_contradict(facts):
    answers: dict[tuple[str, str], str] = {}
    for fact in facts.all:
        assert answers.setdefault((fact.relation, fact.x), fact.y) == fact.y


def test_quickstart_checkpoint_is_small():
    files = [path for path in build_quickstart.CHECKPOINT_DIR.rglob("*") if path.is_file()]
    assert {"lit_model.pth", "model_config.yaml", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 8_000_000


@pytest.mark.slow
def test_the_base_is_built_and_answers(tmp_path):
    words = ["--checkpoint_dir", str(tmp_path / "base"), "--steps", "2", "--threads", "1"]
    subprocess.run([sys.executable, str(REPO / "scripts/build_quickstart.py"), *words], check=True)
    model = open_checkpoint(tmp_path / "base")
    assert model.tensors.keys() == open_checkpoint(build_quickstart.CHECKPOINT_DIR).tensors.keys()
    tokenizer = (tmp_path / "base/tokenizer.json").read_bytes()
    assert tokenizer == (build_quickstart.CHECKPOINT_DIR / "tokenizer.json").read_bytes()
    succeeds("chat/base.py", "--checkpoint_dir", tmp_path / "base", "--prompt", "Hi", "--max_new_tokens", 2)
