"""The edge of the commands: quick, one line for a mistake, settings that come back."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from conftest import QUICKSTART, REPO, Forked, command, fails, succeeds

from litlora import settings as all_settings
from litlora.cli import call, option_for, parse, setting_types
from litlora.errors import UserError
from litlora.settings import (
    JSON,
    Alpaca,
    Chat,
    ConvertLit,
    DataSource,
    Download,
    ExportPEFT,
    Files,
    FinetuneFull,
    FinetuneLoRA,
    InspectCheckpoint,
    LoRAConfig,
    LoRAExtractor,
    MergeLoRA,
    Mix,
    MixedSource,
    TrainConfig,
    dump,
)

COMMANDS = sorted(
    str(path.relative_to(REPO))
    for folder in ("finetune", "chat", "scripts")
    for path in (REPO / folder).glob("*.py")
    if "import cli" in path.read_text() or "litlora.cli" in path.read_text()
)


def refusal(settings: type, words: list[str]) -> str:
    """What the command says of words that it refuses."""
    with pytest.raises(UserError) as raised:
        parse(settings, words)
    return raised.value.with_options(lambda name: option_for(settings, name))


@pytest.fixture
def without_torch(tmp_path):
    """An environment in which importing torch or Fabric is an error."""
    for name in ("torch", "lightning_fabric", "lightning", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a heavy import')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}


def assert_nothing_is_cut(shown):
    head, _, rest = shown.partition("\noptions:\n")
    matters = head.partition("what matters most:")[2].partition("\n\n")[0].splitlines()
    assert not [line for line in matters if line.endswith(" al") or line.count("(") != line.count(")")]
    examples = rest.partition("\nexamples:\n")[2].splitlines()
    assert examples and not [line for line in examples if "  " in line.strip()], "a line was continued"


def test_there_are_commands():
    assert {"finetune/lora.py", "finetune/full.py", "chat/base.py", "scripts/merge_lora.py"} <= set(COMMANDS)
    assert not {path.rpartition("/")[2].removesuffix(".py") for path in COMMANDS} & sys.stdlib_module_names


def test_help_a_typo_and_a_wrong_path_answer_without_torch(without_torch, tmp_path):
    """Of every command, in forks of a process that has imported the edge alone; and of one as a user
    starts it."""
    light = Forked("cli", **without_torch)
    try:
        for script in COMMANDS:
            done = light.run(script, "--help", cwd=tmp_path)
            assert done["status"] == 0 and "usage:" in done["stdout"] and done["stderr"] == "", (script, done)
            assert_nothing_is_cut(done["stdout"])
            assert "no such option" in light.refuses(script, "--no_such_option", "3", cwd=tmp_path), script
        for script in ("finetune/lora.py", "finetune/full.py", "chat/base.py"):
            said = light.refuses(script, "--checkpoint_dir", tmp_path / "nowhere", cwd=tmp_path)
            assert "nowhere: no such directory" in said
    finally:
        light.close()
    said = fails("chat/base.py", "--checkpoint_dir", tmp_path / "nowhere", **without_torch)
    assert "nowhere: no such directory" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lora.rank", "x"], "--lora.rank: expected int, got x"),
        (["--lora.rank", "nan"], "--lora.rank: expected int"),
        (["--lora.rank", "0"], "--lora.rank 0: must be at least 1"),
        (["--lora.alpha", "x"], "--lora.alpha: expected float, got x"),
        (["--lora.alpha", "nan"], "--lora.alpha"),
        (["--lora.alpha", ".nan"], "--lora.alpha nan: must be a finite number"),
        (["--train.learning_rate", "fast"], "--train.learning_rate: expected float, auto, got fast"),
        (["--train.learning_rate", ".inf"], "--train.learning_rate inf: must be"),
        (["--train.warmup_steps", "soon"], "--train.warmup_steps: expected int, float, got soon"),
        (["--train.epochs", "1.5"], "--train.epochs: expected int, got 1.5"),
        (["--data", "Nope"], "--data Nope: no such data source; there are Alpaca, AlpacaGPT4, Deita, Dolly"),
        (["--data", "os.path"], "--data os.path: no such data source; there are Alpaca, AlpacaGPT4"),
        (["--data", "nowhere.Source"], "--data nowhere.Source: no such data source"),
        (["--data", "litlora.settings.Nothing"], "--data litlora.settings.Nothing: no such data source"),
        (["--data", "litlora.settings.Chat"], "--data litlora.settings.Chat: no such data source"),
        (["--data", "[1]"], "--data [1]: no such data source"),
        (["--data.help", "Nope"], "--data.help Nope: no such data source"),
        (["--data.help", "os.path"], "--data.help os.path: no such data source"),
        (["--data", "JSON"], "--data.path: required"),
        (["--data", "JSON", "--data.path"], "--data.path: needs a value"),
        (["--data", "Alpaca", "--data.path", "x"], "--data.path: Alpaca has no such setting"),
        (
            ["--data", "a.jsonl", "--data.fromat", "x"],
            "--data.fromat: Files has no such setting, did you mean --data.format?; see --data.help Files",
        ),
        (
            ["--data", "a.jsonl", "--data.learn_last"],
            "--data.learn_last: no such option, did you mean --data.learn?",
        ),
        (
            ["--data", "a.jsonl", "--data.ignore", "id, a"],
            "--data.ignore: expected a list, '[id, a]', got id, a",
        ),
        (["--data.columns", "a=b"], "--data.columns: expected a mapping, '{NAME: VALUE}', got a=b"),
        (["--data", "x.jsonl", "--data.path", "y"], "--data.path: --data names the data already"),
        (
            ["--data", "a.jsonl", "--data.val_path", "b", "--data.val_fraction", "0.1"],
            "--data.val_fraction 0.1: --data.val_path names",
        ),
        (["--data", "a.jsonl", "--data.shuffle"], "--data.shuffle: chooses the records that"),
        (["--data.max_examples", "0"], "--data.max_examples 0: must be at least 1"),
        (["--data.sources", "[]"], "--data.sources is empty: name a path or a source"),
        (["--data.sources", "[{weight: 2}]"], "--data.sources {}: needs path or source, one of them"),
        (["--data.sources", "[{path: a, weight: 0}]"], "--data.sources a: weight 0 must be above 0"),
        (["--data.sources", "[{source: B}]"], "--data.sources B: no such data source; there are Alpaca"),
        (["--data.sources", "[{path: a, x: 0}]"], "--data.sources: Option 'x' is not accepted"),
        (["--data.val_fraction", "x"], "--data.val_fraction: expected float, got x"),
        (["--data.val_fraction", "1"], "--data.val_fraction 1.0: must be at least 0 and below 1"),
        (["--data.source", "some"], "--data.source: expected auto, full, sample, got some"),
        (["--lora.rnk", "4"], "did you mean --lora.rank"),
        (["--train.lr", "1"], "--train.lr: no such option, did you mean --train.learning_rate?"),
        (["--lora_r", "1"], "--lora_r: no such option, did you mean --lora.rank?"),
        (["--rank=1"], "--rank=1: no such option, did you mean --lora.rank?"),
        (["--output-dir", "x"], "--output-dir: no such option, did you mean --out_dir?"),
        (["--lora_path", "x"], "--lora_path: no such option, did you mean --checkpoint_dir?"),
        (["--trian.epochs=4"], "did you mean --train.epochs"),
        (["--checkpoint_dir"], "--checkpoint_dir: needs a value"),
        (["--out_dir", "-x"], "--out_dir: needs a value; one that begins with - as --out_dir=VALUE"),
        (["--lora", "5"], "--lora 5: must be a mapping of settings to values"),
        (["--lora", "{rank: x}"], "--lora.rank: expected int, got x"),
        (["--lora", "{rnk: 2}"], "no such setting as lora.rnk, did you mean --lora.rank?"),
        (["--lora.rank_pattern", "{a: x}"], "--lora.rank_pattern: expected int, got x"),
        (["--lora.rank_pattern", "{(a*)*: 2}"], "--lora.rank_pattern: the pattern '(a*)*' repeats"),
        (["--train.max_time", "x"], "--train.max_time: expected float, got x"),
        (["--print_config=what"], "--print_config=what: no such flag"),
        (["--resume", "auto", "--overwrite"], "--resume continues what --overwrite would remove"),
        (["--accelerator", "tpu"], "--accelerator"),
        (["--devices", "0"], "--devices 0"),
        (
            ["--train.packing", "false", "--devices", "3"],
            "--train.global_batch_size 16: must be a multiple of "
            "--train.micro_batch_size 4 times --devices 3",
        ),
        (
            ["--train.packing=false", "--train.global_batch_size", "10"],
            "--train.global_batch_size 10: must be a multiple of --train.micro_batch_size 4",
        ),
        (["--train.micro_batch_tokens", "0"], "--train.micro_batch_tokens 0: must be at least 1"),
        (["stray"], "stray: no such option"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: no such file"),
        (["--config=/"], "--config /: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_names_the_option(words, says):
    said = refusal(FinetuneLoRA, words)
    assert "\n" not in said and (said.startswith(says) or "did you mean" in says and says in said)


@pytest.mark.parametrize(
    "text",
    [
        "lora: 5",
        "lora: [",
        "lora: {rank: 0}",
        "lora: {rnk: 3}",
        "nonsense: 1",
        "lora: null",
        "seed: null",
        "data: null",
        "- 1",
        "seed: !!python/name:os.system",
    ],
)
def test_a_bad_config_file_is_named(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert "\n" not in fails("finetune/lora.py", "--config", file).strip()
    for words in (["--config", str(file)], [f"--config={file}"]):
        said = refusal(FinetuneLoRA, words)
        assert str(file) in said or said.startswith("--lora.rank 0")


def test_flags_need_no_value():
    assert parse(FinetuneLoRA, ["--overwrite", "--seed", "3"]).overwrite
    assert not parse(FinetuneLoRA, ["--overwrite", "false"]).overwrite
    assert parse(MergeLoRA, ["--lora_path", "a", "--out_dir", "b", "--overwrite"]).overwrite


def test_data_sources_are_named_shortly():
    assert parse(FinetuneLoRA, []).data == Alpaca(source="sample"), (
        "with nothing given, nothing is downloaded"
    )
    assert parse(FinetuneLoRA, ["--data", "Alpaca"]).data == Alpaca(source="auto")
    assert parse(FinetuneLoRA, ["--data", "JSON", "--data.path", "x"]).data == JSON(path="x")
    for path in ("JSON", "litlora.settings.JSON", "litlora.settings.data.JSON"):
        source = f"{{class_path: {path}, init_args: {{path: x}}}}"
        assert parse(FinetuneLoRA, ["--data", source]).data == JSON(path="x")
    assert all(parse(kind, []).train.learning_rate == "auto" for kind in (FinetuneFull, FinetuneLoRA))


@pytest.mark.parametrize("path", ["x.csv", "x.parquet", "x.jsonl.gz", "hf://owner/name", "data/*.jsonl"])
def test_a_path_that_was_never_json_is_files(path, tmp_path):
    for words in (["--data", path], [f"--data={path}"], ["--data.path", path], [f"--data.path={path}"]):
        assert parse(FinetuneLoRA, words).data == Files(path=path)
    file = tmp_path / "run.yaml"
    file.write_text(dump(FinetuneLoRA(data=JSON(path="old", split_seed=1))))
    assert parse(FinetuneLoRA, ["--config", str(file), "--data", path]).data == Files(path=path, split_seed=1)


def test_a_pattern_without_quotes_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="--data a.jsonl b.jsonl: takes one path; .* --data '.*jsonl'"):
        parse(FinetuneLoRA, ["--data", "a.jsonl", "b.jsonl"])


def test_sources_are_a_mixture():
    mixed = parse(FinetuneLoRA, ["--data.sources", "[{path: a, weight: 2}, {source: Alpaca}]"]).data
    assert mixed == Mix(sources=[MixedSource(path="a", weight=2), MixedSource(source="Alpaca")])
    assert parse(FinetuneLoRA, ["--data", "./a", "--data.max_examples", "5", "--data.shuffle"]).data.shuffle


@pytest.mark.parametrize(
    "path",
    ["x.JSON", *(pytest.param(path, marks=pytest.mark.slow) for path in ("x.jsonl", "some/where", "./x"))],
)
def test_a_path_is_data_enough(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--data", path], [f"--data={path}"], ["--data.path", path], [f"--data.path={path}"]):
        assert parse(FinetuneLoRA, words).data == JSON(path=path)
        for more in (["--data.val_fraction", "0.5"] + words, words + ["--data.val_fraction=0.5"]):
            assert parse(FinetuneLoRA, more).data == JSON(path=path, val_fraction=0.5)
    (tmp_path / "records").mkdir()
    assert parse(FinetuneLoRA, ["--data", "records"]).data == JSON(path="records")
    (tmp_path / "JSON").mkdir()
    assert parse(FinetuneLoRA, ["--data", "JSON", "--data.path", "x"]).data == JSON(path="x")
    (tmp_path / "run.yaml").write_text(dump(FinetuneLoRA(data=JSON(path="old", split_seed=1))))
    for words in (["--data.path", path], ["--data", path]):
        again = parse(FinetuneLoRA, ["--config", "run.yaml", *words]).data
        assert again == JSON(path=path, split_seed=1)


def test_an_adapter_has_the_same_option_everywhere():
    out = ["--out_dir", "o"]
    for words in (["--lora_path", "a"], ["--checkpoint_dir", "a"], ["--checkpoint-dir=a"]):
        assert parse(MergeLoRA, words + out) == MergeLoRA(lora_path=["a"], out_dir="o")
        assert parse(ExportPEFT, words + out) == ExportPEFT(lora_path="a", out_dir="o")
        assert parse(ConvertLit, words + out) == ConvertLit(checkpoint_dir="a", out_dir="o")
        assert parse(Chat, words) == Chat(checkpoint_dir="a")
        assert parse(InspectCheckpoint, words) == InspectCheckpoint(checkpoint_dir="a")
    for words in (
        ["--lora_path", "a", "--checkpoint_dir", "b"],
        ["--checkpoint_dir", "a", "--base_checkpoint_dir", "b"],
    ):
        assert parse(MergeLoRA, words + out) == MergeLoRA(lora_path=["a"], checkpoint_dir="b", out_dir="o")
        assert parse(ExportPEFT, words + out) == ExportPEFT(lora_path="a", checkpoint_dir="b", out_dir="o")
        converted = ConvertLit(checkpoint_dir="a", base_checkpoint_dir="b", out_dir="o")
        assert parse(ConvertLit, words + out) == converted
        assert parse(Chat, words) == Chat(checkpoint_dir="a", base_checkpoint_dir="b")


def test_a_stored_adapter_leaves_the_base_its_name(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_path: [a]")
    words = ["--config", str(tmp_path / "c.yaml"), "--checkpoint_dir", "b", "--out_dir", "o"]
    assert parse(MergeLoRA, words) == MergeLoRA(lora_path=["a"], checkpoint_dir="b", out_dir="o")


def test_a_download_needs_a_name_only():
    assert parse(Download, ["some/model"]) == Download(repo_id="some/model")
    assert refusal(Download, ["some/model", "other/model"]) == "other/model: one repo_id at a time"


def test_the_default_base_and_the_next_command_are_found_from_anywhere(tmp_path, monkeypatch):
    assert FinetuneLoRA().checkpoint_dir == "checkpoints/litlora/quickstart"
    monkeypatch.chdir(tmp_path)
    assert parse(FinetuneFull, []).checkpoint_dir == str(QUICKSTART)
    monkeypatch.setattr(sys, "argv", [str(REPO / "finetune/lora.py")])
    assert call("chat/base.py") == f"python {REPO}/chat/base.py"
    monkeypatch.chdir(REPO / "finetune")
    monkeypatch.setattr(sys, "argv", ["lora.py"])
    assert call("chat/base.py") == "python ../chat/base.py"
    monkeypatch.chdir(REPO)
    assert call("chat/base.py") == "python chat/base.py"


@pytest.mark.parametrize(
    "settings",
    [
        FinetuneLoRA(),
        FinetuneLoRA(
            data=JSON(path="näme.json", val_fraction=0.0),
            lora=LoRAConfig(rank=3, alpha=0.5, targets=["q_proj", ".*v_proj"]),
            train=TrainConfig(warmup_steps=7, max_steps=9, learning_rate=3e-5),
            overwrite=True,
        ),
        FinetuneLoRA(
            data=Mix(
                sources=[MixedSource(path="a", weight=0.5, ignore=("id",)), MixedSource(source="Alpaca")],
                max_examples=7,
                val_path="v.csv",
            )
        ),
        Chat(prompt="it's: {odd}", top_k=None, seed=0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_settings_come_back_from_their_yaml(tmp_path, settings):
    file = tmp_path / "hyperparameters.yaml"
    file.write_text(dump(settings))
    assert parse(type(settings), ["--config", str(file)]) == settings


COMMAND_SETTINGS = [
    kind
    for kind in map(vars(all_settings).get, all_settings.__all__)
    if dataclasses.is_dataclass(kind)
    and not issubclass(kind, DataSource)
    and kind not in (LoRAConfig, MixedSource, TrainConfig)
]


@pytest.mark.parametrize("settings", COMMAND_SETTINGS)
def test_every_setting_has_a_help_text(settings, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # a text is one line
    with pytest.raises(SystemExit):
        parse(settings, ["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.partition("options:")[2].splitlines()]
    for name in setting_types(settings):
        if not name.startswith("data."):  # --data.help shows these
            [shown] = [line for line in lines if re.match(rf"--{re.escape(name)}[ ,]", line)]
            text = shown.partition("  ")[2] or lines[lines.index(shown) + 1]
            assert len(text.partition("(type:")[0]) > 10, shown


def test_every_setting_of_a_source_has_a_help_text():
    for source in ("Alpaca", "Files", "Mix", "Dolly"):
        shown = succeeds("finetune/lora.py", "--data.help", source, COLUMNS="10000").stdout
        settings = shown.count("\n  --data.") - shown.count("\n  --data.sources.help")
        assert shown.count("(type: ") + shown.count("(required, type: ") == settings >= 3


@pytest.mark.parametrize("settings", COMMAND_SETTINGS)
def test_the_last_part_of_a_name_tells_the_option(settings):
    """A library names a setting without knowing the command: no two may share their last part."""
    for name in setting_types(settings):
        assert option_for(settings, name.rpartition(".")[2]) == f"--{name}"
    assert option_for(settings, "nothing_of_that_name") == "nothing_of_that_name"


def test_a_library_names_a_setting_without_an_option():
    with pytest.raises(UserError, match="^rank 0: must be at least 1$"):
        LoRAConfig(rank=0)
    assert "error: --lora.rank 0: must be at least 1\n" == fails("finetune/lora.py", "--lora.rank", "0")


def test_debugging_shows_the_traceback():
    done = command("finetune/lora.py", "--checkpoint_dir", "nowhere", LITLORA_DEBUG="1")
    assert (
        done.returncode == 2
        and "Traceback" in done.stderr
        and done.stderr.splitlines()[-1].startswith("error: nowhere")
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--lora_path", "a b", "-c", "--out_dir", "o", "--weights", "0.5", "-1e-1"],
        ["--lora_path=a b", "--weights=0.5", "--lora_path", "-c", "--weights", "-1e-1", "--out_dir", "o"],
        ["--lora_path", "[a b, -c]", "--weights=[0.5, -1e-1]", "--out_dir", "o"],
    ],
)
def test_a_list_is_its_words_one_after_the_other(words):
    settings = parse(MergeLoRA, words)
    assert (settings.lora_path, settings.weights, settings.out_dir) == (["a b", "-c"], [0.5, -0.1], "o")


def test_a_list_of_something_else_is_one_line():
    said = refusal(MergeLoRA, ["--lora_path", "a", "--weights", "heavy", "--out_dir", "o"])
    assert said.startswith("--weights: expected float, got heavy")
    assert refusal(MergeLoRA, ["--lora_path", "--out_dir", "o"]) == "--lora_path: needs a value"
    assert refusal(MergeLoRA, []).startswith("--lora_path, --out_dir: required")


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-2"])
def test_a_negative_number_is_a_value(value):
    words = ["--lora_path", "a", "--out_dir", "o", "--strength", value, "--seed", "3"]
    assert parse(MergeLoRA, words).strength == float(value)


@pytest.mark.parametrize(
    "words",
    ["x", "--json x", "x --json", "--json True x", "--json=true x", "--checkpoint-dir x", "--json false x"],
)
def test_an_option_name_that_may_be_left_out(words):
    settings = parse(InspectCheckpoint, words.split())
    assert settings.checkpoint_dir == "x"
    assert settings.json == ("--json" in words and "false" not in words)


def test_one_value_stands_alone():
    for words in (["x", "y"], ["--checkpoint_dir", "x", "y"], ["--json", "x", "--json", "y"]):
        assert refusal(InspectCheckpoint, words) == "y: one checkpoint_dir at a time"


def test_shortened_options():
    words = ["--source-m", "a", "--target_m", "b", "--out", "c"]
    assert refusal(LoRAExtractor, words).startswith("--out: could match --output, --output_format")
    assert parse(LoRAExtractor, [*words[:4], "--output", "c", "--diff"]).diff_only


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (
            "scripts/merge_lora.py",
            ["--lora_path", "a", "--out_dir", "o", "--strength", "-1e-3"],
            "a: no such directory",
        ),
        (
            "scripts/merge_lora.py",
            ["--lora_path", "a", "--out_dir", "o", "--dtype", "fp8"],
            "--dtype: expected bf16, fp16, fp32, got fp8",
        ),
        (
            "scripts/merge_lora.py",
            ["--lora_path", __file__, "--out_dir", "o"],
            "is a file; a checkpoint directory is needed",
        ),
        ("scripts/merge_lora.py", ["--config", "--out_dir", "o"], "--config: needs a file of settings"),
        (
            "scripts/combine_lora.py",
            ["--lora_path", "a", "--weights", "", "--out_dir", "o"],
            "--weights: needs a value",
        ),
        ("scripts/inspect_checkpoint.py", ["a", "b"], "b: one checkpoint_dir at a time"),
        ("finetune/lora.py", ["--seed", "-1"], "--seed -1: must be at least 0 and below 4,294,967,296"),
        ("chat/base.py", ["--seed", str(2**64)], "--seed 18446744073709551616: must be at least 0"),
        (
            "scripts/lora_merger.py",
            ["--source-model", "a", "--lora-model", "b", "--output", "c", "--alpha", "-1e-3"],
            "--source_model a:",
        ),
    ],
)
def test_a_mistake_names_itself(script, words, says):
    assert says in fails(script, *words)


@pytest.mark.parametrize("text", ["", "[1]", "word", 'out_dir: "a\\0b"'])
def test_a_config_file_that_holds_no_settings(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    said = fails("scripts/merge_lora.py", "--config", tmp_path / "c.yaml", "--lora_path", "a")
    assert "c.yaml: must hold a mapping of names to values" in said or "zero character" in said


@pytest.mark.parametrize("name", ["split_seed", "source", "download_dir", "url"])
def test_a_null_for_a_setting_of_a_data_source_is_refused(name, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"data: {{{name}: null}}")
    with pytest.raises(UserError, match=f"--config {file}: data.{name} must not be null; leave it out"):
        parse(all_settings.FinetuneLoRA, ["--config", str(file)])


INTERRUPTED = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == "litlora.settings":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["finetune/lora.py", "scripts/merge_lora.py"])
def test_ctrl_c_while_a_command_is_imported_shows_no_traceback(script):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(REPO / script)], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == -2 and done.stderr == "\ninterrupted\n"


def test_help_names_the_sources_and_leaves_their_settings_to_their_own_help(capsys):
    with pytest.raises(SystemExit):
        parse(FinetuneLoRA, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Sources: Alpaca, Files, JSON, Mix, AlpacaGPT4, LIMA" in text
    assert "class_path" not in text and "litlora.settings" not in text


def test_help_begins_with_what_matters_and_ends_with_examples():
    shown = succeeds("finetune/lora.py", "--help", COLUMNS="100").stdout
    head, _, rest = shown.partition("\noptions:\n")
    first = re.findall(r"^  --(\S+) +[A-Z]", head.partition("what matters most:")[2], re.MULTILINE)
    assert first == list(FinetuneLoRA.MATTERS) and len(first) == 5
    examples = rest.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) == 3 and all(line.startswith("  python finetune/lora.py ") for line in examples)
    assert len(head.splitlines()) < 15, "it fits on a screen"


@pytest.mark.parametrize("name", ["lora", "train", "log"])
def test_a_group_has_a_help_of_its_own(name):
    shown = succeeds("finetune/lora.py", f"--{name}.help", COLUMNS="100").stdout
    names = re.findall(r"^  --(\w+)\.(\w+)", shown, re.MULTILINE)
    assert {group for group, _ in names} == {name}
    assert {setting for _, setting in names} == {
        full.removeprefix(f"{name}.") for full in setting_types(FinetuneLoRA) if full.startswith(f"{name}.")
    }
