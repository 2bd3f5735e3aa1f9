"""Weights that other tools than bitsandbytes stored in few bits: the values are those of the tools'
own code, and a file that contradicts itself is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from litlora.errors import CheckpointError
from litlora.frozen.few_bits import Quantized
from litlora.frozen.ggml import BLOCK_FORMATS, GGML
from litlora.frozen.methods import Storage
from litlora.frozen.quantized import QuantizedWeight
from litlora.frozen.stored import find_stored

FILES = Path(__file__).parent.parent / "stored_files"


def compressed(**weights) -> dict:
    group = {"weights": {"num_bits": 4, "type": "int", **weights}}
    return {"format": "pack-quantized", "config_groups": {"group_0": group}}


SETTINGS = {
    **{f"gptq-{name}": {"bits": 4, "group_size": 32} for name in ("sym", "asym", "act")},
    "gptq-whole": {"bits": 4, "group_size": -1},
    "gptq-two": {"bits": 2, "group_size": 32},
    "gptq-three": {"bits": 3, "group_size": 32},
    "gptq-eight": {"bits": 8, "group_size": 32},
    "awq-groups": {"bits": 4, "group_size": 32, "version": "gemm"},
    "awq-whole": {"bits": 4, "group_size": -1},
    "compressed-tensors-packed": compressed(),
    "compressed-tensors-asymmetric": compressed(symmetric=False),
    "compressed-tensors-packed_eight": compressed(num_bits=8),
    "compressed-tensors-int8": {**compressed(num_bits=8), "format": "int-quantized"},
    "compressed-tensors-fp8_channel": {**compressed(num_bits=8, type="float"), "format": "float-quantized"},
    "compressed-tensors-fp8_tensor": {**compressed(num_bits=8, type="float"), "format": "float-quantized"},
    "fp8-blocks": {"weight_block_size": [32, 32]},
    "mxfp4-experts": {},
}


def storage(case: str, **changes) -> Storage:
    method = "compressed-tensors" if case.startswith("compressed") else case.split("-")[0]
    return Storage.parse({"quant_method": method, **SETTINGS[case], **changes})


def read(stored: dict[str, Tensor], how: Storage) -> dict[str, Tensor | Quantized]:
    return find_stored(stored, dict.fromkeys(stored, Path("model.safetensors")), how)


@pytest.mark.parametrize("case", SETTINGS)
def test_the_values_are_those_of_the_tool(case):
    values = load_file(FILES / f"{case}-expected.safetensors")["layer"]
    found = read(load_file(FILES / f"{case}.safetensors"), storage(case))
    assert len(found) == 1
    [matrix] = found.values()
    assert matrix.dtype == values.dtype and matrix.shape == values.shape
    assert torch.equal(matrix.tensor(), values)
    assert torch.equal(matrix.rows(slice(5, 17)), values[5:17])
    some = torch.tensor([3, 4, 5, 20, 21, 0])
    assert torch.equal(matrix.take(some).tensor(), values[some])
    assert matrix.nbytes < values.nbytes * (0.75 if matrix.bits == 8 else 0.45)
    weight = QuantizedWeight(matrix)
    x, dy = torch.randn(3, matrix.columns), torch.randn(3, len(values))
    assert torch.equal(weight.times(x), x @ values.float().T) and weight.shape == values.shape
    assert torch.equal(weight.back(dy), dy @ values.float())
    assert torch.equal(weight.rows(), values)


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_the_values_of_ggmls_blocks_are_those_of_the_gguf_package(kind):
    values = load_file(FILES / f"gguf-{kind}-expected.safetensors")["layer"]
    raw = load_file(FILES / f"gguf-{kind}.safetensors")["layer.raw"]
    matrix = GGML("layer", Path("a.gguf"), torch.float32, 512, range(24), raw, BLOCK_FORMATS[kind])
    assert torch.equal(matrix.tensor(), values) and torch.equal(matrix[5:17], values[5:17])
    some = torch.tensor([3, 4, 5, 20, 21, 0])
    assert torch.equal(matrix.take(some)[1:5], values[some[1:5]])
    W = torch.empty(6, 512)
    matrix.take(some).write_to(W)
    assert torch.equal(W, values[some])
    place = BLOCK_FORMATS[kind].scales[-1]
    raw[7, place : place + 2] = 255
    for use in (matrix.check_finite, matrix.tensor, matrix.take(some.clone().fill_(7)).rows):
        with pytest.raises(CheckpointError, match="a.gguf: layer .*not finite"):
            use()


def test_zero_points_of_gptq_are_stored_less_one_only_in_the_first_version():
    stored = load_file(FILES / "gptq-asym.safetensors")
    first = read(stored, storage("gptq-asym"))["layer.weight"]
    ones = int.from_bytes(b"\x11" * 4)
    second = {**stored, "layer.qzeros": stored["layer.qzeros"] + ones}
    found = read(second, storage("gptq-asym", checkpoint_format="gptq_v2"))["layer.weight"]
    assert torch.equal(found.tensor(), first.tensor())
    without = {name: part for name, part in stored.items() if not name.endswith("g_idx")}
    assert torch.equal(read(without, storage("gptq-asym"))["layer.weight"].tensor(), first.tensor())


NAN, NEGATIVE = float("nan"), -1


def changed(part: Tensor, place: int, value: float) -> Tensor:
    part = part.clone()
    part.view(-1)[place] = value
    return part


DAMAGE = {
    "gptq no zeros": ("gptq-act", "qzeros", lambda part: None, "needs layer.qzeros, which is missing"),
    "gptq no scales": ("gptq-act", "scales", lambda part: None, "needs layer.scales, which is missing"),
    "gptq negative": ("gptq-act", "g_idx", lambda p: changed(p, 3, -1), "a g_idx with group -1; there are 2"),
    "gptq beyond": ("gptq-act", "g_idx", lambda p: changed(p, 3, 2), "a g_idx with group 2; there are 2"),
    "gptq short": ("gptq-act", "g_idx", lambda p: p[:-1].clone(), r"a g_idx \(63,\); it needs 64"),
    "gptq nan": (
        "gptq-act",
        "scales",
        lambda p: changed(p, 0, NAN),
        "scales holds values that are not finite",
    ),
    "gptq shape": ("gptq-act", "scales", lambda p: p[:1].clone(), "has scales .1, 96.; a weight of 96 x 64"),
    "gptq dtype": ("gptq-act", "qweight", lambda p: p.long(), "it must be .8, 96. in int32"),
    "gptq zeros": ("gptq-act", "qzeros", lambda p: p[:, :3].clone(), "qzeros is .2, 3. in int32; it must be"),
    "awq zeros": ("awq-groups", "qzeros", lambda p: p[:2].clone(), "qzeros is .2, 8. in int32; it must be"),
    "awq nan": (
        "awq-groups",
        "scales",
        lambda p: changed(p, 9, NAN),
        "scales holds values that are not finite",
    ),
    "awq scales": (
        "awq-groups",
        "scales",
        lambda p: p[:, 1:].clone(),
        "has scales .4, 63.; a weight of 64 x",
    ),
    "packed shape": (
        "compressed-tensors-packed",
        "weight_shape",
        lambda p: torch.tensor([2**40, 2**40]),
        "not that of a matrix",
    ),
    "packed other": (
        "compressed-tensors-packed",
        "weight_shape",
        lambda p: torch.tensor([40, 88]),
        "does not hold 40 x 88 numbers of 4 bits",
    ),
    "packed no shape": ("compressed-tensors-packed", "weight_shape", lambda p: None, "which is missing"),
    "int8 scales": (
        "compressed-tensors-int8",
        "weight_scale",
        lambda p: p[1:].clone(),
        r"has a weight_scale \(39, 1\); the weight has 40 rows",
    ),
    "fp8 no scale": ("fp8-blocks", "weight_scale_inv", lambda p: None, "no weight_scale and no weight_scale"),
    "fp8 nan": ("fp8-blocks", "weight_scale_inv", lambda p: changed(p, 1, NAN), "not finite"),
    "fp8 blocks": (
        "fp8-blocks",
        "weight_scale_inv",
        lambda p: p[1:].clone(),
        "does not fit a weight of 64 x 96",
    ),
    "mxfp4 no scales": (
        "mxfp4-experts",
        "w_scales",
        lambda p: None,
        "needs layer.w_scales, which is missing",
    ),
    "mxfp4 shape": ("mxfp4-experts", "w_scales", lambda p: p[:1].clone(), "that do not fit it"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_parts_are_refused_with_their_names(what):
    case, end, change, message = DAMAGE[what]
    stored = load_file(FILES / f"{case}.safetensors")
    part = change(stored.pop(f"layer.{end}"))
    stored |= {} if part is None else {f"layer.{end}": part}
    with pytest.raises(CheckpointError, match=rf"^model.safetensors: layer\.\w+ .*{message}"):
        read(stored, storage(case))


@pytest.mark.parametrize(
    ("case", "part", "value"),
    [("fp8-blocks", "weight", 0x7F), ("fp8-blocks", "weight", 0xFF), ("mxfp4-experts", "w_scales", 0xFF)],
)
def test_entries_that_are_not_numbers_are_refused_wherever_they_are_used(case, part, value):
    stored = load_file(FILES / f"{case}.safetensors")
    stored[f"layer.{part}"] = stored[f"layer.{part}"].clone()
    stored[f"layer.{part}"].view(torch.uint8).view(-1)[70] = value
    [matrix] = read(stored, storage(case)).values()
    for use in (matrix.check_finite, matrix.tensor, matrix.rows):
        with pytest.raises(CheckpointError, match="model.safetensors: layer.* not finite"):
            use()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "weights quantized by 'hqq' are not supported, only those of bitsandbytes"),
        ({"quant_method": "aqlm"}, "weights quantized by 'aqlm' are not supported"),
        ({"quant_method": "gptq", "bits": 5}, "gptq: bits 5 is not one of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "gptq: group_size 0 must be"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"a": {}}}, "gptq: dynamic"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "'marlin' is not supported, only",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' is not supported, only gemm"),
        ({"quant_method": "awq", "bits": 3}, "awq: bits 3 is not one of 4"),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "fp8: weight_block_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        (
            {"quant_method": "compressed-tensors", **compressed(), "format": "nvfp4-pack-quantized"},
            "format 'nvfp4-pack-quantized' is not supported, only",
        ),
        ({"quant_method": "compressed-tensors", **compressed(num_bits=3)}, "num_bits 3 of type 'int'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings, message):
    with pytest.raises(CheckpointError, match=f"quantization_config: .*{message}"):
        Storage.parse(settings)
