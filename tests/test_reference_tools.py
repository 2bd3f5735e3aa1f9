"""scripts/lora_extractor.py and lora_merger.py beside the single-file tools of these names: the
same commands, each other's files."""

import runpy
import sys

import pytest
import torch
from conftest import REPO, SHARED
from safetensors.torch import load_file, save_file

EXTRACT, MERGE = "lora_extractor.py", "lora_merger.py"
SHAPES = {
    "big.weight": (1000, 1004),
    "small.weight": (40, 30),
    "norm.weight": (1004,),
    "layer.bias": (64,),
    "block.modulation": (1, 6, 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

if not (SHARED / "reference" / EXTRACT).is_file():
    pytest.skip("the two tools are not at hand", allow_module_level=True)


def run(script, *words: object) -> None:
    """Within this process, which need not import torch again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *map(str, words)])
        runpy.run_path(str(script), run_name="__main__")


def theirs(script: str, *words: object) -> None:
    run(SHARED / "reference" / script, *words)


def ours(script: str, *words: object) -> None:
    run(REPO / "scripts" / script, *words)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same two models as a file, as a folder of two files, and as torch files, plain and
    nested."""
    place, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    source = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    target = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in source.items()
    }
    low_rank = torch.randn(1000, 4, generator=generator) @ torch.randn(4, 1004, generator=generator)
    target["big.weight"] = (
        source["big.weight"] + low_rank + 0.01 * torch.randn(1000, 1004, generator=generator)
    )
    for name, tensors in (("source", source), ("target", target)):
        save_file(tensors, place / f"{name}.safetensors")
        (place / name).mkdir()
        names = sorted(tensors)
        for number, part in enumerate((names[:2], names[2:])):
            save_file({key: tensors[key] for key in part}, place / name / f"part{number}.safetensors")
        torch.save({"model": tensors, "epoch": 3}, place / f"{name}.pth")
        torch.save(tensors, place / f"{name}.pt")
    return place


def load(path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def delta(lora: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    up, down = (lora[f"diffusion_model.{layer}.lora_{part}.weight"].double() for part in ("up", "down"))
    return up @ down


@pytest.mark.parametrize(
    ("dtype", "source", "target", "more"),
    [
        ("fp32", "source.safetensors", "target", []),
        (
            "bf16",
            "source.pth",
            "target.pt",
            ["--source-type", "pytorch", "--target-type", "pytorch", "--output-format", "pytorch"],
        ),
        ("fp16", "source", "target.pth", ["--target-type", "pytorch", "--diff-only"]),
    ],
)
def test_the_same_command_extracts_the_same(models, tmp_path, dtype, source, target, more):
    words = [
        "--source-model",
        models / source,
        "--target-model",
        models / target,
        "--rank",
        4,
        "--output-dtype",
        dtype,
        *more,
    ]
    theirs(EXTRACT, *words, "--output", tmp_path / "theirs")
    ours(EXTRACT, *words, "--output", tmp_path / "ours", "--svd", "exact")
    ending = ".pt" if "--output-format" in more else ".safetensors"
    one, other = load(tmp_path / f"theirs{ending}"), load(tmp_path / f"ours{ending}")
    assert {key: (t.shape, t.dtype) for key, t in one.items()} == {
        key: (t.shape, t.dtype) for key, t in other.items()
    }
    assert all(tensor.dtype == DTYPES[dtype] for tensor in other.values())
    for key in one:
        if ".lora_" not in key:
            assert torch.equal(one[key], other[key]), key
    if "--diff-only" not in more:
        wanted, found = delta(one, "big"), delta(other, "big")
        assert (wanted - found).norm() < {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[dtype] * wanted.norm()


def test_each_merges_what_the_other_extracts(models, tmp_path):
    both, words = (theirs, ours), ["--source-model", models / "source", "--output-dtype", "fp32"]
    for extract in both:
        lora = tmp_path / f"{extract.__name__}.safetensors"
        extract(
            EXTRACT, *words, "--target-model", models / "target.safetensors", "--rank", 4, "--output", lora
        )
        merged = []
        for merge in both:
            result = tmp_path / f"{extract.__name__}-{merge.__name__}.safetensors"
            merge(MERGE, *words, "--lora-model", lora, "--alpha", 0.5, "--output", result)
            merged.append(load_file(result))
        assert merged[0].keys() == merged[1].keys() == SHAPES.keys()
        for name in SHAPES:
            torch.testing.assert_close(*(one[name] for one in merged), atol=1e-5, rtol=1e-6)
        assert not torch.equal(
            merged[0]["big.weight"], load_file(models / "source.safetensors")["big.weight"]
        )


def test_a_randomised_extraction_loses_no_more_than_one_percent_beyond_theirs(models, tmp_path):
    words = [
        "--source-model",
        models / "source",
        "--target-model",
        models / "target",
        "--rank",
        3,
        "--output-dtype",
        "fp32",
    ]
    source, target = (
        load_file(models / f"{name}.safetensors")["big.weight"].double() for name in ("source", "target")
    )
    errors = []
    for extract in (theirs, ours):
        lora = tmp_path / f"{extract.__name__}.safetensors"
        extract(EXTRACT, *words, "--output", lora)
        errors.append((target - source - delta(load_file(lora), "big")).norm().item())
    assert errors[1] <= 1.01 * errors[0]
