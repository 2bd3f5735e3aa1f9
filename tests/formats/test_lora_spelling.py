"""litlora/formats/lora_spelling.py: the same layers under several names."""

from pathlib import Path

import pytest

from litlora.errors import CheckpointError
from litlora.formats.lora_spelling import in_first_spelling

A, B = Path("a.safetensors"), Path("b.safetensors")


def renamed(first: list[str], second: list[str]) -> list[str]:
    return [*in_first_spelling([(A, first), (B, second)])[1].values()]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("lora_unet_x_q", "diffusion_model.x.q", "lora_unet_x_q"),
        ("diffusion_model.x.q", "lora_unet_x_q", "diffusion_model.x.q"),
        ("diffusion_model.x.q", "transformer.x.q", "diffusion_model.x.q"),
        ("lora_te1_text_model_x_q", "text_encoder.text_model.x.q", "lora_te1_text_model_x_q"),
    ],
)
def test_a_layer_gets_the_name_of_the_first_file(first, second, expected):
    assert renamed([first], [second]) == [expected]


def test_a_layer_that_the_first_file_lacks_gets_its_style():
    names = ["diffusion_model.x.q", "diffusion_model.y.to_k"]
    assert renamed(["lora_unet_x_q"], names) == ["lora_unet_x_q", "lora_unet_y_to_k"]
    with pytest.raises(CheckpointError, match="name b.safetensors first"):
        renamed(["diffusion_model.x.q"], ["lora_unet_x_q", "lora_unet_y_to_k"])


def test_names_that_are_equal_but_for_their_dots_are_two_layers():
    names = ["diffusion_model.a.b_c", "diffusion_model.a_b.c"]
    assert renamed(names, names) == names


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (["x.q", "lora_unet_x_q"], ["x.q"], "a.safetensors: x.q and lora_unet_x_q name one layer"),
        (
            ["lora_te_x", "lora_unet_input_blocks_1_1_proj_in"],
            ["lora_te_x", "lora_unet_down_blocks_0_attentions_0_proj_in"],
            "b.safetensors: names layers as diffusers does, and a.safetensors as the original files do",
        ),
    ],
)
def test_what_would_be_stored_twice_is_refused(first, second, says):
    with pytest.raises(CheckpointError, match=says):
        renamed(first, second)
