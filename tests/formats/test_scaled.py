"""Weights in 8-bit floating point with a scale: what they are is q · scale, in every command."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora_tools import EXTRACT, MERGE, fails, succeeds

from litlora.formats.lora_files import read_lora

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OUT, IN = 256, 384
SCALES = {
    "one": (torch.tensor(0.02), lambda s: s),
    "one, as a vector": (torch.tensor([0.02]), lambda s: s),
    "a row": (torch.rand(OUT) * 0.02 + 0.01, lambda s: s[:, None]),
    "a row, as a column": (torch.rand(OUT, 1) * 0.02 + 0.01, lambda s: s),
    "a block": (
        torch.rand(2, 3) * 0.02 + 0.01,
        lambda s: s.repeat_interleave(128, 0).repeat_interleave(128, 1),
    ),
}
NAMES = ("x.weight_scale", "x.scale_weight", "x.weight_scale_inv")


def q(dtype: torch.dtype = E4M3, shape=(OUT, IN)) -> torch.Tensor:
    return (torch.randn(shape) * 50).to(dtype)


def lora(tmp_path) -> torch.Tensor:
    """What its file adds to x.weight."""
    B, A = torch.randn(OUT, 4), torch.randn(4, IN)
    save_file({"x.lora_A.weight": A, "x.lora_B.weight": B}, tmp_path / "lora.safetensors")
    return B @ A


def words(tmp_path, source: dict, metadata: dict | None = None) -> list[object]:
    save_file(source, tmp_path / "source.safetensors", metadata)
    files = ["--source-model", tmp_path / "source.safetensors", "--lora-model", tmp_path / "lora.safetensors"]
    return [*files, "--output", tmp_path / "merged"]


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_a_merge_adds_to_q_times_scale_and_removes_the_scale(tmp_path, kind, name):
    scale, broadcast = SCALES[kind]
    added, weight, other = lora(tmp_path), q(), q()
    source = {"x.weight": weight, name: scale, "y.weight": other, name.replace("x.", "y."): scale.clone()}
    source |= {"x.input_scale": torch.tensor(3.0), "scaled_fp8": torch.empty(2, dtype=E4M3)}
    said = succeeds(MERGE, *words(tmp_path, source), "--output_dtype", "fp32")
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == {"x.weight", "y.weight"}
    wanted = weight.double() * broadcast(scale).double()
    torch.testing.assert_close(merged["x.weight"].double(), wanted + added.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged["y.weight"], other.float() * broadcast(scale))
    assert "float8_e4m3fn is written as fp32 without its 4 scales and the like" in said


def test_blocks_that_do_not_divide_the_matrix(tmp_path):
    lora(tmp_path)
    weight, scale = q(shape=(200, 300)), torch.rand(2, 3) + 0.1
    full = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    source = {"z.weight": weight, "z.weight_scale_inv": scale, "x.weight": torch.zeros(OUT, IN)}
    succeeds(MERGE, *words(tmp_path, source), "--output_dtype", "fp32")
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["z.weight"], weight.float() * full)


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_an_output_in_8_bits_has_new_scales_where_something_was_added(tmp_path, kind, dtype):
    scale, broadcast = SCALES[kind]
    added, source = lora(tmp_path), {"x.weight": q(dtype), "x.weight_scale": scale}
    source |= {"y.weight": q(dtype), "y.weight_scale": scale.clone(), "norm": torch.randn(3).bfloat16()}
    source |= {"x.input_scale": torch.tensor(3.0), "scaled_fp8": torch.empty(0, dtype=dtype)}
    metadata = {"_quantization_metadata": json.dumps({"layers": {}}), "sshs_model_hash": "a"}
    succeeds(MERGE, *words(tmp_path, source, metadata), "--output_dtype", "fp8")
    merged = load_file(tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "_quantization_metadata"}
    assert {name: (one.dtype, one.shape) for name, one in merged.items()} == {
        name: (one.dtype, one.shape) for name, one in source.items()
    }
    changed = {name for name, one in source.items() if not torch.equal(one.float(), merged[name].float())}
    assert changed == {"x.weight", "x.weight_scale"}
    wanted = source["x.weight"].float() * broadcast(scale) + added
    found = merged["x.weight"].float() * broadcast(merged["x.weight_scale"])
    # Half a step of 3 (2) bits of mantissa.
    step = 2**-4 if dtype == E4M3 else 2**-3
    assert ((found - wanted).abs() <= step * wanted.abs() + 2e-3 * wanted.abs().max()).all()
    assert merged["x.weight"].float().abs().max() == torch.finfo(dtype).max


def test_8_bits_without_scales_stay_so_and_16_bits_cannot_become_8(tmp_path):
    added, weight = lora(tmp_path), q()
    succeeds(MERGE, *words(tmp_path, {"x.weight": weight, "y": torch.ones(2)}), "--output_dtype", "fp8")
    merged = load_file(tmp_path / "merged.safetensors")
    assert torch.equal(merged["x.weight"].float(), (weight.float() + added).to(E4M3).float())
    assert merged["y"].dtype == torch.float32
    assert "stored in 8 bits, which this one is not" in fails(
        MERGE, *words(tmp_path, {"x.weight": weight.float()}), "--output_dtype", "fp8"
    )
    source = {"x.weight": torch.full((OUT, IN), 448.0).to(E4M3)}
    assert "beyond what float8_e4m3fn without a scale can hold" in fails(
        MERGE, *words(tmp_path, source), "--output_dtype", "fp8"
    )


def comfy(**settings: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def test_comfyuis_description_of_a_layer(tmp_path):
    lora(tmp_path)
    weight, scale = q(), torch.rand(4, 6) + 0.1
    source = {"x.weight": weight, "x.weight_scale": scale}
    source["x.comfy_quant"] = comfy(format="float8_e4m3fn_blockwise", group_size=64)
    succeeds(MERGE, *words(tmp_path, source), "--output_dtype", "fp32", "--alpha", 0)
    wanted = weight.float() * scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["x.weight"], wanted)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"x.weight_scale_2": torch.ones(1)}, "x.weight_scale_2 beside it is not a scale of a kind"),
        ({"x.weight_zero_point": torch.ones(1)}, "x.weight_zero_point beside it"),
        ({"x.weight.absmax": torch.ones(1)}, "x.weight.absmax beside it"),
        ({"x.weight_scale": torch.ones(3)}, r"x.weight_scale \(3,\) is not a scale of a kind"),
        ({"x.weight_scale": torch.ones(1, IN)}, r"x.weight_scale \(1, 384\)"),
        ({"x.weight_scale": torch.ones(OUT, 3).to(torch.uint8)}, "uint8"),
        ({"x.weight_scale": torch.tensor(float("nan"))}, "not a finite scale"),
        ({"x.weight_scale": torch.ones(1), "x.scale_weight": torch.ones(1)}, "it has two scales"),
        ({"x.comfy_quant": comfy(format="mxfp8")}, "has the format 'mxfp8'"),
        ({"x.comfy_quant": comfy(format="float8_e4m3fn", convrot=True)}, "has the convrot True"),
        ({"x.weight": torch.ones(OUT, IN).to(torch.int8), "x.weight_scale": torch.ones(1)}, "which is int8"),
        ({"x.weight": torch.ones(OUT, IN), "x.weight_scale": torch.tensor(2.0)}, "which is float32"),
        ({"z.weight_scale": torch.tensor(2.0)}, "which is missing"),
    ],
)
def test_what_belongs_to_a_weight_and_is_not_understood_is_refused(tmp_path, parts, says):
    lora(tmp_path)
    given = words(tmp_path, {"x.weight": q(), **parts})
    save_file({"x.weight": torch.ones(OUT, IN)}, tmp_path / "target.safetensors")
    extracts = ["--source-model", tmp_path / "target.safetensors", "--output", tmp_path / "out"]
    for command in ([MERGE, *given], [EXTRACT, *extracts, "--target-model", tmp_path / "source.safetensors"]):
        message = fails(*command)
        assert "source.safetensors" in message and "use the model in 16 bits" in message
        assert re.search(says, message), message


def test_an_extraction_subtracts_what_the_weights_are(tmp_path):
    weight, scale = q(), torch.tensor(0.02)
    save_file({"x.weight": weight, "x.weight_scale": scale}, tmp_path / "a.safetensors")
    B, A = torch.randn(OUT, 3), torch.randn(3, IN)
    save_file({"x.weight": weight.float() * scale + B @ A}, tmp_path / "b.safetensors")
    for source, target, sign in (("a", "b", 1), ("b", "a", -1)):
        files = [tmp_path / f"{name}.safetensors" for name in (source, target)]
        given = ["--source-model", files[0], "--target-model", files[1], "--output", tmp_path / "lora"]
        succeeds(EXTRACT, *given, "--min_size", 0, "--rank", 3, "--output_dtype", "fp32")
        (update,) = read_lora(tmp_path / "lora.safetensors").updates.values()
        torch.testing.assert_close(update.product(), sign * B @ A, rtol=1e-4, atol=1e-4)


def test_factors_in_8_bits_with_a_scale(tmp_path):
    A, B = torch.randn(4, IN).to(E4M3), torch.randn(OUT, 4).to(E4M3)
    tensors = {"x.lora_A.weight": A, "x.lora_B.weight": B, "x.lora_B.weight_scale": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "lora.safetensors")
    product = read_lora(tmp_path / "lora.safetensors").updates["x"].product()
    torch.testing.assert_close(product, 0.5 * B.float() @ A.float())
