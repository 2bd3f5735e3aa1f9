"""litlora/adapters/apply.py: LoRA files on models whose layers have other names, or other rows."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import save_file
from torch import Tensor

from litlora.adapters.apply import added, match
from litlora.errors import CheckpointError
from litlora.formats.lora_files import read_lora

WIDTH, MLP, RANK = 8, 32, 2
GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def pair(rows: int, columns: int = WIDTH) -> tuple[Tensor, Tensor]:
    """up, down"""
    return noise(rows, RANK), noise(RANK, columns)


def merged(
    tmp_path: Path, lora: Mapping[str, tuple[Tensor, Tensor]], model: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The model with a file of these factors, of scale 1, added."""
    file = tmp_path / "lora.safetensors"
    tensors = {f"{key}.lora_up.weight": up for key, (up, _) in lora.items()}
    save_file(tensors | {f"{key}.lora_down.weight": down for key, (_, down) in lora.items()}, file)
    additions, unmatched = match([(read_lora(file), 1.0)], model)
    assert not unmatched
    return {name: added(name, W, additions.get(name, []), torch.float32) for name, W in model.items()}


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}


UNET = "model.diffusion_model."
SINGLE_FILE = {
    f"{UNET}input_blocks.0.0": (8, 4, 3, 3),
    f"{UNET}input_blocks.1.0.in_layers.2": (8, 8, 3, 3),
    f"{UNET}input_blocks.1.1.proj_in": (8, 8, 1, 1),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q": (8, 8),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_out.0": (8, 8),
    f"{UNET}input_blocks.2.0.in_layers.2": (8, 8, 3, 3),
    f"{UNET}input_blocks.2.1.transformer_blocks.0.attn1.to_q": (8, 8),
    f"{UNET}input_blocks.3.0.op": (8, 8, 3, 3),
    f"{UNET}input_blocks.4.0.in_layers.2": (8, 8, 3, 3),
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q": (8, 8),
    f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q": (8, 8),
    f"{UNET}output_blocks.0.0.in_layers.2": (8, 16, 3, 3),
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in", f"{UNET}input_blocks.1.1.proj_in"),
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
         f"{UNET}input_blocks.2.1.transformer_blocks.0.attn1.to_q"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
         f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out",
         f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
         f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj",
         "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
         "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"),
    ],
)  # fmt: skip
def test_diffusers_names_on_a_single_file(tmp_path, key, name):
    up, down = pair(8)
    result = merged(tmp_path, {key: (up, down)}, zeros(SINGLE_FILE))
    for other, tensor in result.items():
        expected = up @ down if other == f"{name}.weight" else torch.zeros(())
        torch.testing.assert_close(tensor, expected.reshape(tensor.shape) if expected.ndim else 0 * tensor)


def test_a_convolution_by_its_diffusers_name(tmp_path):
    up, down = noise(8, RANK, 1, 1), noise(RANK, 8, 3, 3)
    lora = {"lora_unet_down_blocks_0_downsamplers_0_conv": (up, down)}
    result = merged(tmp_path, lora, zeros(SINGLE_FILE))[f"{UNET}input_blocks.3.0.op.weight"]
    torch.testing.assert_close(result, (up.flatten(1) @ down.flatten(1)).view(8, 8, 3, 3))


def test_original_names_on_a_unet_of_diffusers(tmp_path):
    up, down = pair(8)
    shapes = {
        "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
        "down_blocks.0.resnets.1.conv1": (8, 8, 3, 3),
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (8, 8),
        "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
        "down_blocks.1.resnets.0.conv1": (8, 8, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    }
    lora = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (up, down)}
    result = merged(tmp_path, lora, zeros(shapes))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(result[name], up @ down)
    assert not any(tensor.any() for other, tensor in result.items() if other != name)


def test_a_text_encoder_of_open_clip_gets_its_rows(tmp_path):
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    q, v = pair(8), pair(8)
    layer = "text_model_encoder_layers_0_self_attn"
    lora = {f"lora_te2_{layer}_q_proj": q, f"lora_te2_{layer}_v_proj": v}
    result = merged(tmp_path, lora, {name: torch.zeros(24, 8)})[name]
    torch.testing.assert_close(result, torch.cat([q[0] @ q[1], torch.zeros(8, 8), v[0] @ v[1]]))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("text_encoder_3.encoder", "text_encoders.t5xxl.transformer.encoder"),
        ("text_encoder_2.encoder", "text_encoders.t5xxl.transformer.encoder"),  # Flux
        ("lora_te3_encoder", "text_encoders.t5xxl.transformer.encoder"),
        ("lora_te3_encoder", "encoder"),
        ("text_encoder_3.encoder", "encoder"),
    ],
)
def test_t5_within_a_whole_checkpoint_or_alone(tmp_path, key, name):
    up, down = pair(8)
    inside = ".block.0.layer.0.SelfAttention.q"
    others = {f"{name}.block.0.layer.0.SelfAttention.k": (8, 8)}
    if name != "encoder":  # CLIP's layers have other names
        others["text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"] = (8, 8)
    lora = {key + (inside.replace(".", "_") if key.startswith("lora_") else inside): (up, down)}
    result = merged(tmp_path, lora, zeros({name + inside: (8, 8), **others}))
    torch.testing.assert_close(result.pop(f"{name}{inside}.weight"), up @ down)
    assert not any(tensor.any() for tensor in result.values())


@pytest.mark.parametrize("kind", ["sd3", "flux2", "z_image"])
@pytest.mark.parametrize("flat", [True, False])
def test_every_layer_by_its_diffusers_name_on_a_whole_checkpoint(tmp_path, kind, flat):
    """Which rows of which tensor a layer is, diffusers' own conversion has told: see make.py."""
    files = json.loads(gzip.decompress((REPO / "tests/diffusion_files/names.json.gz").read_bytes()))[kind]
    layers = {
        name.removesuffix(".weight"): pair(*shape)
        for name, shape in files["diffusers"].items()
        if name.endswith(".weight") and len(shape) == 2
    }
    shapes = {name: tuple(shape) for name, shape in files["original"].items()}
    expected = {name: torch.zeros(shape) for name, shape in shapes.items()}
    lora = {}
    for name, parts in files["maps"].items():
        for tensor, rows, of in parts:
            if (layer := tensor.removesuffix(".weight")) in layers and layer != tensor:
                up, down = layers[layer]
                expected[name][slice(*of)] = (up @ down)[slice(*rows)]
                lora["lora_unet_" + layer.replace(".", "_") if flat else f"transformer.{layer}"] = up, down
    model = {f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    result = merged(tmp_path, lora, model)
    for name, change in expected.items():
        torch.testing.assert_close(result[f"model.diffusion_model.{name}"], change)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelled", ["transformer.{}", "lora_transformer_{}", "diffusion_model.{}"])
def test_separate_projections_on_a_fused_flux(tmp_path, prefix, spelled):
    double, single = f"{prefix}double_blocks.0.img_attn.qkv", f"{prefix}single_blocks.0.linear1"
    model = zeros({double: (3 * WIDTH, WIDTH), single: (3 * WIDTH + MLP, WIDTH)})
    start = {name: noise(*W.shape) for name, W in model.items()}
    parts = {
        "transformer_blocks.0.attn.to_k": (double, 8, 8),
        "single_transformer_blocks.0.attn.to_q": (single, 0, 8),
        "single_transformer_blocks.0.attn.to_v": (single, 16, 8),
        "single_transformer_blocks.0.proj_mlp": (single, 24, MLP),
    }
    factors = {name: pair(rows) for name, (_, _, rows) in parts.items()}
    flat = spelled.startswith("lora_")
    lora = {spelled.format(name.replace(".", "_") if flat else name): ab for name, ab in factors.items()}
    result = merged(tmp_path, lora, start)
    expected = {name: W.clone() for name, W in start.items()}
    for name, (module, first, rows) in parts.items():
        expected[f"{module}.weight"][first : first + rows] += factors[name][0] @ factors[name][1]
    for name, W in expected.items():
        torch.testing.assert_close(result[name], W)


def test_a_bias_of_lora_B_is_added_to_its_rows_of_a_fused_layer(tmp_path):
    """As in the control LoRAs of Flux; diffusers computes s · (B A x + b)."""
    key, settings = (
        "transformer.transformer_blocks.0.attn.to_k",
        {"r": RANK, "lora_alpha": 5, "lora_bias": True},
    )
    (up, down), bias = pair(WIDTH), noise(WIDTH)
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_B.bias": bias}
    said = {f"transformer.{name}": value for name, value in settings.items()}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    model = {
        "double_blocks.0.img_attn.qkv.weight": noise(24, WIDTH),
        "double_blocks.0.img_attn.qkv.bias": noise(24),
    }
    additions, unmatched = match([(read_lora(tmp_path / "lora.safetensors"), 1.0)], model)
    assert not unmatched
    for (name, W), change in zip(model.items(), (up @ down, bias), strict=True):
        expected = W.clone()
        expected[8:16] += 2.5 * change
        torch.testing.assert_close(added(name, W, additions[name], torch.float32), expected)
    with pytest.raises(CheckpointError, match="has a bias of lora_B"):
        read_lora(tmp_path / "lora.safetensors").plain()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_fused_update_on_separate_projections(tmp_path, prefix):
    qkv, linear1 = pair(3 * WIDTH), pair(3 * WIDTH + MLP)
    double = [f"{prefix}transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    single = [f"{prefix}single_transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    mlp = f"{prefix}single_transformer_blocks.0.proj_mlp"
    model = zeros(dict.fromkeys([*double, *single], (WIDTH, WIDTH)) | {mlp: (MLP, WIDTH)})
    lora = {"lora_unet_double_blocks_0_img_attn_qkv": qkv, "lora_unet_single_blocks_0_linear1": linear1}
    result = merged(tmp_path, lora, model)
    for names, (up, down) in ((double, qkv), ([*single, mlp], linear1)):
        together = torch.cat([result[f"{name}.weight"] for name in names])
        torch.testing.assert_close(together, up @ down)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused-model", "separate-model"])
def test_a_product_on_other_rows_is_added_whole(tmp_path, kind, fused):
    """LoHa, LoKr or DoRA of a layer whose rows the model stores among others, or apart."""
    separate = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    qkv = "double_blocks.0.img_attn.qkv"
    rows = WIDTH if fused else 3 * WIDTH
    layer = "transformer.transformer_blocks.0.attn.to_k" if fused else f"diffusion_model.{qkv}"
    W = noise(3 * WIDTH, WIDTH)
    inside = slice(WIDTH, 2 * WIDTH) if fused else slice(None)
    (b1, a1), (b2, a2) = pair(rows), pair(rows)
    w1, w2 = noise(rows // 4, 2), noise(4, WIDTH // 2)
    m, V = torch.rand(rows, 1), W[inside] + b1 @ a1
    lora, wanted = {
        "loha": ({"hada_w1_a": b1, "hada_w1_b": a1, "hada_w2_a": b2, "hada_w2_b": a2}, (b1 @ a1) * (b2 @ a2)),
        "lokr": ({"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)),
        "dora": (
            {"lora_A.weight": a1, "lora_B.weight": b1, "dora_scale": m},
            m * V / V.norm(dim=1, keepdim=True) - W[inside],
        ),
    }[kind]
    file = tmp_path / "product.safetensors"
    save_file({f"{layer}.{name}": tensor.contiguous() for name, tensor in lora.items()}, file)
    model = {f"{qkv}.weight": W}
    if not fused:
        model = {f"{name}.weight": part for name, part in zip(separate, W.chunk(3), strict=True)}
        model |= zeros({"single_transformer_blocks.0.attn.to_q": (WIDTH, WIDTH)})
    additions, unmatched = match([(read_lora(file), 1.0)], model)
    assert not unmatched
    names = list(model)[: 1 if fused else 3]
    found = [added(name, model[name], additions[name], torch.float32) for name in names]
    expected = W.clone()
    expected[inside] += wanted
    torch.testing.assert_close(torch.cat(found), expected)


def test_dora_by_input_is_not_added_to_a_part_of_its_layer(tmp_path):
    qkv, (up, down) = "diffusion_model.double_blocks.0.img_attn.qkv", pair(3 * WIDTH)
    file = tmp_path / "dora.safetensors"
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "dora_scale": torch.rand(1, WIDTH)}
    save_file({f"{qkv}.{name}": tensor for name, tensor in tensors.items()}, file)
    model = zeros({f"transformer_blocks.0.attn.to_{part}": (WIDTH, WIDTH) for part in "qkv"})
    model |= zeros({"single_transformer_blocks.0.attn.to_q": (WIDTH, WIDTH)})
    with pytest.raises(CheckpointError, match="DoRA by input cannot be added to a part of its layer"):
        match([(read_lora(file), 1.0)], model)


def test_a_whole_and_a_part_of_the_same_rows_are_refused(tmp_path):
    model = zeros({"double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH), "single_blocks.0.linear1": (56, 8)})
    lora = {"transformer.transformer_blocks.0.attn.to_q": pair(WIDTH)}
    with pytest.raises(CheckpointError, match="both update double_blocks.0.img_attn.qkv"):
        merged(tmp_path, lora | {"lora_unet_double_blocks_0_img_attn_qkv": pair(3 * WIDTH)}, model)


def test_shift_and_scale_change_places(tmp_path):
    model = zeros({"final_layer.adaLN_modulation.1": (16, 8), "double_blocks.0.img_attn.proj": (8, 8)})
    up, down = pair(16)
    result = merged(tmp_path, {"transformer.norm_out.linear": (up, down)}, model)
    expected = (up @ down).roll(8, 0)  # diffusers has scale and shift
    torch.testing.assert_close(result["final_layer.adaLN_modulation.1.weight"], expected)


GPT2 = {"h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "lm_head": (8, 8), "h.0.mlp.c_proj": (32, 8)}
GPT2_OUT_IN = {"h.0.attn.c_attn": (24, 8), "h.0.mlp.c_proj": (8, 32)}


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
def test_the_model_tells_how_a_square_weight_is_stored(tmp_path, stated, conv1d):
    """A PEFT folder over Conv1D and linear layers together states one fan_in_fan_out for all."""
    model = zeros(GPT2 if conv1d else GPT2 | GPT2_OUT_IN)
    factors = {name: pair(*GPT2_OUT_IN.get(name, GPT2[name])) for name in GPT2}
    merged_model = from_peft(tmp_path, factors, model, stated)
    for name, (up, down) in factors.items():
        turned = conv1d and name != "lm_head"
        torch.testing.assert_close(merged_model[f"{name}.weight"], (up @ down).T if turned else up @ down)


@pytest.mark.parametrize(
    ("shapes", "stated"),
    [({"h.0.attn.c_proj": (8, 8)}, False), ({"x.own": (8, 8)}, True), ({"x.own": (8, 8)}, False)],
)
def test_a_square_weight_that_nothing_tells_about_is_refused(tmp_path, shapes, stated):
    factors = {name: pair(*shape) for name, shape in shapes.items()}
    if shapes.keys() == {"x.own"} and not stated:  # not one of transformers' Conv1D by its name
        from_peft(tmp_path, factors, zeros(shapes), stated)
        return
    with pytest.raises(CheckpointError, match="is square, and neither the adapter nor the model"):
        from_peft(tmp_path, factors, zeros(shapes), stated)


def test_a_peft_file_without_its_config_is_turned_as_well_and_its_scale_is_said(tmp_path):
    """Only the square layers of GPT-2: no shape of theirs tells."""
    up, down = pair(8)
    keys = {"lora_A": down, "lora_B": up}
    tensors = {f"base_model.model.h.0.attn.c_proj.{part}.weight": tensor for part, tensor in keys.items()}
    save_file(tensors, tmp_path / "bare.safetensors")
    lora = read_lora(tmp_path / "bare.safetensors")
    assert (
        "keeps alpha in adapter_config.json" in lora.notices[0]
        and "scale is taken to be 1" in lora.notices[0]
    )
    [addition] = match([(lora, 1.0)], zeros(GPT2))[0]["h.0.attn.c_proj.weight"]
    assert addition.value.kind == "conv1d"
    with pytest.raises(CheckpointError, match="is square, and neither"):
        match([(lora, 1.0)], zeros({"h.0.attn.c_proj": (8, 8)}))


def from_peft(
    tmp_path: Path, factors: dict[str, tuple[Tensor, Tensor]], model: dict[str, Tensor], stated: bool
) -> dict[str, Tensor]:
    """The model with a PEFT folder of these factors, of scale 1, added."""
    tensors = {f"base_model.model.{name}.lora_A.weight": down for name, (_, down) in factors.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": up for name, (up, _) in factors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "fan_in_fan_out": stated}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(factors)}))
    additions, unmatched = match([(read_lora(tmp_path), 1.0)], model)
    assert not unmatched
    return {name: added(name, W, additions.get(name, []), torch.float32) for name, W in model.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [["c_proj", "lm_head"], ["lm_head", "c_attn", "c_proj"]])
@pytest.mark.parametrize("stated", [True, False])
def test_gpt2_is_merged_as_peft_merges_it(tmp_path, targets, stated):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=8, n_positions=8)
    base = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0))
    model = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(r=RANK, target_modules=targets, fan_in_fan_out=stated, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    fresh = GPT2LMHeadModel(base.config)
    fresh.load_state_dict(model)
    expected = PeftModel.from_pretrained(fresh, tmp_path).merge_and_unload().state_dict()
    additions, unmatched = match([(read_lora(tmp_path), 1.0)], model)
    assert not unmatched and len(additions) == len(targets) + 1  # two are c_proj
    for name, W in model.items():
        result = added(name, W, additions.get(name, []), torch.float32)
        torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-5)
