"""scripts/compare_runs.py on directories of runs."""

import pytest
import yaml


@pytest.fixture
def runs(tmp_path):
    def make(name, rows, **settings):
        directory = tmp_path / name
        directory.mkdir()
        lines = ["step,epoch,loss,val_loss,learning_rate,grad_norm,tokens,tokens_per_second,seconds,skipped"]
        (directory / "metrics.csv").write_text("\n".join([*lines, *rows]) + "\n")
        (directory / "hyperparameters.yaml").write_text(yaml.dump(settings))
        return directory

    rows = ["1,0,2.5,,0.001,1,100,50,2,0", "2,0,1.5,,0.001,1,200,60,65,0", "2,0,,1.75,,,200,,65,0"]
    one = make("one", rows, out_dir="one", train={"learning_rate": 1e-3}, lora={"rank": 8, "rslora": False})
    two = make(
        "two",
        [*rows, "3,0,1.0,,0.001,1,300,55,90,0", "3,0,,1.25,,,300,,90,0"],
        out_dir="two",
        train={"learning_rate": 3e-3},
        lora={"rank": 8, "rslora": True},
    )
    return one, two


def test_the_best_comes_first_and_what_differs_is_shown(runs, forked, tmp_path):
    said = forked.succeeds(
        "scripts/compare_runs.py", *runs, "--html", tmp_path / "pages/compared.html", cwd=tmp_path
    )
    lines = [line.split() for line in said.splitlines()]
    one, two = map(str, runs)
    assert lines[1] == [two, "1.2500", "3", "1.2500", "1.0000", "3", "55", "1:30"]
    assert lines[2] == [one, "1.7500", "2", "1.7500", "1.5000", "2", "60", "1:05"]
    assert ["train.learning_rate", "0.003", "0.001"] in lines and ["lora.rslora", "true", "false"] in lines
    assert not any(line[:1] in (["out_dir"], ["lora.rank"]) for line in lines)
    assert (tmp_path / "pages/compared.html").read_text().count(f'"name": "{two}"') == 1


def test_a_run_whose_loss_is_not_finite_comes_last(runs, forked, tmp_path):
    for directory, last in zip(runs, ("nan", "3.5"), strict=True):
        head = (directory / "metrics.csv").read_text().splitlines()[0]
        rows = "1,0,1.5,,0.001,1,100,50,2,0", f"2,0,{last},,0.001,1,200,60,65,1"
        (directory / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    said = forked.succeeds("scripts/compare_runs.py", *runs, cwd=tmp_path).splitlines()
    assert said[1].split()[:2] == [str(runs[1]), "3.5000"]
    assert said[2].split()[:3] == [str(runs[0]), "not", "finite"]


def test_runs_may_be_named_by_the_option_and_need_no_settings(runs, forked, tmp_path):
    (runs[0] / "hyperparameters.yaml").unlink()
    said = forked.succeeds("scripts/compare_runs.py", "--runs", *runs, cwd=tmp_path)
    assert any(line.split() == ["lora.rank", "8", "-"] for line in said.splitlines())
    assert "nothing to compare it with" in forked.succeeds("scripts/compare_runs.py", runs[1], cwd=tmp_path)


def test_mistakes_are_one_line(runs, forked, tmp_path):
    (tmp_path / "is").write_text("")
    (runs[0] / "final").mkdir()
    for words, says in [
        ([], "runs: required"),
        ([tmp_path / "none"], "none: no such directory"),
        ([runs[0] / "final"], f"not the directory of a run; name {runs[0]}"),
        ([*runs, "--html", tmp_path], "is a directory"),
        ([*runs, "--html", tmp_path / "is"], "exists; add --overwrite"),
    ]:
        assert says in forked.refuses("scripts/compare_runs.py", *words, cwd=tmp_path)
    (runs[1] / "metrics.csv").write_text("step,loss,val_loss\n1,x,\n")
    assert "metrics.csv: line 2" in forked.refuses("scripts/compare_runs.py", *runs, cwd=tmp_path)
