"""Every command gives the same verdict about an adapter's base: it accepts the right one wherever
it lies, and no other."""

import shutil

import pytest
import torch
from test_checkpoint import write_adapter

COMMANDS = {
    "chat": (
        "chat/base.py",
        "--checkpoint_dir",
        "--base_checkpoint_dir",
        ["--prompt", "the fox", "--max_new_tokens", 1],
    ),
    "merge": ("scripts/merge_lora.py", "--lora_path", "--checkpoint_dir", ["--out_dir", "out"]),
    "export": ("scripts/export_peft.py", "--lora_path", "--checkpoint_dir", ["--out_dir", "out"]),
    "convert": (
        "scripts/convert_lit_checkpoint.py",
        "--checkpoint_dir",
        "--base_checkpoint_dir",
        ["--out_dir", "out"],
    ),
    "train": (
        *("finetune/lora.py", "--checkpoint_dir", "--base_checkpoint_dir"),
        [
            "--out_dir",
            "out",
            "--data",
            "JSON",
            "--data.path",
            "alpaca.json",
            "--train.max_steps",
            1,
            "--prompt_style",
            "plain",
        ],
    ),
}


@pytest.mark.parametrize(
    "command",  # one function of ours gives the verdict to all
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("train", "merge"))) for name in COMMANDS],
)
def test_the_verdict(command, forked, tmp_path, base, make_checkpoint, alpaca_file):
    script, option, base_option, more = COMMANDS[command]
    adapter = write_adapter(tmp_path / "adapter", base)
    make_checkpoint("other", seed=7)
    words = [script, option, "adapter", *more]

    def works(*extra):
        done = forked.run(*words, *extra, cwd=tmp_path)
        assert done["status"] == 0, done
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    works()
    assert "other: not the base that adapter was trained on" in forked.refuses(
        *words, base_option, "other", cwd=tmp_path
    )
    works(base_option, "other", "--allow_base_mismatch")

    base.rename(tmp_path / "renamed")
    assert "adapter -> base: the last is not a checkpoint directory" in forked.refuses(*words, cwd=tmp_path)
    works(base_option, "renamed")

    (tmp_path / "renamed").rename(base)
    (tmp_path / "tree").mkdir()
    for moved in (base, adapter):
        moved.rename(tmp_path / "tree" / moved.name)
    words[2] = "tree/adapter"
    works()

    file = tmp_path / "tree/base/lit_model.pth"
    content = torch.load(file, weights_only=True)
    for tensor in content["model"].values():
        tensor.add_(1e-4 * torch.randn_like(tensor))
    torch.save(content, file)
    assert "tree/base: not the base that tree/adapter was trained on" in forked.refuses(*words, cwd=tmp_path)


def test_a_link_of_a_chain_is_held_to_its_own_base(forked, tmp_path, base):
    first = write_adapter(tmp_path / "first", base)
    write_adapter(tmp_path / "second", first, seed=2)
    words = ["scripts/merge_lora.py", "--lora_path", "second", "--out_dir", "out"]
    content = torch.load(first / "lit_model.pth", weights_only=True)
    next(iter(content["model"].values())).add_(1)
    torch.save(content, first / "lit_model.pth")
    assert "first: not the base that second was trained on" in forked.refuses(*words, cwd=tmp_path)
    write_adapter(tmp_path / "first", base)  # the same again
    content = torch.load(base / "lit_model.pth", weights_only=True)
    content["model"]["model.norm.weight"].add_(1)
    torch.save(content, base / "lit_model.pth")
    assert "base: not the base that first was trained on" in forked.refuses(*words, cwd=tmp_path)
