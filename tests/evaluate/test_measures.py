"""Loss, exact match and multiple choice, of a real model; and scripts/evaluate.py on them."""

import json
import math

import pytest
import torch
from conftest import QUICKSTART, random_adapter

from litlora.data.examples import tokenize
from litlora.data.sources import read_dataset
from litlora.errors import UserError
from litlora.evaluate.choices import read_choices
from litlora.evaluate.measures import measure_choice, measure_exact_match, measure_loss
from litlora.evaluate.subject import Subject
from litlora.load import load
from litlora.lora import LoRAConfig
from litlora.prompts import STYLES
from litlora.settings import JSON, TrainConfig
from litlora.train.objective import SFT
from litlora.train.parallel import Parallel
from litlora.train.validation import evaluate

QUESTIONS = [
    {"prompt": "The capital of Japan is", "choices": [" Tokyo.", " cheese.", " 17."], "answer": 0},
    {"prompt": "The plural of dog is", "choices": [" 3.", " dogs."], "answer": "B"},
    {"prompt": "Two plus two is", "choices": [" four.", " purple elephants."], "answer": " four."},
]


@pytest.fixture
def subject(base):
    loaded = load(base)
    return Subject(loaded.model, loaded.tokenizer, STYLES["alpaca"], batch_tokens=150)


def records(path):
    return list(read_dataset(JSON(path=str(path))).conversations)


def test_the_loss_is_that_of_training_and_of_plain_torch(subject, alpaca_file):
    found = measure_loss(subject, records(alpaca_file))
    made = tokenize(records(alpaca_file), subject.tokenizer, subject.style, subject.context)
    parallel = Parallel(torch.device("cpu"), 1, 1, "auto")
    trained = evaluate(parallel, SFT(subject.model), made.examples, TrainConfig())
    total = count = 0
    for example in made.examples:
        ids = torch.tensor(example.ids.tolist())
        log_probs = subject.model(ids[None])[0].double().log_softmax(-1)
        for start, stop in example.learned_spans():
            total -= log_probs[start - 1 : stop - 1].gather(1, ids[start:stop, None]).sum().item()
            count += stop - start
    assert found.figures["loss"] == pytest.approx(trained, rel=1e-6)
    assert found.figures["loss"] == pytest.approx(total / count, rel=1e-6)
    assert found.figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (found.records, found.figures["tokens"]) == (40, count)


class Told(Subject):
    """Says what it is told to."""

    def __init__(self, subject, *answers):
        super().__init__(subject.model, subject.tokenizer, subject.style)
        object.__setattr__(self, "said", answers)

    def answers(self, prompts, max_new_tokens):
        assert len(prompts) == len(self.said)
        return [*self.said]


def test_exact_match_compares_what_chat_would_answer(subject, alpaca_file):
    said = {3: "  3 \n3  3 3 ", 4: "so 4: ANSWER 7 or ANSWER 12"}
    conversations = records(alpaca_file)[3:6]
    found = measure_exact_match(Told(subject, said[3], said[4], "wrong"), conversations)
    assert found.figures["exact_match"] == pytest.approx(1 / 3) and found.records == 3
    assert [wrong["answer"] for wrong in found.wrong] == [said[4], "wrong"]
    told = Told(subject, "ANSWER 1 ANSWER 3 3 3 3", said[4], "nothing")
    found = measure_exact_match(told, conversations, pattern=r"ANSWER ([\d ]+)")
    assert found.figures["exact_match"] == pytest.approx(1 / 3)
    assert found.figures["without_match"] == pytest.approx(1 / 3)


def test_choices_are_scored_as_whole_answers(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    loaded = load(QUICKSTART)
    subject = Subject(loaded.model, loaded.tokenizer, STYLES["plain"])
    questions = read_choices(JSON(path=str(tmp_path / "q.jsonl")))
    assert [question.right for question in questions] == [0, 1, 0]
    found = measure_choice(subject, questions)
    best = []
    for question in questions:
        scores = []
        for text in question.texts:
            prompt = loaded.tokenizer.encode(question.conversations[0].messages[0].content, begin=True)
            whole = [
                *loaded.tokenizer.encode(question.conversations[0].messages[0].content + text, begin=True)
            ]
            ids = torch.tensor([*whole, loaded.tokenizer.eos_id])
            assert whole[: len(prompt)] == prompt
            log_probs = loaded.model(ids[None])[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])
            scores.append(log_probs[len(prompt) - 1 :].sum().item())
        best.append(scores.index(max(scores)) == question.right)
    assert found.figures["accuracy"] == pytest.approx(sum(best) / 3)
    assert found.records == 3 and len(found.wrong) == best.count(False)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "choices": ["b", "c"]}, 'line 1: has no "answer"'),
        ({**QUESTIONS[0], "answer": 3}, "its letter from A to C, or its number from 0 to 2, not '3'"),
        ({**QUESTIONS[0], "answer": True}, "not 'True'"),
        ({**QUESTIONS[0], "choices": ["b"]}, '"choices" must be a list of at least two'),
        ({**QUESTIONS[0], "hint": "x"}, 'a field that training would not use: "hint"'),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(record, says, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    with pytest.raises(UserError) as raised:
        read_choices(JSON(path=str(tmp_path / "q.jsonl")))
    assert says in str(raised.value)


def test_the_command_measures_adapters_live_and_merged(base, alpaca_file, tmp_path, forked):
    run = tmp_path / "run"
    adapter = random_adapter(run / "final", base, LoRAConfig(rank=4))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    words = ["scripts/evaluate.py", "--checkpoint_dir", adapter, "--data"]
    said = forked.succeeds(*words, alpaca_file, "--live", "true", cwd=tmp_path)
    assert "adapter live" in said and "perplexity" in said
    forked.succeeds(*words, alpaca_file, "--live", "false", cwd=tmp_path)
    exact = ["--measure", "exact_match", "--max_new_tokens", 2, "--data.max_examples", 3]
    said = forked.succeeds(*words, alpaca_file, *exact, cwd=tmp_path)
    assert "exact_match, wrong: " in said
    forked.succeeds(*words, tmp_path / "q.jsonl", "--measure", "choice", cwd=tmp_path)
    stored = json.loads((adapter / "evaluation.json").read_text())["results"]
    assert [result["measure"] for result in stored] == ["loss", "loss", "exact_match", "choice"]
    live, merged = stored[:2]
    assert live["how"]["adapter"] == "adapter live" and merged["how"]["adapter"] == "adapter merged"
    assert live["figures"]["loss"] == pytest.approx(merged["figures"]["loss"], rel=1e-5)
    forked.succeeds(*words, tmp_path / "q.jsonl", "--measure", "choice", cwd=tmp_path)
    assert len(json.loads((adapter / "evaluation.json").read_text())["results"]) == 4, "one was replaced"


def test_mistakes_are_one_line_and_change_nothing(base, alpaca_file, tmp_path, forked):
    (tmp_path / "other.json").write_text('{"mine": 1}')
    words = ["scripts/evaluate.py", "--checkpoint_dir", base, "--data", alpaca_file]
    for more, says in [
        (["--measure", "bleu"], "--measure bleu: no such measure; there are loss, exact_match, choice"),
        (["--pattern", "x"], "--pattern: finds the answer"),
        (["--measure", "exact_match", "--pattern", "("], "--pattern (: not a regular expression"),
        (["--measure", "choice"], 'record 0: has no "prompt"'),
        (["--output", tmp_path / "other.json"], "does not hold results of an evaluation; move it away"),
        (["--harness.limit", 3], "--harness.tasks is empty"),
        (["--batch_tokens", 0], "--batch_tokens 0: must be at least 1"),
    ]:
        assert says in forked.refuses(*words, *more, cwd=tmp_path)
