"""A model that is written stops by itself in other programs: every token that it was taught to end
its answers with is named."""

import json
from pathlib import Path

import pytest
import torch
from conftest import succeeds
from families import save_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from litlora.load import load
from litlora.stop_tokens import with_stops
from litlora.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

END, TURN_END = "<|endoftext|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
LIMIT = 8


@pytest.fixture
def chat_base(tmp_path, tokenizer_dir) -> Path:
    """A Hugging Face folder whose every next token is <|im_end|>, and whose files name <|endoftext|>
    alone as the end; it has a ChatML template."""
    directory = tmp_path / "base"
    save_folder("llama", directory, vocab_size=400)
    backend = Backend.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>", TURN_END])
    backend.save(str(directory / "tokenizer.json"))
    write(directory / "tokenizer_config.json", {"eos_token": END, **CLASS})
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    write(directory / "generation_config.json", {"eos_token_id": 0, "temperature": 0.5, "do_sample": True})
    always(directory, backend.token_to_id(TURN_END))
    return directory


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values))


def always(directory: Path, token: int) -> None:
    """Change a model's weights so that this token follows every other."""
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(1.0)
    weights["lm_head.weight"].mul_(0.01)[token] = 1.0
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def generated(model, tokenizer: Tokenizer, config=None) -> int:
    """How many tokens transformers generates; LIMIT if nothing stops it."""
    ids = torch.tensor([tokenizer.encode("one two three")])
    result = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, generation_config=config)
    return result.size(1) - ids.size(1)


def export(checkpoint: Path, out: Path) -> Path:
    succeeds("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", checkpoint, "--out_dir", out)
    return out


def stops_in(folder: Path) -> None:
    """Both files name both tokens, and transformers stops at once."""
    turn_end = Tokenizer(folder).turn_end(TURN_END)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert generated(model, Tokenizer(folder)) == 1
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [0, turn_end]


@pytest.mark.slow
def test_what_was_taught_stops_every_way_out(chat_base, alpaca_file, tmp_path):
    stock = transformers.AutoModelForCausalLM.from_pretrained(chat_base)
    tokenizer = Tokenizer(chat_base)
    assert generated(stock, tokenizer) == LIMIT
    tune_with_template(chat_base, alpaca_file, tmp_path / "run")
    adapter = tmp_path / "run/final"
    turn_end = tokenizer.turn_end(TURN_END)
    named = json.loads((adapter / "generation_config.json").read_text())
    assert named == {"eos_token_id": [0, turn_end], "temperature": 0.5, "do_sample": True}
    stops_in(export(adapter, tmp_path / "hf"))

    write(adapter / "generation_config.json", {"eos_token_id": 0})  # as earlier versions left it
    succeeds("scripts/merge_lora.py", "--lora_path", adapter, "--out_dir", tmp_path / "merged")
    named = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert named == {"eos_token_id": [0, turn_end]}
    stops_in(export(tmp_path / "merged", tmp_path / "hf_of_merge"))
    stops_in(export(adapter, tmp_path / "hf_of_old"))

    said = succeeds("scripts/export_peft.py", "--lora_path", adapter, "--out_dir", tmp_path / "peft").stdout
    assert f"answers end with {TURN_END}, at which the base does not stop" in said
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(stock, tmp_path / "peft")
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "peft")
    assert generated(model, tokenizer, config) == 1


def tune_with_template(base: Path, data: Path, out: Path) -> None:
    succeeds(
        *("finetune/lora.py", "--checkpoint_dir", base, "--out_dir", out, "--data", "JSON"),
        *("--data.path", data, "--prompt_style", "template", "--train.max_steps", 1),
        *("--train.learning_rate", 1e-6, "--accelerator", "cpu"),
    )


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_another_end_of_text_is_named_with_the_base_s(file, chat_base, tmp_path):
    write(chat_base / "tokenizer_config.json", CLASS)
    write(chat_base / file, {"eos_token": TURN_END, **(CLASS if file == "tokenizer_config.json" else {})})
    tokenizer = Tokenizer(chat_base)
    assert tokenizer.token(tokenizer.eos_id) == TURN_END
    assert transformers.AutoTokenizer.from_pretrained(chat_base).eos_token == TURN_END
    assert tokenizer.stop_ids == {0, tokenizer.eos_id}
    stops_in(export(chat_base, tmp_path / "hf"))


def test_a_token_of_the_map_ends_an_answer_beside_that_of_the_settings(chat_base):
    write(chat_base / "special_tokens_map.json", {"eos_token": TURN_END})
    tokenizer = Tokenizer(chat_base)
    assert tokenizer.token(tokenizer.eos_id) == END
    assert {tokenizer.token(stop) for stop in tokenizer.stop_ids} == {END, TURN_END}


def test_without_a_generation_config_the_model_s_config_names_the_end(chat_base):
    (chat_base / "generation_config.json").unlink()
    config = json.loads((chat_base / "config.json").read_text())
    turn_end = Tokenizer(chat_base).turn_end(TURN_END)
    for named, stops in ((turn_end, {0, turn_end}), ([turn_end, 7], {0, turn_end}), (None, {0})):
        write(chat_base / "config.json", config | {"eos_token_id": named})
        assert load(chat_base).tokenizer.stop_ids == stops


@pytest.mark.parametrize(
    ("stored", "named"),
    [({}, 5), ({"eos_token_id": None}, 5), ({"eos_token_id": 5}, 5), ({"eos_token_id": [7]}, [7, 5])],
)
def test_what_is_named_already_stays_as_it_is(stored, named):
    values = {"top_p": 0.9, **stored}
    assert with_stops(values, [5]) == {"top_p": 0.9, "eos_token_id": named}
    assert with_stops({"eos_token_id": [0, 5]}, [5]) == {"eos_token_id": [0, 5]}
