"""Weights in 4 and 8 bits: the values are bitsandbytes' own, and a folder of such weights behaves
everywhere like a folder of the dequantised values."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fails, succeeds
from families import save_folder
from quantized import as_json, eight_bit, four_bit, quantize_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.checkpoint import open_checkpoint
from litlora.errors import CheckpointError
from litlora.frozen.bitsandbytes import find_quantized
from litlora.frozen.few_bits import Quantized
from litlora.load import load
from litlora.storage.fingerprint import fingerprint

FILES = Path(__file__).parent.parent / "bitsandbytes_files"


def read(stored: dict[str, Tensor]) -> dict[str, Tensor | Quantized]:
    return find_quantized(stored, dict.fromkeys(stored, Path("model.safetensors")))


def test_the_values_are_those_of_bitsandbytes():
    found, expected = read(load_file(FILES / "stored.safetensors")), load_file(FILES / "expected.safetensors")
    assert found.keys() == {f"{name}.weight" for name in expected}
    for name, values in expected.items():
        matrix = found[f"{name}.weight"]
        assert matrix.dtype == values.dtype and matrix.shape == values.shape
        assert torch.equal(matrix.tensor(), values)
        assert torch.equal(matrix[5:17], values[5:17])
        assert torch.equal(matrix.rows(slice(5, 17)), values[5:17])
        assert torch.equal(matrix.rows(), values)
        some = torch.tensor([3, 4, 5, 20, 21, 0])
        assert torch.equal(matrix.take(some)[1:5], values[some[1:5]])
        assert torch.equal(torch.cat(list(matrix.take(some).blocks())), values[some])


@pytest.mark.slow
def test_whatever_bitsandbytes_writes_is_read_as_it_reads_it():
    pytest.importorskip("bitsandbytes")
    spec = importlib.util.spec_from_file_location("bitsandbytes_make", FILES / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for shape in ((48, 80), (7, 96), (64, 128)):
        weight = torch.randn(shape)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for kind, blocksize, nested in (
                ("nf4", 64, True),
                ("nf4", 32, False),
                ("fp4", 128, True),
                ("fp4", 4096, False),
            ):
                options = {"quant_type": kind, "blocksize": blocksize, "compress_statistics": nested}
                stored = make.quantized_4bit("a", weight.to(dtype), **options)
                assert torch.equal(read(stored)["a.weight"].tensor(), make.dequantized_4bit("a", stored)), (
                    shape,
                    dtype,
                    options,
                )
        stored = make.quantized_8bit("a", weight.half())
        exact = dataclasses.replace(read(stored)["a.weight"], dtype=torch.float32).tensor()
        assert torch.equal(exact, make.bnb.int8_vectorwise_dequant(stored["a.weight"], stored["a.SCB"]))


@pytest.mark.parametrize("how", ["nf4", "fp4", "8bit"])
def test_logits_are_those_of_transformers_with_bitsandbytes(how, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Sizes that bitsandbytes' CPU kernels support: rows of whole blocks.
    save_folder("llama", tmp_path / "plain", hidden_size=128, intermediate_size=192)
    options = {"load_in_8bit": True} if how == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": how}
    options |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    settings = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "quantized")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").dequantize().float().eval()
    ids = torch.arange(20)[None] * 7 % 90
    shutil.copy(
        Path(__file__).parents[2] / "checkpoints/litlora/quickstart/tokenizer.json", tmp_path / "quantized"
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            load(tmp_path / "quantized").model.float()(ids), theirs(ids).logits, atol=2e-5, rtol=0
        )


# ---- folders


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt-neox", "gpt2", "falcon-40b", "mixtral"])
def test_a_quantized_folder_is_the_folder_of_its_values(family, tmp_path):
    """Also where layers are fused, interleaved or transposed. The fingerprint is the same, so an
    adapter of one fits the other."""
    save_folder(family, tmp_path / "quantized")
    shutil.copytree(tmp_path / "quantized", tmp_path / "plain")
    kind = "int8" if family in ("gpt2", "mixtral") else "nf4"
    save_file(
        quantize_folder(tmp_path / "quantized", kind, nested=True), tmp_path / "plain/model.safetensors"
    )
    ours, plain = open_checkpoint(tmp_path / "quantized"), open_checkpoint(tmp_path / "plain")
    assert ours.tensors.keys() == plain.tensors.keys() and ours.config == plain.config
    quantized = {name: tensor for name, tensor in ours.tensors.items() if isinstance(tensor, Quantized)}
    assert len(quantized) >= 4 * ours.config.num_hidden_layers
    assert all(torch.equal(tensor.tensor(), plain.tensors[name]) for name, tensor in quantized.items())
    assert ours.fingerprint == plain.fingerprint == fingerprint(plain.tensors)


@pytest.fixture
def quantized_dir(tmp_path, tokenizer_dir) -> Path:
    """A Llama folder in nf4 with double quantization; `plain` beside it holds the same values in
    bf16."""
    save_folder("llama", tmp_path / "quantized", vocab_size=400)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "quantized")
    shutil.copytree(tmp_path / "quantized", tmp_path / "plain")
    save_file(
        quantize_folder(tmp_path / "quantized", "nf4", nested=True),
        tmp_path / "plain/model.safetensors",
        {"format": "pt"},
    )
    return tmp_path / "quantized"


@pytest.mark.slow
def test_a_peft_adapter_of_a_quantized_base_merges_to_what_was_live(quantized_dir, tmp_path):
    """The case of QLoRA: PEFT's own model of these values has the same logits as the merged one."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    live.peft_config["default"].base_model_name_or_path = str(quantized_dir)
    live.save_pretrained(tmp_path / "adapter")
    out = ("--out_dir", tmp_path / "merged", "--dtype", "fp32")
    said = succeeds("scripts/merge_lora.py", "--lora_path", tmp_path / "adapter", *out).stdout
    assert "stored in 4 bits (nf4, bitsandbytes) and dequantised to bfloat16" in said and "verified" in said
    ids = torch.arange(20)[None] * 7 % 300
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path / "merged").model(ids), live(ids).logits, atol=2e-5, rtol=0)

    succeeds(
        "scripts/merge_lora.py", "--lora_path", tmp_path / "adapter", "--out_dir", tmp_path / "merged_bf16"
    )
    answers = [
        succeeds(
            "chat/base.py", "--checkpoint_dir", tmp_path / name, "--prompt", "the fox", "--temperature", 0
        ).stdout
        for name in ("adapter", "merged_bf16")
    ]
    assert answers[0] == answers[1]


def test_every_command_takes_a_quantized_folder_and_says_what_that_means(
    quantized_dir, tmp_path, alpaca_file
):
    words = [
        "--data",
        "JSON",
        "--data.path",
        alpaca_file,
        "--train.max_steps",
        2,
        "--train.max_seq_length",
        64,
        "--prompt_style",
        "plain",
    ]
    said = succeeds(
        "finetune/lora.py", "--checkpoint_dir", quantized_dir, "--out_dir", tmp_path / "run", *words
    ).stdout
    assert said.count("stored in 4 bits") == 1
    said = succeeds(
        "scripts/convert_hf_checkpoint.py", "--checkpoint_dir", quantized_dir, "--out_dir", tmp_path / "ours"
    ).stdout
    assert "stored in 4 bits" in said
    converted, plain = open_checkpoint(tmp_path / "ours"), open_checkpoint(tmp_path / "plain")
    assert all(torch.equal(converted.tensors[name], tensor) for name, tensor in plain.tensors.items())
    out = ("--out_dir", tmp_path / "merged")
    succeeds(
        "scripts/merge_lora.py",
        "--lora_path",
        tmp_path / "run/final",
        "--checkpoint_dir",
        tmp_path / "ours",
        *out,
    )
    said = json.loads(succeeds("scripts/inspect_checkpoint.py", quantized_dir, "--json").stdout)
    assert set(said["dtypes"]) == {"nf4", "bfloat16"} and said["fingerprint"] == plain.fingerprint
    assert "stored in 4 bits" in said["notices"][0]
    succeeds(
        "scripts/convert_lit_checkpoint.py", "--checkpoint_dir", quantized_dir, "--out_dir", tmp_path / "hf"
    )
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())
    written = load_file(tmp_path / "hf/model.safetensors")
    assert all(
        torch.equal(written[name], tensor)
        for name, tensor in load_file(tmp_path / "plain/model.safetensors").items()
    )


def test_other_kinds_of_quantization_are_refused_by_name(quantized_dir):
    config = json.loads((quantized_dir / "config.json").read_text())
    for method in ("hqq", "quip", "aqlm", "torchao"):
        (quantized_dir / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": method}})
        )
        with pytest.raises(CheckpointError, match=f"weights quantized by '{method}' are not supported, only"):
            open_checkpoint(quantized_dir)
    (quantized_dir / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"load_in_4bit": True}})
    )  # as of 2023
    assert open_checkpoint(quantized_dir).config.hidden_size == 32


# ---- files that contradict themselves


STATE = ".weight.quant_state.bitsandbytes__nf4"
GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 32]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
LIES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "too large": ({STATE: as_json(GOOD | NESTED | {"shape": [2**20, 2**20]})}, "bytes of 4-bit values"),
    "too small": ({STATE: as_json(GOOD | NESTED | {"shape": [1, 1]})}, "bytes of 4-bit values"),
    "below zero": ({STATE: as_json(GOOD | NESTED | {"shape": [-6, -32]})}, "is not that of a matrix"),
    "no shape": ({STATE: as_json({**GOOD, **NESTED, "shape": None})}, "is not that of a matrix"),
    "blocks of none": ({STATE: as_json(GOOD | NESTED | {"blocksize": 0})}, "blocksize 0 is not one of"),
    "blocks of a fraction": (
        {STATE: as_json(GOOD | NESTED | {"blocksize": 64.0})},
        "blocksize 64.0 is not one of",
    ),
    "larger blocks": ({STATE: as_json(GOOD | NESTED | {"blocksize": 128})}, "absmax has 3 values"),
    "an attribute of torch": (
        {STATE: as_json(GOOD | NESTED | {"dtype": "load"})},
        "dtype 'load' is not one of",
    ),
    "another type": (
        {STATE: as_json(GOOD | NESTED | {"quant_type": "fp4"})},
        "quant_type 'fp4' is not supported",
    ),
    "nested blocks of none": (
        {STATE: as_json(GOOD | NESTED | {"nested_blocksize": 0})},
        "nested_blocksize 0 is not a block size",
    ),
    "no offset": (
        {STATE: as_json(GOOD | NESTED | {"nested_offset": "x"})},
        "nested_offset 'x' is not a finite number",
    ),
    "half a JSON": ({STATE: as_json(GOOD)[:-4]}, "is not JSON"),
    "a deep JSON": ({STATE: torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}, "is not JSON"),
    "a long JSON": ({STATE: torch.full((10**6,), 32, dtype=torch.uint8)}, "at most 4096 bytes"),
    "a list": ({STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)}, "must hold a JSON object"),
    "no weight": ({".weight": None}, "a.weight, which is missing"),
    "no absmax": ({".weight.absmax": None}, "absmax, which is missing"),
    "absmax as it was": (
        {".weight.absmax": torch.ones(3)},
        "absmax has 3 values in float32; it needs 3 in uint8",
    ),
    "a short nested map": ({".weight.nested_quant_map": torch.ones(3)}, "nested_quant_map has 3 values"),
    "no outer scales": ({".weight.nested_absmax": torch.ones(0)}, "nested_absmax has 0 values"),
    "another table": ({".weight.quant_map": torch.ones(16)}, "quant_map is not that of nf4"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_four_bits_is_refused_in_one_line(lie):
    changes, says = LIES[lie]
    parts, _ = four_bit(torch.randn(6, 32), "nf4", nested=True)
    stored = {f"a{end}": tensor for end, tensor in (parts | changes).items() if tensor is not None}
    with pytest.raises(CheckpointError) as error:
        read(stored)
    assert (
        says in str(error.value)
        and str(error.value).startswith("model.safetensors: a.")
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({".SCB": torch.ones(5)}, "holds 5 scales; the weight has 6 rows"),
        ({".weight": torch.ones(6, 32)}, "is not a matrix in int8"),
        ({".weight": None}, "a.weight, which is missing"),
        ({".weight_format": torch.tensor(2, dtype=torch.uint8)}, "a layout for GPUs"),
        ({STATE: as_json(GOOD)}, "a.weight, which is missing"),  # both claim it
    ],
)
def test_a_lie_about_eight_bits_is_refused_in_one_line(changes, says):
    parts, _ = eight_bit(torch.randn(6, 32))
    with pytest.raises(CheckpointError, match=says):
        read({f"a{end}": tensor for end, tensor in (parts | changes).items() if tensor is not None})


def test_values_that_are_not_finite_are_refused_wherever_they_are_used(quantized_dir, tmp_path):
    file = quantized_dir / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight.nested_absmax"
    save_file(load_file(file) | {name: torch.tensor([float("nan")])}, file, {"format": "pt"})
    for words in (
        ("chat/base.py", "--prompt", "x"),
        ("scripts/convert_hf_checkpoint.py", "--out_dir", tmp_path / "out"),
        ("scripts/convert_lit_checkpoint.py", "--out_dir", tmp_path / "out"),
    ):
        assert "up_proj.weight holds values that are not finite" in fails(
            *words, "--checkpoint_dir", quantized_dir
        )
        assert not (tmp_path / "out").exists()
