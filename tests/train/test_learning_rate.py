"""The learning rate that auto stands for, and words on what lies far from what was measured."""

import pytest
import yaml

from litlora.cli import parse
from litlora.settings import FinetuneDPO, FinetuneFull, FinetuneLoRA
from litlora.train.learning_rate import auto_rate, settle_learning_rate


def settled(kind, *words, hidden_size=4096):
    said = []
    found = settle_learning_rate(parse(kind, [str(word) for word in words]), hidden_size, said.append)
    return found.train.learning_rate, said


def test_the_rule_gives_the_published_rates():
    """5e-5 * 10 * (2000 / hidden)^0.781 of tinker-cookbook, worked out for Llama's sizes."""
    published = {2048: 4.9e-4, 3072: 3.6e-4, 4096: 2.9e-4, 8192: 1.7e-4}
    assert {size: auto_rate(size, 10) for size in published} == published
    assert auto_rate(2000, 1) == 5e-5 and auto_rate(2000, 10) == 5e-4
    assert auto_rate(192, 10) == auto_rate(800, 10) == 1e-3 and auto_rate(192, 1) == 1e-4


def test_it_is_that_of_the_method_and_says_why():
    rate, said = settled(FinetuneLoRA)
    assert rate == 2.9e-4
    assert said == ["learning rate: 0.00029 (auto: 10 · 5e-5 · (2000 / hidden size 4,096)^0.781)"]
    assert settled(FinetuneFull)[0] == 2.9e-5
    assert settled(FinetuneDPO, "--data", "x.jsonl")[0] == 8.6e-6
    small = settled(FinetuneLoRA, hidden_size=192)[1]
    assert small == ["learning rate: 0.001 (auto: 10 · 5e-5 · (2000 / hidden size 192, at least 800)^0.781)"]
    for rank in (1, 8, 256):
        assert settled(FinetuneLoRA, "--lora.rank", rank) == (rate, said)
    for schedule in ("constant", "wsd", "linear"):
        assert settled(FinetuneLoRA, "--train.schedule", schedule) == (rate, said)


def test_a_rate_that_is_given_wins_and_is_remarked_upon_only_where_it_is_far():
    for given in (3e-5, 1e-3, 2.8e-3):
        assert settled(FinetuneLoRA, "--train.learning_rate", given) == (given, [])
    for given in (2e-5, 0.01):
        rate, said = settled(FinetuneLoRA, "--train.learning_rate", given)
        assert rate == given
        assert said == [f"note: learning_rate {given:g} is far from 0.00029, which auto would take here"]


def test_without_a_rule_the_rate_is_the_one_of_before():
    for kind, before in ((FinetuneLoRA, 1e-3), (FinetuneFull, 1e-4)):
        rate, said = settled(kind, "--train.optimizer", "sgd")
        assert rate == pytest.approx(before)
        assert said == [f"learning rate: {before:g} (auto: no rule for sgd was measured; better name one)"]
    assert settled(FinetuneLoRA, "--train.optimizer", "lion", "--train.learning_rate", 0.5)[1] == []


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--lora.alpha", 256], "much"),
        (["--lora.alpha", 1], "little"),
        (["--lora.rank", 64, "--lora.alpha", 256, "--lora.rslora"], "much"),
        (["--lora.alpha", 64], None),
        (["--lora.rank", 1, "--lora.alpha", 16], None),
        (["--lora.rank", 256], None),
        (["--lora.rank", 64, "--lora.alpha", 128], None),
    ],
)
def test_a_scale_far_from_what_was_measured_is_remarked_upon(words, word):
    said = settled(FinetuneLoRA, *words)[1][1:]
    assert len(said) == (word is not None)
    assert all(f"so that a usual learning rate changes {word};" in line for line in said)


def test_it_is_stored_as_a_number_and_a_run_of_before_goes_on_with_its_own(run, tmp_path):
    """The default of earlier versions was 1e-3."""
    out = run("lora", tmp_path / "out", "--train.learning_rate", 1e-3, stop_after=2)
    run("lora", out, "--resume", "auto", stop_after=3)
    stored = yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert stored["train"]["learning_rate"] == 1e-3
    new = run("lora", tmp_path / "new", "--train.max_steps", 1)
    stored = yaml.safe_load((new / "hyperparameters.yaml").read_text())
    assert stored["train"]["learning_rate"] == auto_rate(32, 10) == 1e-3
