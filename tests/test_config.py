"""ModelConfig: a written configuration is read back, and a contradiction is refused with its
place."""

import pytest
import yaml
from conftest import tiny_config

from litlora.config import ModelConfig
from litlora.errors import CheckpointError


def test_round_trip_through_yaml(tmp_path):
    config = tiny_config(
        norm="layernorm", mlp="plain", hidden_act="gelu_tanh", rope_theta=5e5, tie_word_embeddings=True
    )
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert ModelConfig.load(path) == config


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"norm": "batchnorm"}, "norm"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"rope_scaling": 2}, "rope_scaling"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, change, culprit):
    path = tmp_path / "model_config.yaml"
    path.write_text(yaml.safe_dump({**tiny_config().to_dict(), **change}))
    with pytest.raises(CheckpointError, match=rf"model_config\.yaml: .*{culprit}"):
        ModelConfig.load(path)


@pytest.mark.parametrize("text", ["- a list", "a: [", "!!python/object/apply:os.getcwd []", "\x00"])
def test_what_is_not_a_mapping_is_refused(tmp_path, text):
    path = tmp_path / "model_config.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="model_config.yaml"):
        ModelConfig.load(path)


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "model_config.yaml"
    values = tiny_config().to_dict()
    del values["vocab_size"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match="vocab_size missing"):
        ModelConfig.load(path)
