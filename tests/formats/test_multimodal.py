"""The language model inside a multimodal folder: read, trained, and written back whole; compared with
`transformers` and PEFT."""

import json
import shutil

import pytest
import torch
from families import MULTIMODAL as MODELS
from families import save_multimodal
from safetensors.torch import load_file, save_file

from litlora.checkpoint import Beside, open_checkpoint, write_full
from litlora.errors import CheckpointError
from litlora.formats.families import load_config, read_config
from litlora.formats.families.multimodal import DEFAULTS, MULTIMODAL, TEXT_ALONE
from litlora.formats.folder import PARTS_FILE
from litlora.formats.huggingface import write_folder
from litlora.load import load
from litlora.model import GPT

TOKENS = 30
DEFAULT = ("gemma3", "qwen2_vl")
EVERY = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def logits_of(directory, ids):
    source = open_checkpoint(directory)
    with torch.no_grad():
        return GPT.from_tensors(source.config, source.tensors).eval()(ids)


def renamed(directory, target, *changes):
    """A copy of a folder whose tensors have other names."""
    shutil.copytree(directory, target)
    state = load_file(target / "model.safetensors")
    for old, new in changes:
        state = {(new + k.removeprefix(old) if k.startswith(old) else k): v for k, v in state.items()}
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture
def folder(tmp_path, tokenizer_dir):
    """folder("gemma3") -> (a Hugging Face folder with a tokenizer, the model of transformers)."""

    def make(name, **changes):
        directory = tmp_path / name
        sizes = {"vocab_size": 400, "max_position_embeddings": 256, **changes}
        model = save_multimodal(name, directory, **sizes)
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, directory)
        (directory / "preprocessor_config.json").write_text('{"do_resize": true}')
        return directory, model

    return make


@pytest.mark.parametrize("name", EVERY)
def test_logits_of_text_equal_those_of_transformers(name, tmp_path):
    """Of Qwen-VL, too: without images its rotary positions are plain ones."""
    model, ids = save_multimodal(name, tmp_path), torch.randint(96, (2, TOKENS))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert expected.abs().max() > 0.3
    assert (logits_of(tmp_path, ids) - expected).abs().max() <= (
        1e-4 if name.startswith(("gemma3n", "gemma4")) else 1e-5
    )


def test_names_of_before_and_after_2025_are_the_same_model(folder, tmp_path):
    old, _ = folder("gemma3")
    new = renamed(
        old,
        tmp_path / "new",
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
    )
    assert open_checkpoint(old).fingerprint == open_checkpoint(new).fingerprint


@pytest.mark.slow
def test_experts_of_one_tensor_are_the_same_model(folder, tmp_path):
    """As Qwen 3.5 is released; transformers reads both. Each is written back as it was read, through
    a litlora directory, too."""
    apart, model = folder("qwen3_5_moe")
    joined = shutil.copytree(apart, tmp_path / "joined")
    state = {
        name: tensor for name, tensor in model.state_dict().items() if not name.endswith("rotary_inv_freq")
    }
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in state
    save_file({n: t.clone() for n, t in state.items()}, joined / "model.safetensors", {"format": "pt"})
    one, other = open_checkpoint(apart), open_checkpoint(joined)
    assert one.fingerprint == other.fingerprint and one.tensors.keys() == other.tensors.keys()
    assert one.apart and not other.apart
    for directory in (apart, joined):
        source, lit = open_checkpoint(directory), tmp_path / f"lit_{directory.name}"
        for target, origin in ((lit, directory), (tmp_path / "again", lit)):
            beside = Beside(base=open_checkpoint(origin))
            write_full(target, source.tensors, source.config, sidecars_from=[origin], beside=beside)
        before = load_file(directory / "model.safetensors")
        for number, place in enumerate((directory, lit, tmp_path / "again")):
            back = tmp_path / f"{directory.name}_back{number}"
            back.mkdir()
            base = open_checkpoint(place)
            write_folder(back, base.tensors, source.config, [place], 10**9, base)
            after = load_file(back / "model.safetensors")
            assert before.keys() == after.keys()
            assert all(
                tensor.shape == after[name].shape
                and tensor.numpy().tobytes() == after[name].numpy().tobytes()
                for name, tensor in before.items()
            )
        shutil.rmtree(tmp_path / "again")
    ids = torch.randint(300, (1, TOKENS))
    theirs = type(model).from_pretrained(back, attn_implementation="eager").eval()
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() <= 1e-4


def test_settings_of_qwen_vl_that_stand_beside_the_others_are_read(folder):
    """As in the files of 2024."""
    directory, _ = folder("qwen2_vl")
    file = directory / "config.json"
    values = json.loads(file.read_text())
    text = values.pop("text_config")
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    text = {name: value for name, value in text.items() if name not in ("model_type", "rope_parameters")}
    before = load_config(directory)
    file.write_text(json.dumps({**text, **values, **rope}))
    assert load_config(directory) == before


def test_what_released_files_leave_out_is_the_default_of_transformers():
    import transformers

    for kind, outer in MULTIMODAL.items():
        config = transformers.CONFIG_MAPPING[kind]
        assert config().tie_word_embeddings == outer.tied, kind
        assert MODELS[kind][0] == config.__name__
    for kind, values in DEFAULTS.items():
        config = transformers.CONFIG_MAPPING[kind]()
        for name, value in values.items():
            assert getattr(config, name) == value or kind == "qwen2", (kind, name)
    assert set(TEXT_ALONE.values()) <= {"qwen2", "qwen3"}
    released = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    text |= {"num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    kind, config = read_config({**released, "text_config": text, "vision_config": {}})
    assert (kind, config.vocab_size, config.num_attention_heads) == ("gemma3_text", 262208, 8)
    assert config.tie_word_embeddings and config.head_dim == 256 and config.rope_scaling.factor == 8


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("qwen2_5_vl", "llama4", "gemma3n", "gemma4-26b")
        ),
    ],
)
def test_the_other_parts_go_through_a_litlora_directory_byte_for_byte(name, folder, tmp_path):
    directory, _ = folder(name)
    source = open_checkpoint(directory)
    changed = {name: tensor + 1 for name, tensor in source.tensors.items()}
    for target, origin in ((tmp_path / "a", directory), (tmp_path / "b", tmp_path / "a")):
        beside = Beside(base=open_checkpoint(origin))
        write_full(target, changed, source.config, sidecars_from=[origin], beside=beside)
    lit = open_checkpoint(tmp_path / "b")
    assert lit.parts.spelling == source.parts.spelling and lit.family() == source.family()
    (tmp_path / "back").mkdir()
    said = write_folder(tmp_path / "back", lit.tensors, lit.config, [tmp_path / "b"], 10**9, lit)
    assert said.startswith(source.parts.outer.architecture)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    beside = open_checkpoint(tmp_path / "back").parts.tensors
    assert beside.keys() == source.parts.tensors.keys()
    for name, tensor in before.items():
        expected = tensor if name in beside else tensor + 1
        assert expected.numpy().tobytes() == after[name].numpy().tobytes()
    (tmp_path / "b" / PARTS_FILE).unlink()
    lit = open_checkpoint(tmp_path / "b")
    (tmp_path / "alone").mkdir()
    said = write_folder(tmp_path / "alone", lit.tensors, lit.config, [tmp_path / "b"], 10**9, lit)
    assert "without the other parts" in said and open_checkpoint(tmp_path / "alone").parts is None


@pytest.mark.slow
def test_train_merge_and_write_back_whole(folder, tmp_path, alpaca_file, forked):
    """The image encoder survives a merge, and a full fine-tune, byte for byte; transformers then gives
    the logits of the merged model."""
    from transformers import AutoModelForImageTextToText

    directory, _ = folder("gemma3")
    data = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_steps", 1, "--precision", "32-true"]
    data += ["--train.max_seq_length", 60, "--checkpoint_dir", directory, "--prompt_style", "plain"]
    said = forked.succeeds(
        "finetune/lora.py", "--out_dir", tmp_path / "run", "--lora.targets", "all-linear", *data, cwd=tmp_path
    )
    assert "only the language model of Gemma3ForConditionalGeneration" in said
    merged, back, final = tmp_path / "merged", tmp_path / "back", tmp_path / "run/final"
    forked.succeeds("scripts/merge_lora.py", "--lora_path", final, "--out_dir", merged, cwd=tmp_path)
    assert (merged / PARTS_FILE).is_file() and not (final / PARTS_FILE).exists()
    convert = ["scripts/convert_lit_checkpoint.py", "--checkpoint_dir"]
    forked.succeeds(*convert, merged, "--out_dir", back, cwd=tmp_path)
    before, after = load_file(directory / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    tower = [name for name in before if not name.startswith("language_model.")]
    assert tower and all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in tower)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (back / "preprocessor_config.json").read_text() == '{"do_resize": true}'
    theirs = AutoModelForImageTextToText.from_pretrained(back, attn_implementation="eager").eval()
    assert type(theirs).__name__ == "Gemma3ForConditionalGeneration"
    ids = torch.randint(300, (1, TOKENS))
    with torch.no_grad():
        expected = load(final).model(ids)
        assert (theirs(input_ids=ids).logits - expected).abs().max() <= 1e-5
    words = (*convert, final, "--out_dir", tmp_path / "direct", "--max_shard_size", "60KB")
    forked.succeeds(*words, cwd=tmp_path)
    direct = {k: v for f in (tmp_path / "direct").glob("*.safetensors") for k, v in load_file(f).items()}
    assert direct.keys() == after.keys() and all(torch.equal(direct[name], after[name]) for name in after)


@pytest.mark.slow
def test_a_full_fine_tune_keeps_the_other_parts(folder, tmp_path, alpaca_file, forked):
    directory, _ = folder("qwen3_vl")
    data = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_steps", 1]
    words = ["finetune/full.py", "--checkpoint_dir", directory, "--out_dir", tmp_path / "run", *data]
    forked.succeeds(*words, cwd=tmp_path)
    kept, before = load_file(tmp_path / "run/final" / PARTS_FILE), load_file(directory / "model.safetensors")
    assert kept and all(torch.equal(before[name], tensor) for name, tensor in kept.items())
    assert open_checkpoint(tmp_path / "run/final").parts.notice


@pytest.mark.slow
# PEFT warns of ranks and alphas of parameters, which it does use.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "qwen2_vl",
        "qwen3_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "gemma3n",
        "gemma4",
        "gemma4-26b",
        "smolvlm",
        "llama4",
    ],
)
def test_peft_gives_the_same_logits_with_the_exported_adapter(name, folder, tmp_path, alpaca_file, forked):
    """On the multimodal class; the image encoder, whose layers have the same last names, gets none."""
    from peft import PeftModel

    directory, model = folder(name)
    data = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_steps", 2, "--precision", "32-true"]
    data += ["--train.max_seq_length", 60, "--checkpoint_dir", directory, "--prompt_style", "plain"]
    data += ["--lora.targets", "all-linear", "--train.learning_rate", 0.05]
    forked.succeeds("finetune/lora.py", "--out_dir", tmp_path / "run", *data, cwd=tmp_path)
    final, peft = tmp_path / "run/final", tmp_path / "peft"
    said = forked.succeeds("scripts/export_peft.py", "--lora_path", final, "--out_dir", peft, cwd=tmp_path)
    assert "AutoModelForImageTextToText" in said
    ids = torch.randint(300, (1, TOKENS))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        wrapped = PeftModel.from_pretrained(model, peft)
        logits, expected = wrapped(input_ids=ids).logits, load(final).model(ids)
    assert (expected - before).abs().max() > 1e-3 and (logits - expected).abs().max() <= 1e-4
    adapted = [name for name, _ in wrapped.named_modules() if name.endswith(".lora_A")]
    inside = ("model.language_model.", "model.text_model.")
    assert adapted and all(any(part in name for part in inside) for name in adapted)
    again = open_checkpoint(peft)
    assert again.updates.keys() == open_checkpoint(final).updates.keys()


def test_what_does_not_fit_is_refused_by_name(folder, tmp_path):
    directory, _ = folder("llava")
    empty = renamed(directory, tmp_path / "empty", ("language_model.", "other."))
    with pytest.raises(CheckpointError, match="holds no weights of the language model .model.language_mo"):
        open_checkpoint(empty)
    values = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    needs = "'LlavaForConditionalGeneration'.* it needs learned positions.*in its language model ..opt"
    with pytest.raises(CheckpointError, match=needs):
        read_config({**values, "text_config": {"model_type": "opt"}, "vision_config": {"depth": 2}})
    with pytest.raises(CheckpointError, match="LlavaForOther.* only LlavaForConditionalGeneration is cov"):
        read_config({**values, "architectures": ["LlavaForOther"], "text_config": {"model_type": "llama"}})
