"""A run replaces what a run writes, and nothing else that is in its directory."""

import shutil

import pytest

from litlora.errors import UserError
from litlora.paths import output_dir
from litlora.train.run_directory import run_directory


def place(path, *, overwrite=False, resume=None, inputs=()):
    return run_directory(str(path), "unused", overwrite=overwrite, resume=resume, inputs=list(inputs))


@pytest.fixture
def complete(tmp_path, base):
    """The directory of a complete run, with a merge and a note of the user's beside the result."""
    out = tmp_path / "out"
    for name in ("final", "step-000002", "final_merged"):
        shutil.copytree(base, out / name)
    for name in ("hyperparameters.yaml", "metrics.csv", "notes.txt"):
        (out / name).write_text("")
    return out


def test_a_merge_beside_the_result_is_no_obstacle(complete):
    with pytest.raises(UserError, match="already holds final; name another directory or replace that run"):
        place(complete)
    assert place(complete, overwrite=True).outdated == ("final_merged",)
    again = place(complete, resume="auto")
    assert again.complete and again.outdated == ()
    shutil.rmtree(complete / "final")
    with pytest.raises(UserError, match="already holds hyperparameters.yaml.*continue that run with resume"):
        place(complete)


def test_what_a_killed_run_set_aside_tells_whose_directory_it_is(complete):
    for name in ("hyperparameters.yaml", "metrics.csv", "final", "step-000002"):
        (complete / name).rename(complete / f".{name}.99999999.aside")
    assert place(complete, resume="auto").complete, "and the result is found again"


def test_other_directories_are_not_used(tmp_path, base, complete):
    with pytest.raises(UserError, match="base: is a checkpoint directory, not a run's"):
        place(base, overwrite=True)
    with pytest.raises(UserError, match="out/final: is a checkpoint directory"):
        shutil.copyfile(complete / "hyperparameters.yaml", complete / "final/hyperparameters.yaml")
        place(complete / "final", overwrite=True)
    (complete / "hyperparameters.yaml").unlink()
    with pytest.raises(UserError, match="holds notes.txt, which litlora did not write"):
        place(complete, overwrite=True)
    (complete / "notes.txt").rename(complete / ".DS_Store")
    assert place(complete, overwrite=True).path == complete
    with pytest.raises(UserError, match=f"holds {complete}/final_merged, which is read"):
        place(complete, overwrite=True, inputs=[complete / "final_merged"])


def test_a_new_run_beside_checkpoints_replaces_none(complete):
    for name in ("hyperparameters.yaml", "metrics.csv", "notes.txt"):
        (complete / name).unlink()
    for name in ("final", "step-000002"):
        shutil.rmtree(complete / name)
    assert place(complete).outdated == ()


def test_the_first_command_can_be_given_again(run, tmp_path, capsys):
    """Trained, merged, and again: resumed, refused and overwritten, with the merge kept."""
    out = run("lora", tmp_path / "out")
    shutil.copytree(out / "final", out / "final_merged")
    before = (out / "final/lit_model.pth").read_bytes()
    capsys.readouterr()
    run("lora", out, "--resume", "auto")
    assert "is complete, nothing is left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds final"):
        run("lora", out)
    run("lora", out, "--overwrite")
    assert f"note: {out / 'final_merged'} stays; it may come from the run" in capsys.readouterr().out
    assert (out / "final/lit_model.pth").read_bytes() == before
    assert (out / "final_merged/lit_model.pth").read_bytes() == before


def test_files_are_written_beside_others(tmp_path):
    (tmp_path / "first.safetensors").write_text("")
    named = {"names": ("second.safetensors",), "inputs": [], "replaced": False}
    assert output_dir(str(tmp_path), overwrite=False, **named) == tmp_path
    (tmp_path / "second.safetensors").write_text("")
    with pytest.raises(UserError, match="already holds second.safetensors"):
        output_dir(str(tmp_path), overwrite=False, **named)
