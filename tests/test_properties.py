"""Arbitrary files never bring the readers down, and names come back as they went."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litlora.config import ModelConfig
from litlora.console import one_line, printable
from litlora.data.sources import read_dataset
from litlora.errors import CheckpointError, UserError
from litlora.formats import litgpt, peft
from litlora.formats.families import FAMILIES, load_config, read_config, write_config
from litlora.formats.folder import weight_files
from litlora.formats.layout import layout
from litlora.model import GPT
from litlora.paths import checkpoint_dir
from litlora.prompts import load_style, load_template
from litlora.settings import JSON
from litlora.storage.tensors import open_tensors
from litlora.storage.untrusted import read_json, read_yaml
from litlora.tokenizer import Tokenizer

quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
numbers = st.integers(-(10**20), 10**20) | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**400])
plain = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def only_user_errors(read, *arguments):
    """Call it; whatever it raises must be a user's error whose line a terminal can show."""
    try:
        return read(*arguments)
    except UserError as error:
        assert one_line(str(error)).isprintable()


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
FIELDS = [
    "rope_scaling",
    "rope_parameters",
    "layer_types",
    "head_dim",
    "sliding_window",
    "rope_theta",
    "quantization_config",
    "torch_dtype",
]
PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "base_model_name_or_path": "x",
}
LITGPT = yaml.safe_load((Path(__file__).parent / "litgpt_files/llama/model_config.yaml").read_text())


@quick
@given(values)
def test_any_json_in_any_file(tmp_path, value):
    for name in (
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "adapter_config.json",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "records.json").write_text(json.dumps(value))
    only_user_errors(load_config, tmp_path)
    only_user_errors(weight_files, tmp_path)
    only_user_errors(peft.base_of, tmp_path)
    only_user_errors(load_template, {file.name: file for file in tmp_path.iterdir()})
    only_user_errors(checkpoint_dir, tmp_path)
    only_user_errors(read_dataset, JSON(path=str(tmp_path / "records.json")))


@quick
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from([*LLAMA, *FIELDS]), values, min_size=1, max_size=3),
)
def test_any_value_in_a_configuration_of_any_family(kind, changes):
    found = only_user_errors(
        read_config, {**LLAMA, "architectures": [FAMILIES[kind].architecture], "model_type": kind, **changes}
    )
    if found is not None:
        assert ModelConfig.from_dict(found[1].to_dict()) == found[1]


@quick
@given(st.dictionaries(st.sampled_from(list(tiny_config().to_dict())), values, min_size=1, max_size=3))
def test_any_value_in_a_configuration_of_ours(tmp_path, changes):
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({**tiny_config().to_dict(), **changes}))
    only_user_errors(ModelConfig.load, tmp_path / "model_config.yaml")


@quick
@given(st.dictionaries(st.sampled_from(list(LITGPT)), values, min_size=1, max_size=3))
def test_any_value_in_a_configuration_of_litgpts(tmp_path, changes):
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({**LITGPT, **changes}))
    only_user_errors(litgpt.load_config, tmp_path)


@quick
@given(
    st.dictionaries(
        st.sampled_from([*PEFT, "target_modules", "modules_to_save", "lora_dropout", "use_rslora"]),
        values,
        min_size=1,
    )
)
def test_any_value_in_a_configuration_of_pefts(tmp_path, changes):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | changes))
    only_user_errors(peft.read_adapter, tmp_path, tiny_config(), {})


@quick
@given(
    st.dictionaries(
        st.sampled_from(["eos_token", "bos_token", "chat_template", "add_bos_token"]), values, min_size=1
    ),
    values,
)
def test_any_value_in_a_tokenizers_settings(tmp_path, tokenizer_dir, changes, stop):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | changes))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    only_user_errors(Tokenizer, tmp_path)
    only_user_errors(load_template, {file.name: file for file in tmp_path.iterdir()})


@quick
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_in_any_file(tmp_path, data):
    for name in (
        "x.json",
        "x.yaml",
        "x.pth",
        "x.bin",
        "x.safetensors",
        "prompt_style.yaml",
        "tokenizer.model",
        "x.jsonl",
    ):
        (tmp_path / name).write_bytes(data)
    for read, name in (
        (read_json, "x.json"),
        (read_yaml, "x.yaml"),
        (open_tensors, "x.bin"),
        (open_tensors, "x.safetensors"),
    ):
        only_user_errors(read, tmp_path / name)
    only_user_errors(load_style, tmp_path)
    only_user_errors(Tokenizer, tmp_path)
    only_user_errors(read_dataset, JSON(path=str(tmp_path / "x.jsonl")))


@pytest.mark.parametrize("old", [False, True], ids=["archive", "old"])
@settings(quick, max_examples=150)
@given(st.data())
def test_a_torch_file_with_bytes_changed(tmp_path, old, data):
    sound = tmp_path / "sound.bin"
    if not sound.exists():
        torch.save(
            {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2).bfloat16()},
            sound,
            _use_new_zipfile_serialization=not old,
        )
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.bin").write_bytes(
        content[: data.draw(st.integers(len(content) // 2, len(content)) | st.just(len(content)))]
    )
    for tensor in (only_user_errors(open_tensors, tmp_path / "x.bin") or {}).values():
        assert tensor.numel() <= 64 and tensor.sum() is not None


@quick
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_every_name_comes_back(kind, layers, halvings, tied):
    """Our tensors under their names and back again are the same tensors, for every family that can
    express the model."""
    config = tiny_config(
        num_hidden_layers=layers, num_key_value_heads=4 >> halvings, tie_word_embeddings=tied
    )
    try:
        config = read_config(write_config(config, kind))[1]
    except CheckpointError:
        config = next((other for other in _variants(layers, tied) if _expressed(kind, other)), None)
        if config is None:
            return
    names = layout(kind, config)
    ours = {
        name: torch.rand(parameter.shape)
        for name, parameter in GPT.without_weights(config).named_parameters()
    }
    back = names.read(dict(names.write(ours)))
    assert back.keys() == ours.keys() and all(
        torch.equal(back[name], tensor) for name, tensor in ours.items()
    )


def _variants(layers, tied):
    both = {"num_hidden_layers": layers, "tie_word_embeddings": tied, "num_key_value_heads": 4}
    biased = {
        "mlp": "plain",
        "norm": "layernorm",
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu",
    }
    yield tiny_config(**both, **biased, parallel_residual=True, partial_rotary_factor=0.25)
    yield tiny_config(**both, **biased, positions="learned")
    yield tiny_config(**both, **biased, parallel_residual=True, shared_norm=True, lm_head_bias=True)


def _expressed(kind, config):
    try:
        return write_config(config, kind) is not None
    except CheckpointError:
        return False


@quick
@given(st.text())
def test_whatever_is_shown_is_harmless(text):
    assert one_line(text).isprintable()
    assert all(c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in printable(text))
    assert printable(printable(text)) == printable(text)
