"""Resizing: the full decomposition's result without the full matrix, errors that are true, and
nothing changed that need not be."""

import dataclasses
import math

import pytest
import torch
from conftest import command, fails, random_adapter, succeeds

from litlora.adapters.factored import difference, least_rank, norm, svd
from litlora.adapters.merge import merge_chain
from litlora.adapters.resize import resize, shrink
from litlora.checkpoint import open_checkpoint, resolve
from litlora.formats.lora_files import LoRAFile, Update, read_lora, write_lora
from litlora.lora import LoRAConfig
from litlora.lora.select import layer_rank, layer_scale, settings_for


def random_update(seed: int, out: int = 40, into: int = 56, rank: int = 12, scale: float = 1.5) -> Update:
    """An update whose singular values fall, as a trained one's do."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return Update(A, B * torch.linspace(1, 0.05, rank), scale)


def delta(update: Update) -> torch.Tensor:
    return update.scale * (update.B.double() @ update.A.double())


def to_rank(update: Update, rank: int) -> Update:
    return resize(update, rank=rank, max_error=None, generator=torch.Generator().manual_seed(0))


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """By the full decomposition of the whole matrix."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("out", "into", "rank", "scale"),
    [(40, 56, 12, 1.5), (56, 40, 12, -0.25), (10, 30, 16, 2.0), (200, 300, 33, 4.0)],
)
def test_a_smaller_rank_is_the_full_decomposition_s(seed, out, into, rank, scale):
    update = random_update(seed, out, into, rank, scale)
    small = to_rank(update, 5)
    wanted = nearest(delta(update), 5)
    assert small.rank == 5 and small.scale == scale
    assert torch.linalg.norm(delta(small) - wanted) <= 1e-6 * torch.linalg.norm(wanted)
    least = torch.linalg.svdvals(delta(update))[5:].norm().item()
    assert math.isclose(difference(update, small), least, rel_tol=1e-6)
    assert math.isclose(norm(update), torch.linalg.norm(delta(update)).item(), rel_tol=1e-12)


def test_the_small_decomposition_is_one():
    update = random_update(0)
    U, S, Vt = svd(update)
    assert torch.allclose(U.T @ U, torch.eye(12).double()) and torch.allclose(
        Vt @ Vt.T, torch.eye(12).double()
    )
    assert torch.allclose((U * S) @ Vt * update.scale, delta(update), atol=1e-12)


def test_a_layer_that_keeps_its_rank_keeps_its_factors():
    update = random_update(0)
    assert to_rank(update, 12) is update
    assert (
        shrink(update) is update
        and shrink(update, rank=40) is update
        and shrink(update, max_error=1e-4) is update
    )


def test_growing_is_exact_and_the_new_rows_can_learn():
    update = random_update(0)
    grown = to_rank(update, 20)
    assert grown.rank == 20 and grown.scale == update.scale
    assert torch.equal(grown.A[:12], update.A) and torch.equal(grown.B[:, :12], update.B)
    assert (
        not grown.B[:, 12:].any()
        and grown.A[12:].abs().min() > 0
        and grown.A[12:].abs().max() <= 1 / math.sqrt(56)
    )
    assert difference(update, grown) <= 1e-15 * norm(update)
    assert torch.equal(grown.A, to_rank(update, 20).A), "the seed decides"


def test_no_rank_exceeds_the_layer():
    assert to_rank(random_update(0), 500).rank == 40
    tall = random_update(0, 10, 30, 16)
    assert to_rank(tall, 16).rank == 10 and difference(tall, to_rank(tall, 16)) < 1e-6 * norm(tall)


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01])
def test_an_error_bound_takes_the_least_rank_that_keeps_it(bound):
    update = random_update(1)
    small = resize(update, rank=None, max_error=bound, generator=torch.Generator())
    assert (
        difference(update, small)
        <= bound * norm(update)
        < difference(update, to_rank(update, small.rank - 1))
    )
    assert resize(update, rank=2, max_error=bound, generator=torch.Generator()).rank == 2, (
        "a rank beside it is the most there may be"
    )


def test_an_update_shrinks_to_the_rank_that_it_has():
    update = random_update(2, rank=4)
    twice = Update(
        torch.cat([update.A, update.A]), torch.cat([update.B, update.B], dim=1), 0.5 * update.scale
    )
    assert shrink(twice).rank == 4
    assert torch.allclose(delta(shrink(twice)), delta(update), atol=1e-6)


def test_an_update_of_zero_stays_one():
    update = random_update(0)
    nothing = shrink(dataclasses.replace(update, B=torch.zeros_like(update.B)))
    assert nothing.rank == 1 and not nothing.B.any() and torch.isfinite(nothing.A).all()
    assert least_rank(torch.zeros(3).double(), 0.1) == 1


def test_half_precision_is_not_rounded_twice():
    update = random_update(0)
    half = dataclasses.replace(update, A=update.A.bfloat16(), B=update.B.bfloat16())
    assert to_rank(half, 5).A.dtype == to_rank(half, 5).B.dtype == torch.float32
    assert to_rank(half, 12).A.dtype == to_rank(half, 20).A.dtype == torch.bfloat16
    wanted = nearest(delta(half), 5)
    assert torch.linalg.norm(delta(to_rank(half, 5)) - wanted) <= 1e-6 * torch.linalg.norm(wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_settings_say_every_layer_s_rank_and_scale(rslora):
    updates = {
        f"layers.{n}.q_proj": random_update(n, rank=rank, scale=scale)
        for n, (rank, scale) in enumerate([(8, 2), (8, 2), (3, 2), (8, 7)])
    }
    settings = settings_for(
        updates, LoRAConfig(rank=5, alpha=3, rslora=rslora, rank_pattern={"q_proj": 9}, dropout=0.25)
    )
    assert {name: layer_rank(settings, name) for name in updates} == {
        name: update.rank for name, update in updates.items()
    }
    for name, update in updates.items():
        assert math.isclose(layer_scale(settings, name), update.scale, rel_tol=1e-13)
    assert settings.rank == 8 and settings.dropout == 0.25 and settings_for(updates, settings) is settings


# ---- the command


SETTINGS = LoRAConfig(
    rank=6,
    alpha=9,
    rslora=True,
    rank_pattern={"q_proj": 3},
    alpha_pattern={"layers.1.mlp.up_proj": 2.0},
    modules_to_save=["lm_head"],
)


def logits(directory, *, live):
    from litlora.load import load

    with torch.no_grad():
        return load(directory, live=live).model(torch.arange(20).view(1, 20))


@pytest.mark.slow
def test_the_command_writes_an_adapter_that_every_command_takes(base, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", base, SETTINGS)
    done = succeeds(
        "scripts/resize_lora.py",
        "--lora_path",
        adapter / "lit_model.pth",
        "--rank",
        4,
        "--out_dir",
        tmp_path / "small",
    )
    small = tmp_path / "small"
    assert (
        "note: lm_head.weight: saved whole" in done.stdout
        and f"next: python chat/base.py --checkpoint_dir {small}" in done.stdout
    )
    assert {path.name for path in small.iterdir()} >= {
        "prompt_style.yaml",
        "tokenizer.json",
        "model_config.yaml",
        "hyperparameters.yaml",
    }
    there, here = resolve(adapter), resolve(small)
    (before, _), (after, _) = merge_chain(there), merge_chain(here)
    rows = {words[0]: words[1:] for line in done.stdout.splitlines() if len(words := line.split()) == 4}
    assert len(rows) == 14 + 1
    lost = whole = 0.0
    for name, base_weight in there.base.tensors.items():
        if (layer := name.removesuffix(".weight")) in rows:
            old, new = before[name].double() - base_weight, after[name].double() - base_weight
            wanted = old if "q_proj" in name else nearest(old, 4)
            assert torch.allclose(new, wanted, atol=1e-5)
            assert rows[layer][:2] == (["3", "4"] if "q_proj" in name else ["6", "4"])
            assert math.isclose(
                float(rows[layer][2]), (new - old).norm() / old.norm(), rel_tol=0.01, abs_tol=1e-5
            )
            lost, whole = lost + (new - old).square().sum(), whole + old.square().sum()
        else:
            assert torch.equal(before[name], after[name])
    assert math.isclose(float(rows["all"][2]), math.sqrt(lost / whole), rel_tol=0.01)
    assert torch.allclose(logits(small, live=True), logits(small, live=False), atol=1e-5)
    assert here.top.base.fingerprint == there.base.fingerprint
    succeeds(
        "scripts/resize_lora.py", "--config", small / "hyperparameters.yaml", "--out_dir", tmp_path / "again"
    )
    assert open_checkpoint(tmp_path / "again").fingerprint == here.top.fingerprint
    done = succeeds(
        "scripts/resize_lora.py", "--lora_path", adapter, "--energy", 0.9, "--out_dir", small, "--overwrite"
    )
    assert all(
        float(line.split()[-1]) <= math.sqrt(0.1)
        for line in done.stdout.splitlines()
        if line.startswith("model.")
    )
    succeeds("scripts/export_peft.py", "--lora_path", small, "--out_dir", tmp_path / "peft")
    assert (
        command("chat/base.py", "--checkpoint_dir", small, "--prompt", "Hi", "--max_new_tokens", 2).returncode
        == 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [True, False])
def test_a_file_of_another_tool_stays_what_it_is(alpha, dtype, tmp_path):
    """kohya's and ComfyUI's files: linear layers, a convolution, and a difference that no rank
    concerns."""
    linear, other = (
        random_update(0, scale=1.5 if alpha else 1.0),
        random_update(1, rank=4, scale=0.25 if alpha else 1.0),
    )
    kernel = Update(torch.randn(6, 8, 3, 3), torch.randn(10, 6, 1, 1) * 0.1, 0.5 if alpha else 1.0)
    updates = {"lora_unet_a": linear, "lora_unet_b": other, "lora_unet_conv": kernel}
    file = tmp_path / "style.safetensors"
    write_lora(file, LoRAFile(file, updates, {"lora_unet_a.diff_b": torch.randn(40)}, alpha=alpha), dtype)
    before = read_lora(file)
    words = ["scripts/resize_lora.py", "--lora_path", file, "--rank", 4, "--out_dir"]
    said = succeeds(*words, tmp_path / "small").stdout
    assert "note: lora_unet_a.diff_b: kept unchanged" in said
    after = read_lora(tmp_path / "small/style.safetensors")
    assert (after.alpha, after.parts, after.updates.keys()) == (
        before.alpha,
        before.parts,
        before.updates.keys(),
    )
    assert torch.equal(after.diffs["lora_unet_a.diff_b"], before.diffs["lora_unet_a.diff_b"])
    rows = {
        line.split()[0]: float(line.split()[3]) for line in said.splitlines() if line.startswith("lora_unet")
    }
    for name, update in before.updates.items():
        new = after.updates[name]
        assert (
            new.rank == 4
            and new.A.dtype == new.B.dtype == dtype
            and math.isclose(new.scale, update.scale)
            and new.shape == update.shape
        )
        old, got = update.product().double(), new.product().double()
        assert torch.allclose(got, nearest(old, 4), atol=1e-5 if dtype == torch.float32 else 0.03)
        assert math.isclose(rows[name], (got - old).norm() / old.norm(), rel_tol=0.01, abs_tol=1e-6)
    assert torch.equal(after.updates["lora_unet_b"].A, before.updates["lora_unet_b"].A), "its rank was 4"
    assert "already holds" in fails(*words, tmp_path / "small")
    assert "which is read" in fails(*words, tmp_path, "--overwrite")
    assert "needs no base" in fails(*words, tmp_path / "new", "--checkpoint_dir", tmp_path)


def test_a_mistake_leaves_nothing(base, tmp_path):
    adapter = random_adapter(tmp_path / "adapter", base, LoRAConfig(rank=2))
    words = ["scripts/resize_lora.py", "--out_dir", tmp_path / "out", "--lora_path"]
    assert "--rank, --energy or --max_error" in fails(*words, adapter)
    assert "--rank 0: must be at least 1" in fails(*words, adapter, "--rank", 0)
    assert "name one" in fails(*words, adapter, "--energy", 0.9, "--max_error", 0.1)
    assert "is a full model; --lora_path needs an adapter" in fails(*words, base, "--rank", 2)
    assert fails(*words, "nowhere.safetensors", "--rank", 2) == "error: nowhere.safetensors: no such file\n"
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    content["model"]["model.layers.0.mlp.up_proj.lora_B"][0, 0] = math.nan
    torch.save(content, adapter / "lit_model.pth")
    assert "up_proj.lora_B holds values that are not finite" in fails(*words, adapter, "--rank", 1)
    assert not (tmp_path / "out").exists()
