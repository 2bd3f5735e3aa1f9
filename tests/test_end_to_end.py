"""The real command lines, as a user types them, on the committed quickstart base."""

import csv
import json
import os
import pickle
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import QUICKSTART, REPO, SHARED, command, fails, succeeds

from litlora.checkpoint import open_checkpoint

SHORT = ["--train.max_steps", 12, "--train.save_interval", 5, "--train.log_interval", 4]


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """One short LoRA run with the sample; what it printed, and its directory."""
    out = tmp_path_factory.mktemp("runs") / "my lora"
    done = succeeds(
        *("finetune/lora.py", "--data", "Alpaca", "--data.source", "sample"),
        *("--data.max_examples", 300, "--out_dir", out, *SHORT),
    )
    return done.stdout, out


def test_a_run_leaves_what_it_promises(adapter):
    printed, out = adapter
    assert {path.name for path in out.iterdir()} == {
        "final",
        "step-000005",
        "step-000010",
        "hyperparameters.yaml",
        "metrics.csv",
        "report.html",
    }
    for directory in (out / "final", out / "step-000010"):
        beside = {"model_config.yaml", "tokenizer.json", "prompt_style.yaml", "hyperparameters.yaml"}
        assert {path.name for path in directory.iterdir()} >= {"lit_model.pth", *beside}
    size = (out / "final/lit_model.pth").stat().st_size
    assert size < 0.1 * (QUICKSTART / "lit_model.pth").stat().st_size, "an adapter holds the adapter only"
    closing = printed.splitlines()[-5:]
    assert "tokens/s" in closing[0] and "validation loss" in closing[0]
    assert closing[1] == "trained on: the built-in sample"
    assert closing[2] == f"result: {out / 'final/lit_model.pth'} ({size:,} bytes: the adapter only)"
    assert closing[3] == f"report: {out / 'report.html'}"
    assert closing[4] == f"next: python chat/base.py --checkpoint_dir '{out / 'final'}'", (
        "as a shell needs it"
    )
    assert printed.count("the built-in sample") >= 2
    settings = yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert settings["data"]["init_args"]["source"] == "sample"
    assert "# data: the built-in sample" in (out / "hyperparameters.yaml").read_text()
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "4", "8", "12"]
    assert float(rows[0]["learning_rate"]) > 0
    assert float(rows[-2]["loss"]) < float(rows[0]["loss"])


def test_the_stored_configuration_repeats_the_run(adapter, tmp_path):
    _, out = adapter
    succeeds("finetune/lora.py", "--config", out / "hyperparameters.yaml", "--out_dir", tmp_path / "again")
    ours, theirs = (
        torch.load(d / "final/lit_model.pth", weights_only=True)["model"] for d in (out, tmp_path / "again")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_the_second_round(adapter, tmp_path):
    """Adapter -> second adapter on it -> chat -> merge -> full fine-tune of the merge -> chat."""
    _, first = adapter
    ask = ["--prompt", "What is the capital of Japan?", "--temperature", 0, "--max_new_tokens", 12]
    second = ["--checkpoint_dir", first / "final", "--out_dir", tmp_path / "second"]
    succeeds("finetune/lora.py", *second, "--lora.targets", "qv", *SHORT)
    chained = succeeds("chat/base.py", "--checkpoint_dir", tmp_path / "second/final", *ask).stdout
    merge = [
        "--checkpoint_dir",
        QUICKSTART,
        "--lora_path",
        tmp_path / "second/final/lit_model.pth",
        "--out_dir",
        tmp_path / "merged",
    ]
    assert (
        f"next: python chat/base.py --checkpoint_dir {tmp_path / 'merged'}"
        in succeeds("scripts/merge_lora.py", *merge).stdout
    )
    assert succeeds("chat/base.py", "--checkpoint_dir", tmp_path / "merged", *ask).stdout == chained, (
        "the merge must be what was tested"
    )

    base, merged = open_checkpoint(QUICKSTART), open_checkpoint(tmp_path / "merged")
    assert {n: (t.shape, t.dtype) for n, t in merged.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in base.tensors.items()
    }
    assert (tmp_path / "merged/prompt_style.yaml").is_file() and (
        tmp_path / "merged/tokenizer.json"
    ).is_file()

    before = contents(tmp_path / "merged")
    assert "already holds" in fails("scripts/merge_lora.py", *merge)
    assert contents(tmp_path / "merged") == before
    succeeds("scripts/merge_lora.py", *merge, "--overwrite")
    assert contents(tmp_path / "merged") == before

    done = succeeds(
        "finetune/full.py", "--checkpoint_dir", tmp_path / "merged", "--out_dir", tmp_path / "full", *SHORT
    )
    assert "the full model" in done.stdout
    full = open_checkpoint(tmp_path / "full/final")
    assert full.kind == "full" and full.tensors.keys() == base.tensors.keys()
    assert all(not torch.equal(full.tensors[name], merged.tensors[name]) for name in merged.tensors)
    assert contents(tmp_path / "merged") == before, "training must not touch its base"
    succeeds("chat/base.py", "--checkpoint_dir", tmp_path / "full/final", *ask)
    third = ["--checkpoint_dir", tmp_path / "full/final", "--out_dir", tmp_path / "third"]
    succeeds("finetune/lora.py", *third, "--train.max_steps", 1)


def test_a_full_run_on_an_adapter_merges_it_first(adapter, tmp_path):
    _, first = adapter
    succeeds(
        "finetune/full.py",
        "--checkpoint_dir",
        first / "final",
        "--out_dir",
        tmp_path / "full",
        "--train.max_steps",
        1,
        "--data.max_examples",
        100,
    )
    assert open_checkpoint(tmp_path / "full/final").kind == "full"


def test_ones_own_data_and_the_real_tokenizer(tmp_path):
    """Real records of which many are cut, in another directory's terms: everything is where it was
    asked for."""
    data = SHARED / "data/alpaca_zh_demo.json"
    if not data.is_file():
        pytest.skip(f"{data} is not at hand")
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(r) for r in json.loads(data.read_text())[:60]))
    done = succeeds(
        "finetune/lora.py", "--data", "JSON", "--data.path", tmp_path / "mine.jsonl",
        "--out_dir", tmp_path / "out", "--checkpoint_dir", QUICKSTART,
        "--train.max_seq_length", 200, "--train.max_steps", 2,
    )  # fmt: skip
    assert re.search(
        r"data: \d+ examples are longer than 200 tokens: their answers were cut, each keeps its end-of-text",
        done.stdout,
    )
    assert re.search(r"data: \d+ examples left out: their prompts alone fill 200 tokens", done.stdout)


@pytest.mark.slow
def test_two_devices_learn_what_one_does(adapter, tmp_path):
    _, one = adapter
    done = succeeds(
        "finetune/lora.py",
        "--devices",
        2,
        "--accelerator",
        "cpu",
        "--out_dir",
        tmp_path / "two",
        *SHORT,
        OMP_NUM_THREADS="1",
    )
    assert done.stdout.count("result: ") == 1
    ours, theirs = (
        torch.load(d / "final/lit_model.pth", weights_only=True)["model"] for d in (one, tmp_path / "two")
    )
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-4, rtol=2e-2)


# ---- chat


def test_chat_survives_empty_lines_long_questions_and_the_end_of_its_input(adapter):
    _, first = adapter
    typed = "\n   \nHi\n" + "word " * 3000 + "\nHi\n"
    done = succeeds("chat/base.py", "--checkpoint_dir", first / "final", "--max_new_tokens", 4, input=typed)
    assert "prompt style alpaca (the model was trained with it)" in done.stdout
    assert "context holds" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count(">>> ") == 6


def test_chat_says_when_a_model_was_taught_nothing():
    done = succeeds("chat/base.py", "--checkpoint_dir", QUICKSTART, input="")
    assert "prompt style plain (the model names none)" in done.stdout


def test_chat_refuses_what_it_cannot_answer(adapter):
    _, first = adapter
    assert "is empty" in fails("chat/base.py", "--checkpoint_dir", first / "final", "--prompt", " ")
    assert "context holds" in fails(
        "chat/base.py", "--checkpoint_dir", first / "final", "--prompt", "word " * 3000
    )
    assert f"did you mean {first / 'final'}?" in fails("chat/base.py", "--checkpoint_dir", first)


def test_ctrl_c_stops_the_answer_and_not_the_program(make_checkpoint):
    """On a real terminal: an answer that does not end by itself, Ctrl-C, Ctrl-C at the prompt,
    Ctrl-D."""
    endless = make_checkpoint("endless", max_position_embeddings=100_000)
    main, terminal = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, str(REPO / "chat/base.py"), "--checkpoint_dir", str(endless),
         "--max_new_tokens", "90000", "--temperature", "0.05", "--seed", "0"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=REPO,
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"},
    )  # fmt: skip
    os.close(terminal)
    seen, editing, edited = "", "\x1b[?2004h", "\x1b[?2004l"  # the line editor begins, ends

    def wait_for(text, count=1):
        nonlocal seen
        deadline = time.monotonic() + 60
        while seen.count(text) < count:
            assert time.monotonic() < deadline, seen[-2000:]
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 4096).decode(errors="replace")

    try:
        wait_for(editing)
        os.write(main, b"Tell me a very long story.\r")
        wait_for(edited)
        length = len(seen)
        while len(seen) < length + 20:
            wait_for("", len(seen) + 2)  # at least one more character
        chat.send_signal(signal.SIGINT)
        wait_for("(stopped)")
        for _ in range(200):  # one that comes between two questions does nothing
            chat.send_signal(signal.SIGINT)
            if select.select([main], [], [], 0.05)[0]:
                seen += os.read(main, 4096).decode(errors="replace")
            if "(Ctrl-D ends)" in seen:
                break
        for _ in range(60):  # until the line is being read
            os.write(main, b"\x04")
            try:
                assert chat.wait(1) == 0
                break
            except subprocess.TimeoutExpired:
                continue
        assert chat.returncode == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(main)


# ---- bad input: one line, status 2, nothing lost


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "script", ["finetune/lora.py", pytest.param("finetune/full.py", marks=pytest.mark.slow)]
)
def test_bad_input_to_training_leaves_nothing_behind(script, tmp_path):
    out = tmp_path / "out"

    def said(*words):
        line = fails(script, "--out_dir", out, *words)
        assert not out.exists(), "a mistake must leave nothing on the disk"
        return line

    (tmp_path / "bad.json").write_text(
        '[{"instruction": "a", "output": "b"}, {"prompt": "c", "output": "d"}]'
    )
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "long.json").write_text(json.dumps([{"instruction": "word " * 5000, "output": "b"}]))
    assert "bad.json, record 1" in said("--data", "JSON", "--data.path", tmp_path / "bad.json")
    assert "none.json: holds no records" in said("--data", "JSON", "--data.path", tmp_path / "none.json")
    assert "no example is left" in said("--data", "JSON", "--data.path", tmp_path / "long.json")
    assert "no such data source" in said("--data", "Nope")
    assert "not a checkpoint directory" in said("--checkpoint_dir", tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(QUICKSTART, broken)
    (broken / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in said("--checkpoint_dir", broken)
    shutil.copy(QUICKSTART / "tokenizer.json", broken)
    (broken / "lit_model.pth").write_bytes((QUICKSTART / "lit_model.pth").read_bytes()[:100_000])
    assert "lit_model.pth: broken (100,000 bytes)" in said("--checkpoint_dir", broken)
    (broken / "lit_model.pth").write_bytes(pickle.dumps(_Payload()))
    assert "could run code" in said("--checkpoint_dir", broken)
    assert "multiple of --train.micro_batch_size" in said(
        "--train.packing", "false", "--train.micro_batch_size", 3
    )


def test_bad_input_to_lora(tmp_path):
    out = tmp_path / "out"
    assert "--lora.targets query" in fails("finetune/lora.py", "--out_dir", out, "--lora.targets", "[query]")
    assert "its rank can be" in fails("finetune/lora.py", "--out_dir", out, "--lora.rank", 5000)
    assert "--lora.rank 0" in fails("finetune/lora.py", "--out_dir", out, "--lora.rank", 0)
    assert not out.exists()


def test_an_output_directory_in_use_is_refused_and_overwrite_replaces_it(adapter, tmp_path):
    _, first = adapter
    shutil.copytree(first, tmp_path / "run")
    before = contents(tmp_path / "run")
    words = ["finetune/lora.py", "--out_dir", tmp_path / "run", "--train.max_steps", 1]
    assert "already holds" in fails(*words)
    assert "holds no records" in fails(
        *words, "--overwrite", "--data", "JSON", "--data.path", _empty(tmp_path)
    )
    assert f"holds {tmp_path / 'run/final'}, which is read" in fails(
        *words, "--overwrite", "--checkpoint_dir", tmp_path / "run/final"
    )
    assert contents(tmp_path / "run") == before
    succeeds(*words, "--overwrite")
    assert not list((tmp_path / "run").glob("step-*")), "nothing stale may remain"


def _empty(directory):
    (directory / "empty.jsonl").write_text("")
    return directory / "empty.jsonl"


def test_bad_input_to_merging(adapter, tmp_path):
    _, first = adapter
    out = tmp_path / "out"
    shutil.copytree(QUICKSTART, tmp_path / "other")
    content = torch.load(tmp_path / "other/lit_model.pth", weights_only=True)
    content["model"]["model.norm.weight"] += 0.1
    torch.save(content, tmp_path / "other/lit_model.pth")
    words = ["scripts/merge_lora.py", "--lora_path", first / "final/lit_model.pth", "--out_dir", out]
    assert "not the base that" in fails(*words, "--checkpoint_dir", tmp_path / "other")
    assert "no such directory" in fails(*words, "--checkpoint_dir", tmp_path / "nowhere")
    assert "is a full model;" in fails("scripts/merge_lora.py", "--lora_path", QUICKSTART, "--out_dir", out)
    assert "which is read" in fails(*words[:3], "--out_dir", first / "final", "--overwrite")
    assert not out.exists()
    succeeds(*words, "--checkpoint_dir", tmp_path / "other", "--allow_base_mismatch")


@pytest.mark.slow
def test_the_default_output_directory_is_named_by_method_and_data(tmp_path, alpaca_file):
    words = ["--checkpoint_dir", QUICKSTART, "--train.max_steps", 1]
    succeeds("finetune/lora.py", *words, cwd=tmp_path)
    succeeds("finetune/full.py", *words, "--data", "JSON", "--data.path", alpaca_file, cwd=tmp_path)
    assert (tmp_path / "out/lora/alpaca/final/lit_model.pth").is_file()
    assert (tmp_path / "out/full/json/final/lit_model.pth").is_file()
    assert command("chat/base.py", "--prompt", "Hi", "--max_new_tokens", 2, cwd=tmp_path).returncode == 0, (
        "the adapter finds its base"
    )
