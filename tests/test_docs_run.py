"""Every command of README.md and docs/ runs, in a directory that has what it names: shortened to two
steps of training, and with a new place for what it writes."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import REPO, random_adapter
from families import save_folder
from safetensors.torch import load_file, save_file
from test_docs import COMMANDS

from litlora.settings import LoRAConfig

ELSEWHERE = {
    "scripts/download.py": "tests/test_hub.py, against a hub of its own",
    "scripts/upload.py": "tests/test_upload.py, against a hub of its own",
    "Q4_K_M": "tests/formats/test_gguf_export.py, with llama.cpp",
    "--harness.tasks": "tests/evaluate/test_harness.py, on tasks of its own",
    "--log.to": "tests/report/test_loggers.py",
    "configs/": "tests/test_recipes.py",
    "--devices": "tests/train/test_many.py, with several processes",
    "chat/serve.py": "tests/serve/test_api.py, which ends it",
}
"""What runs in other tests: a word of the command, and where."""
RUN = [command for command in COMMANDS if not any(word in command for word in ELSEWHERE)]
QUICKSTART = "litlora/quickstart"
DIRECTORIES = {
    "dir": "run",
    "first": "one",
    "second": "two",
    "teacher_dir": f"checkpoints/{QUICKSTART}",
    "base": f"checkpoints/{QUICKSTART}",
    "tuned": "tuned",
    "repo_id": QUICKSTART,
    "finetuned_dir": "run",
}
"""What the variables stand for in what a command reads."""
SHORT = ["--train.max_steps", "2", "--train.global_batch_size", "2", "--data.max_examples", "12"]
TALK = [{"speaker": "CUSTOMER", "text": "1 + 2?"}, {"speaker": "AGENT", "text": "3"}]
RECORDS = {
    "records": {"instruction": "Add them.", "input": "1, 2", "output": "3"},
    "questions": {"question": "1 + 2?", "answer": "3"},
    "pairs": {"prompt": "1 + 2?", "chosen": "3", "rejected": "4"},
    "labelled": {"prompt": "1 + 2?", "completion": "3", "label": True},
    "talks": {"dialog": TALK},
    "choices": {"prompt": "1 + 2?", "choices": ["3", "4"], "answer": "A"},
}
FILES = {
    "records": (
        "my_records.jsonl",
        "more.json",
        "mine.jsonl",
        "my_validation.jsonl",
        "my_directory/a.jsonl",
        "heldout.jsonl",
        "qa.jsonl",
        "gsm8k.jsonl",
    ),
    "questions": ("my_questions.jsonl",),
    "pairs": ("my_pairs.jsonl", "pairs.jsonl"),
    "labelled": ("my_labelled.jsonl",),
    "talks": ("my_talks.jsonl",),
    "choices": ("choices.jsonl",),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, forked, tokenizer_dir) -> Path:
    """A directory with all that the commands name."""
    directory = tmp_path_factory.mktemp("docs")
    for name in (QUICKSTART, "EleutherAI/pythia-70m"):
        shutil.copytree(REPO / "checkpoints" / QUICKSTART, directory / "checkpoints" / name)
    qwen = directory / "checkpoints/Qwen/Qwen2.5-0.5B"
    save_folder("qwen2", qwen, vocab_size=400, max_position_embeddings=512)
    shutil.copytree(tokenizer_dir, qwen, dirs_exist_ok=True)
    write_data(directory)
    base = directory / "checkpoints" / QUICKSTART
    for seed, name in enumerate(("one/final", "two/final", "LORA")):
        random_adapter(directory / name, base, LoRAConfig(), seed=seed)
    words = ["finetune/lora.py", "--data", "my_records.jsonl", *SHORT]
    forked.succeeds(*words, "--out_dir", "run", cwd=directory)
    styled = ["--prompt_style", "chatml", "--tokenizer.add_tokens", "auto"]
    forked.succeeds(*words, *styled, "--out_dir", "styled", cwd=directory)
    shutil.copytree(directory / "run", directory / "out/lora/alpaca")
    for name in ("first", "second"):
        shutil.copytree(directory / "run", directory / "out" / name)
    words = ["scripts/merge_lora.py", "--lora_path", "run/final", "--out_dir", "tuned"]
    forked.succeeds(*words, cwd=directory)
    write_models(directory, forked)
    return directory


def write_data(directory: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    (directory / "my_directory").mkdir()
    for kind, names in FILES.items():
        for name in names:
            (directory / name).write_text("".join(json.dumps(RECORDS[kind]) + "\n" for _ in range(12)))
    (directory / "prompts.txt").write_text("1 + 2?\nAnd 2 + 1?\n")
    (directory / "tables").mkdir()
    table = pyarrow.Table.from_pylist([RECORDS["records"]] * 12)
    parquet.write_table(table, directory / "tables/a.parquet")
    csv.write_csv(table, directory / "my_validation.csv")


def write_models(directory: Path, forked) -> None:
    """base.safetensors, base/, tuned.safetensors, and LoRA files between them."""
    for source, name in ((f"checkpoints/{QUICKSTART}", "base"), ("tuned", "tuned-hf")):
        words = ["scripts/convert_lit_checkpoint.py", "--checkpoint_dir", source, "--out_dir", name]
        forked.succeeds(*words, cwd=directory)
    shutil.copyfile(directory / "base/model.safetensors", directory / "base.safetensors")
    shutil.copyfile(directory / "tuned-hf/model.safetensors", directory / "tuned.safetensors")
    weights = load_file(directory / "base.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight")).removesuffix(".weight")
    rows, columns = weights[f"{name}.weight"].shape
    factors = {
        f"{name}.lora_A.weight": weights[f"{name}.weight"][:2] * 0.1,
        f"{name}.lora_B.weight": weights[f"{name}.weight"].T[:2].T.contiguous() * 0.1,
    }
    assert factors[f"{name}.lora_A.weight"].shape == (2, columns) and rows == columns
    for file in ("lora", "a", "b"):
        save_file(factors, directory / f"{file}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, place, forked, tmp_path):
    environment, _, rest = command.partition("python ")
    assert not environment
    script, *words = shlex.split(rest)
    forked.succeeds(script, *shortened(script, written_to(tmp_path, words)), cwd=place)


def written_to(tmp_path: Path, words: list[str]) -> list[str]:
    """The words with directories that exist, or for what is written with new ones."""
    made = []
    for before, word in zip(["", *words], words, strict=False):
        if before in ("--out_dir", "--out_path", "--output", "--html"):
            word = str(tmp_path / "written" / Path(word).name.lstrip("$"))
        for name, directory in DIRECTORIES.items():
            with_system = name == "dir" and "--system" in words  # which not every prompt style has
            word = word.replace(f"${name}", "styled" if with_system else directory)
        made.append(word.replace("my_directory/*.parquet", "tables/*.parquet").replace("0-11", "0-1"))
    (tmp_path / "written").mkdir()
    return made


def shortened(script: str, words: list[str]) -> list[str]:
    """The words with what makes a command short, and repeatable where it writes to its own place."""
    if script.startswith("chat/") or script == "scripts/evaluate.py":
        return [*words, "--max_new_tokens", "4"]
    if script == "scripts/merge_lora.py":
        return [*words, "--overwrite"]
    if not script.startswith("finetune/") or "--resume" in words:
        return words
    offline = (
        ["--data.source", "sample"]
        if ["--data", "Alpaca"] in map(list, zip(words, words[1:], strict=False))
        else []
    )
    mixed = "--data.sources" in words
    return [*words, *offline, *(SHORT[:4] if mixed else SHORT), "--overwrite"]
