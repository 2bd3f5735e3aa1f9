"""Hugging Face folders: read in place, converted and written; and every way in which one can be
broken."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import fails, succeeds
from families import save_folder
from safetensors.torch import load_file, save_file

from litlora.adapters.describe import describe
from litlora.checkpoint import open_checkpoint, resolve
from litlora.config import ModelConfig
from litlora.errors import CheckpointError
from litlora.formats.huggingface import write_folder
from litlora.load import load
from litlora.model import GPT
from litlora.paths import checkpoint_dir


@pytest.fixture
def make_folder(tmp_path, tokenizer_dir):
    """make_folder("llama", changes...) -> (a Hugging Face folder with a tokenizer, the model of
    transformers)."""

    def make(
        family: str, *, name: str = "hf", shards: bool = False, **changes
    ) -> tuple[Path, torch.nn.Module]:
        directory = tmp_path / name
        sizes = {"vocab_size": 400, **changes}
        model = save_folder(family, directory, max_shard_size="60KB" if shards else "5GB", **sizes)
        for file in tokenizer_dir.iterdir():
            shutil.copy(file, directory)
        return directory, model

    return make


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- in place


def test_one_file_many_files_and_torch_files_are_the_same_model(make_folder, tmp_path):
    single, model = make_folder("llama")
    many, _ = make_folder("llama", name="many", shards=True)
    shutil.copytree(single, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(many, tmp_path / "unlisted", ignore=shutil.ignore_patterns("*.index.json"))
    save_file(load_file(single / "model.safetensors"), single / "model.safetensors")
    state = load_file(single / "model.safetensors")
    torch.save(state, tmp_path / "bin/pytorch_model.bin")
    shutil.copytree(tmp_path / "bin", tmp_path / "old")
    torch.save(state, tmp_path / "old/pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert len(list(many.glob("*.safetensors"))) > 2
    torch.manual_seed(0)
    names = ("bin", "old")
    assert (
        len(
            {open_checkpoint(tmp_path / name).fingerprint for name in names}
            | {open_checkpoint(single).fingerprint}
        )
        == 1
    )
    assert open_checkpoint(many).fingerprint == open_checkpoint(tmp_path / "unlisted").fingerprint


def test_opening_copies_nothing(make_folder):
    """Fused layers whose parts are contiguous become views of the mapped file."""
    for family in ("llama", "phi3", "gpt2"):
        directory, _ = make_folder(family, name=family)
        tensors = open_checkpoint(directory).tensors
        spans = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
        assert len(spans) <= len(load_file(directory / "model.safetensors"))


def test_a_tied_head_that_is_stored_too_is_the_embedding(make_folder):
    directory, model = make_folder("llama-3")
    file = directory / "model.safetensors"
    state, before = load_file(file), open_checkpoint(directory).fingerprint
    assert "lm_head.weight" not in state
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    assert open_checkpoint(directory).fingerprint == before
    save_file(
        {
            **{n: t for n, t in state.items() if "embed" not in n},
            "lm_head.weight": state["model.embed_tokens.weight"],
        },
        file,
    )
    assert open_checkpoint(directory).fingerprint == before
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, file)
    untied = open_checkpoint(directory)  # transformers uses the file's head, too
    assert not untied.config.tie_word_embeddings
    assert torch.equal(untied.tensors["lm_head.weight"], state["model.embed_tokens.weight"] + 1)


def test_files_of_the_bare_decoder_and_of_old_times_are_read(make_folder):
    """GPT-2's file on the hub has no prefix, and causal masks among the weights."""
    directory, _ = make_folder("gpt2")
    file = directory / "model.safetensors"
    before = open_checkpoint(directory).fingerprint
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**state, **masks}, file)
    assert open_checkpoint(directory).fingerprint == before


SLOW = ("gpt2", "granite", "cohere2", "glm4", "nemotron", "ministral3", "olmoe", "gpt-oss", "glm4-moe")
SLOW += ("deepseek-v3", "ernie4-5-moe", "gemma3n", "gemma4", "gemma4-26b", "llama4")


@pytest.mark.parametrize("family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_fine_tune_merge_and_export_from_a_folder(family, make_folder, tmp_path, alpaca_file):
    """All commands in turn; transformers then gives the logits of the merged model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _ = make_folder(
        family, shards=True, **({} if family == "gpt2" else {"max_position_embeddings": 256})
    )
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    run = tmp_path / "run"
    data = [
        "--data",
        "JSON",
        "--data.path",
        alpaca_file,
        "--train.max_steps",
        2,
        "--train.max_seq_length",
        60,
    ]
    succeeds(
        "finetune/lora.py", "--checkpoint_dir", directory, "--out_dir", run, "--prompt_style", "plain", *data
    )
    assert (run / "final/config.json").read_bytes() == (directory / "config.json").read_bytes()
    succeeds("chat/base.py", "--checkpoint_dir", run / "final", "--prompt", "hello", "--max_new_tokens", 3)
    words = ["--checkpoint_dir", run / "final", "--out_dir", tmp_path / "back", "--max_shard_size", "60KB"]
    succeeds("scripts/convert_lit_checkpoint.py", *words)
    loaded = load(run / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    ids = torch.randint(400, (1, 24))
    with torch.no_grad():
        difference = (model(ids).logits - loaded.model(ids)).abs().max()
    # Scores of these are not scaled down.
    assert difference <= (1e-4 if family.startswith(("gemma3n", "gemma4")) else 1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "the quick brown fox, 123 \u4f60\u597d"
    assert tokenizer(text).input_ids == loaded.tokenizer.encode(text)
    assert tokenizer.chat_template == template
    assert model.generation_config.eos_token_id is not None
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


def test_a_converted_folder_has_the_same_fingerprint_and_comes_back_byte_for_byte(make_folder, tmp_path):
    directory, _ = make_folder("gpt-neox")
    succeeds("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", directory, "--out_dir", tmp_path / "lit")
    assert resolve(tmp_path / "lit").base.fingerprint == open_checkpoint(directory).fingerprint
    succeeds(
        "scripts/convert_lit_checkpoint.py",
        "--checkpoint_dir",
        tmp_path / "lit",
        "--out_dir",
        tmp_path / "back",
    )
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    there = {file.name for file in directory.iterdir()}
    assert there | {"README.md"} == {file.name for file in (tmp_path / "back").iterdir()}


def test_an_adapter_finds_its_base_converted_or_not(make_folder, tmp_path, alpaca_file):
    """The fingerprint is computed over our names, so either form of the base matches."""
    directory, _ = make_folder("gpt-neox", max_position_embeddings=256)
    data = ["--data", "JSON", "--data.path", alpaca_file, "--train.max_steps", 1]
    succeeds("finetune/lora.py", "--checkpoint_dir", directory, "--out_dir", tmp_path / "run", *data)
    succeeds("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", directory, "--out_dir", tmp_path / "lit")
    shutil.rmtree(directory)
    chain = resolve(tmp_path / "run/final", base_dir=tmp_path / "lit")
    assert chain.base.directory == tmp_path / "lit"


def test_a_model_of_our_own_is_written_as_one_of_theirs(base, tmp_path):
    """No config.json to start from; a tokenizer_config.json without a class gets one that needs no
    architecture."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = succeeds(
        "scripts/convert_lit_checkpoint.py", "--checkpoint_dir", base, "--out_dir", tmp_path / "hf"
    ).stdout
    assert "LlamaForCausalLM" in out
    model, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), load(base)
    ids = torch.randint(400, (1, 20))
    with torch.no_grad():
        assert (model(ids).logits - ours.model(ids)).abs().max() <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("hello you").input_ids == ours.tokenizer.encode("hello you")
    assert tokenizer.eos_token_id == ours.tokenizer.eos_id == model.generation_config.eos_token_id[0]


@pytest.mark.parametrize("style", ["alpaca", "plain"])
@pytest.mark.parametrize("begin", ["", "<|begin|>"])
def test_a_model_without_a_chat_template_gets_one_that_asks_as_it_was_taught(style, begin, base, tmp_path):
    from tokenizers import Tokenizer as Backend
    from transformers import AutoTokenizer

    if begin:
        backend = Backend.from_file(str(base / "tokenizer.json"))
        backend.add_special_tokens([begin])
        backend.save(str(base / "tokenizer.json"))
        settings = {"eos_token": "<|endoftext|>", "bos_token": begin, "add_bos_token": True}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "prompt_style.yaml").write_text(f"style: {style}\n")
    source = open_checkpoint(base)
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", source.tensors, source.config, [base], 10**9, source)
    ours = load(tmp_path / "out")
    assert ours.prompt_style.name == style
    question, answer = 'What is "{{ 1 }}"?\n\u4f60', "It is {% x %}."
    turns = [("user", question), ("assistant", answer), ("user", question)]
    asked = ours.tokenizer.encode(ours.prompt_style.render(question, ""), begin=True)
    expected = [*asked, *ours.tokenizer.encode(answer), ours.tokenizer.eos_id, *asked]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=True, return_dict=False
    )
    assert found == expected


def test_a_config_that_no_longer_describes_the_model_is_replaced(make_folder, tmp_path):
    directory, _ = make_folder("llama")
    source = open_checkpoint(directory)
    config = ModelConfig.from_dict({**source.config.to_dict(), "rope_theta": 5e5})
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", source.tensors, config, [directory], 10**9, source)
    assert open_checkpoint(tmp_path / "out").config == config


def test_bf16_stays_bf16(make_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    directory, _ = make_folder("llama")
    source = open_checkpoint(directory)
    tensors = {name: tensor.bfloat16() for name, tensor in source.tensors.items()}
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", tensors, source.config, [directory], 10**9, source)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


# ---- broken folders: each named in one line, none loaded


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_single_file_is_read_before_shards_as_in_transformers(suffix, make_folder):
    from transformers import AutoModelForCausalLM

    directory, model = make_folder("llama", shards=True)
    newer = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    if suffix == "bin":
        for shard in directory.glob("*.safetensors"):
            torch.save(load_file(shard), directory / f"pytorch_{shard.stem}.bin")
            shard.unlink()
        text = (directory / "model.safetensors.index.json").read_text()
        text = text.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (directory / "pytorch_model.bin.index.json").write_text(text)
        (directory / "model.safetensors.index.json").unlink()
        torch.save(newer, directory / "pytorch_model.bin")
    else:
        save_file(newer, directory / "model.safetensors", {"format": "pt"})
    theirs, ours = AutoModelForCausalLM.from_pretrained(directory), load(directory)
    ids = torch.randint(400, (1, 20))
    with torch.no_grad():
        assert (theirs(ids).logits - ours.model(ids)).abs().max() <= 1e-5
    assert torch.equal(theirs.state_dict()["lm_head.weight"], newer["lm_head.weight"])
    assert ".index.json beside it; remove the outdated one" in ours.chain.notices[0]
    assert describe(directory)["notices"] == ours.chain.notices


def test_a_missing_shard_is_named_before_torch_is_imported(make_folder):
    directory, _ = make_folder("llama", shards=True)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=f"{shard.name}: missing, though model.safetensors.index.json lists it"
    ) as caught:
        checkpoint_dir(directory)
    one_line(caught)
    assert shard.name in fails("chat/base.py", "--checkpoint_dir", directory, "--prompt", "x")
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: missing, though .* is one of 4 shards"):
        checkpoint_dir(directory)


STRANGE_INDEXES = [
    "",
    "{}",
    '{"weight_map": []}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": "../../x"}}',
    "[" * 99_999,
]


@pytest.mark.parametrize("text", STRANGE_INDEXES)
def test_a_strange_index_is_named(text, make_folder):
    directory, _ = make_folder("llama", shards=True)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json") as caught:
        open_checkpoint(directory)
    one_line(caught)


def test_an_index_that_promises_too_much_is_named(make_folder):
    directory, _ = make_folder("llama", shards=True)
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00009.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="model-00001-of-00009.safetensors: missing"):
        open_checkpoint(directory)
    values["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(directory.glob("*.safetensors"))[
        0
    ].name
    index.write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError,
        match="lacks model.layers.9.mlp.up_proj.weight, which model.safetensors.index.json lists",
    ):
        open_checkpoint(directory)


def test_a_tensor_in_two_shards_is_named(make_folder):
    directory, _ = make_folder("llama", shards=True)
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(CheckpointError, match=f"{second.name}: {name} is also in {first.name}") as caught:
        open_checkpoint(directory)
    one_line(caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_key_value_heads": 4},
            r"k_proj.weight has shape \(16, 32\); the architecture needs \(32, 32\)",
        ),
        ({"head_dim": 16}, r"has shape .* the architecture needs"),
        ({"vocab_size": 401}, r"has shape \(400, 32\); the architecture needs \(401, 32\)"),
        ({"num_hidden_layers": 2}, "weight.s. that the architecture does not have: model.layers.2"),
        ({"num_hidden_layers": 9999}, "holds 30 weights; its configuration describes 9,999 modules"),
        ({"num_hidden_layers": 4}, "weight.s. missing: model.layers.3"),
        ({"attention_bias": True}, "weight.s. missing: .*bias"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_named(change, message, make_folder):
    directory, _ = make_folder("llama")
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(directory)
    assert one_line(caught).startswith(str(directory / "model.safetensors"))


def test_fused_weights_of_another_size_are_named(make_folder):
    directory, _ = make_folder("phi3")
    state = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj"
    save_file(
        {**state, f"{name}.weight": state[f"{name}.weight"][:-8].contiguous()},
        directory / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=rf"{name} has shape \(56, 32\); the architecture needs 64 rows"
    ) as caught:
        open_checkpoint(directory)
    one_line(caught)


def test_an_unknown_tensor_is_never_dropped(make_folder):
    directory, _ = make_folder("gpt-neox")
    state = load_file(directory / "model.safetensors")
    save_file({**state, "gpt_neox.layers.0.attention.secret": torch.ones(3)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="gpt_neox.layers.0.attention.secret"):
        open_checkpoint(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_at_load(value, dtype, make_folder):
    directory, _ = make_folder("llama")
    state = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    state["model.layers.1.mlp.up_proj.weight"][7, 5] = value
    save_file(state, directory / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="model.layers.1.mlp.up_proj.weight holds values that are not finite"
    ) as caught:
        load(directory)
    assert one_line(caught).startswith(str(directory / "model.safetensors"))


def test_conversion_refuses_them_too(make_folder, tmp_path):
    directory, _ = make_folder("llama")
    state = load_file(directory / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, directory / "model.safetensors")
    for script in ("convert_hf_checkpoint", "convert_lit_checkpoint"):
        assert "model.norm.weight" in fails(
            f"scripts/{script}.py", "--checkpoint_dir", directory, "--out_dir", tmp_path / "out"
        )
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_broken_file_is_named(cut, make_folder):
    directory, _ = make_folder("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model.safetensors: (broken|cannot be read)") as caught:
        open_checkpoint(directory)
    one_line(caught)


def test_a_torch_file_that_would_run_code_is_refused(make_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    directory, _ = make_folder("llama")
    (directory / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: refused"):
        open_checkpoint(directory)
    assert not (tmp_path / "touched").exists()


def test_a_folder_without_weights_says_so(make_folder):
    directory, _ = make_folder("llama")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has a config.json but no weights"):
        checkpoint_dir(directory)


def test_names_that_already_are_ours_are_not_converted_twice(base, tmp_path):
    assert "not a Hugging Face model folder" in fails(
        "scripts/convert_hf_checkpoint.py", "--checkpoint_dir", base, "--out_dir", tmp_path / "out"
    )


@pytest.mark.parametrize("size", ["5XB", "GB", "-1GB", "1.5GB", "0", "\u0665GB"])
def test_a_strange_shard_size_is_named(size, base, tmp_path):
    words = ["--checkpoint_dir", base, "--out_dir", tmp_path / "out", f"--max_shard_size={size}"]
    assert "--max_shard_size" in fails("scripts/convert_lit_checkpoint.py", *words)


def test_a_model_without_weights_draws_no_random_numbers(base):
    state = torch.get_rng_state()
    model = GPT.without_weights(ModelConfig.load(base / "model_config.yaml"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
