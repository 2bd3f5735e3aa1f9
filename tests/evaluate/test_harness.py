"""lm-evaluation-harness on a litlora model: the scores of its own hf model, and the command."""

import json

import pytest
import yaml
from conftest import fails, random_adapter, succeeds

from litlora.lora import LoRAConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its imports take seconds, and warn

ROWS = [
    {"question": f"The fox has {n} dogs; " + "how lazy " * (n % 6), "options": ["brown", "jumps over", "two"]}
    for n in range(12)
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": 1,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question * 9}}",  # longer than the context
    "metric_list": [{"metric": "word_perplexity"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{options[0]}}",
    "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def tasks(tmp_path):
    """A directory of three tasks, on records of their own."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, task in (("tiny_choice", CHOICE), ("tiny_rolling", ROLLING), ("tiny_generate", GENERATE)):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(directory / "rows.jsonl")}}
        task = {"task": name, **data, "test_split": "train", **task}
        (directory / f"{name}.yaml").write_text(yaml.dump(task))
    return directory


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def test_scores_are_those_of_the_harness_own_model(base, tasks, tmp_path, offline):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from litlora.evaluate.harness import HarnessModel
    from litlora.evaluate.subject import Subject
    from litlora.load import load
    from litlora.prompts import STYLES

    words = ("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", base, "--out_dir", tmp_path / "hf")
    succeeds(*words, cwd=tmp_path)
    loaded = load(base)
    subject = Subject(loaded.model.double(), loaded.tokenizer, STYLES["plain"], batch_tokens=300)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), dtype="float64", device="cpu", batch_size=4)
    found = []
    for model in (HarnessModel(subject), theirs):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        names = ["tiny_choice", "tiny_rolling", "tiny_generate"]
        found.append(simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0))
    ours, expected = found
    scores, wanted = (
        [
            value
            for task in names[:2]
            for sample in each["samples"][task]
            for response in sample["resps"]
            for value in (response[0] if isinstance(response[0], tuple) else response)
        ]
        for each in found
    )
    assert len(scores) == 12 * 3 * 2 + 12
    assert scores == pytest.approx(wanted, rel=1e-8, abs=1e-6)
    for mine, other in zip(
        ours["samples"]["tiny_generate"], expected["samples"]["tiny_generate"], strict=True
    ):
        assert mine["resps"] == other["resps"] and mine["resps"][0][0]
    for task, figures in expected["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-7), (task, name)


def test_the_command_runs_tasks_on_an_adapter(base, tasks, tmp_path):
    adapter = random_adapter(tmp_path / "run/final", base, LoRAConfig(rank=4))
    words = ["--harness.tasks", "[tiny_choice]", "--harness.include_path", tasks, "--harness.limit", 6]
    words = ["scripts/evaluate.py", "--checkpoint_dir", adapter, *words]
    environment = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    for live in ("true", "false"):
        succeeds(*words, "--live", live, cwd=tmp_path, **environment)
    live, merged = json.loads((adapter / "evaluation.json").read_text())["results"]
    assert live["measure"] == "harness/tiny_choice" and live["records"] == 6
    assert live["figures"] == pytest.approx(merged["figures"]) and "acc" in live["figures"]
    words[4] = "[tiny_choise]"
    said = fails(*words, cwd=tmp_path, **environment)  # after the harness's own tasks were read
    assert "tiny_choise: the harness has no such task; did you mean tiny_choice?" in said
