"""litlora/formats/diffusion_names.py: the names of diffusion models in both layouts.

What diffusers itself makes of the original names is in tests/diffusion_files, whose make.py tells
how.
"""

import gzip
import json

import pytest
from conftest import REPO

from litlora.formats.aliases import ALL, Part
from litlora.formats.diffusion_names import other_names, spelling

FILES = json.loads(gzip.decompress((REPO / "tests/diffusion_files/names.json.gz").read_bytes()))


@pytest.mark.parametrize("model", FILES)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_diffusers_model_goes_by_its_original_names(model, prefix):
    shapes = {prefix + name: shape for name, shape in FILES[model]["diffusers"].items()}
    found = other_names(shapes)
    expected = {
        f"unet.{name}": tuple(Part(prefix + tensor, tuple(rows), tuple(of)) for tensor, rows, of in parts)
        for name, parts in FILES[model]["maps"].items()
    }
    assert found == expected


@pytest.mark.parametrize("model", FILES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_an_original_model_goes_by_the_names_of_diffusers(model, prefix):
    shapes = {prefix + name: shape for name, shape in FILES[model]["original"].items()}
    found = other_names(shapes)
    expected: dict[str, set[tuple]] = {}
    for name, parts in FILES[model]["maps"].items():
        for tensor, rows, of in parts:
            expected.setdefault(f"unet.{tensor}", set()).add((prefix + name, tuple(of), tuple(rows)))
    for name, parts in expected.items():
        assert {(part.tensor, part.rows, part.of) for part in found[name]} == parts, name


def test_a_model_of_another_kind_has_no_other_names():
    llama, gpt2 = "model.layers.0.self_attn.q_proj.weight", "transformer.h.0.attn.c_attn.weight"
    assert other_names({llama: (4, 4), gpt2: (4, 12)}) == {}


def test_open_clip_keeps_query_key_and_value_in_one_matrix():
    where = "conditioner.embedders.1.model.transformer.resblocks.3"
    found = other_names(
        {
            f"{where}.attn.in_proj_weight": (24, 8),
            f"{where}.attn.in_proj_bias": (24,),
            f"{where}.mlp.c_fc.weight": (32, 8),
        }
    )
    layer = "text_encoder_2.encoder.layers.3"
    for i, part in enumerate("qkv"):
        for end in ("weight", "bias"):
            expected = (Part(f"{where}.attn.in_proj_{end}", (8 * i, 8 * i + 8)),)
            assert found[f"{layer}.self_attn.{part}_proj.{end}"] == expected
    assert found[f"{layer}.mlp.fc1.weight"] == (Part(f"{where}.mlp.c_fc.weight", ALL),)


@pytest.mark.parametrize(
    "keys",
    [
        (
            "lora_unet_down_blocks_0_attentions_0_to_q",
            "unet.down_blocks.0.attentions.0.to_q",
            "base_model.model.unet.down_blocks.0.attentions.0.to_q",
            "unet.down_blocks.0.attentions.0.processor.to_q",
        ),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "text_encoder.encoder.layers.0.mlp.fc1",
        ),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv"),
    ],
)
def test_the_spellings_of_one_name(keys):
    assert len({spelling(key).flat for key in keys}) == 1
