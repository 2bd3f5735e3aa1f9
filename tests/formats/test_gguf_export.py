"""GGUF files that we write: llama.cpp, transformers and our own reader find the model that was tested."""

import importlib.util
import json
import shutil
from pathlib import Path

import made_tokenizers
import pytest
import torch
from conftest import QUICKSTART, random_adapter, tiny_config
from families import LLAMA3, YARN, save_folder
from go_template import executed
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from litlora.adapters.merge import converted, plan_merge
from litlora.adapters.verify import live_model, logits, probe_ids
from litlora.adapters.verify_gguf import HARD_TEXTS, Comparison, check_text, compare, read_back
from litlora.checkpoint import open_checkpoint, resolve
from litlora.errors import CheckpointError
from litlora.formats.gguf_adapter import adapter_tensors, check_adapter, write_adapter_file
from litlora.formats.gguf_architectures import GRAPHS, context_of, graph_of
from litlora.formats.gguf_export import GGUFModel, as_gguf, kinds_in, write_model
from litlora.formats.gguf_prompt import asking_of
from litlora.formats.gguf_text import Text, text_of
from litlora.formats.gguf_tokenizer import name_for
from litlora.formats.llama_cpp import LlamaCpp, quantise
from litlora.formats.ollama import go_template, turns_of
from litlora.gguf_vocabulary import DIVISIONS
from litlora.lora import LoRAConfig
from litlora.prompts.choice import chosen_template
from litlora.tokenizer import Tokenizer as OurTokenizer

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs the extra llama-cpp (llama-cpp-python)"
)
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
CHANGES = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "qwen3-moe": {"decoder_sparse_step": 1},
    "qwen2-moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "smollm3": {"use_sliding_window": False},
    "phi": {"qk_layernorm": False},
    "ernie4-5": {"use_bias": False},
    "olmoe": {"num_key_value_heads": 4},
    "nemotron": {"head_dim": 16},
    "glm4-moe": {"n_group": 1},
    **dict.fromkeys(("qwen3-5", "qwen3-5-moe"), {"linear_value_head_dim": 8}),
    "deepseek-v3": {"moe_intermediate_size": 32, "n_routed_experts": 12, "n_group": 4, "topk_group": 2}
    | {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "moonlight": {"num_hidden_layers": 27, "rope_interleave": True, "attention_bias": False},
    "exaone4-full": {"rope_scaling": LLAMA3},
    "ernie4-5-moe": {"moe_layer_interval": 1},
    "hunyuan": {"rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    **{f"falcon-{size}": {"bias": False} for size in ("40b", "11b")},
    "qwen3-next": {"linear_value_head_dim": 8, "mlp_only_layers": []},
    "dots1": {"num_key_value_heads": 4, "n_group": 1, "max_window_layers": 9},
    "phi4-mini": {"hidden_size": 32, "original_max_position_embeddings": 256},
    "gpt2": {"n_positions": 512, "n_embd": 64},
}
LLAMA_CPP = (
    *(
        "llama",
        "llama-3",
        "llama-linear",
        "llama-dynamic",
        "llama-yarn",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
    ),
    *("qwen3-moe", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "gpt-neox", "gpt2", "starcoder2", "granite"),
    *("smollm3", "olmo3", "olmoe", "olmo", "phi", "stablelm", "cohere", "cohere2", "glm4", "ernie4-5"),
    *("seed-oss", "nemotron", "arcee", "qwen2-moe", "phi4-mini", "glm4-moe", "dots1"),
    *("qwen3-5", "qwen3-5-moe", "qwen3-next", "deepseek-v3", "moonlight"),
    *("ernie4-5-moe", "exaone4-full", "hunyuan", "apertus", "falcon-7b", "falcon-40b", "falcon-11b"),
)


def saved(name: str, directory: Path, tokenizer_dir: Path) -> Path:
    """A random model of a family as a Hugging Face folder with a tokenizer."""
    sizes = {"vocab_size": 400} if name == "gpt2" else SIZES
    save_folder(name, directory, **{**sizes, **CHANGES.get(name, {})})
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    return directory


class Export:
    """A checkpoint on its way into a file."""

    def __init__(self, directory: Path, prompt_style: str | None = "plain") -> None:
        self.chain = resolve(directory)
        plan, config = plan_merge(self.chain)
        self.plan = converted(plan, torch.float32)
        self.model: GGUFModel = as_gguf(self.plan, config, self.chain.base.family(), directory)
        self.text: Text = text_of(self.chain.sources, config, prompt_style)

    def write(self, file: Path, kind: str) -> Path:
        file.parent.mkdir(exist_ok=True)
        write_model(file, self.model, kind, lambda writer: self.text.describe(writer, file.parent.name))
        return file

    def run(self, file: Path, adapter: Path | None = None, *, tokens: int = 96) -> Comparison:
        """llama.cpp beside the live model; the text is checked, too."""
        ids = probe_ids(self.chain.sources, self.model.config)[0][:, :tokens]
        live = logits(*live_model(self.plan, self.model.config), ids)
        running = LlamaCpp(file, adapter, context=256)
        try:
            assert check_text(self.text, running).endswith(self.text.stops[-1])
            return compare(live, running, ids[0].tolist())
        finally:
            running.close()


# ---- without llama.cpp


@pytest.mark.parametrize("name", ["llama-linear", "gemma2", "phi3", "mixtral", "qwen2-moe"])
def test_our_reader_finds_the_model_that_was_written(name, tmp_path, tokenizer_dir):
    export = Export(saved(name, tmp_path / "hf", tokenizer_dir))
    file = export.write(tmp_path / "gguf/model.gguf", "F32")
    assert read_back(file, export.model.stored()).startswith("read back: all")
    found, expected = open_checkpoint(file), export.chain.base
    assert found.tensors.keys() == expected.tensors.keys()
    for tensor_name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[tensor_name], tensor, atol=1e-6, rtol=0)
    facts, theirs = expected.config.to_dict(), found.config.to_dict()
    differing = {key for key in facts | theirs if facts.get(key) != theirs.get(key)}
    assert differing <= {"sliding_window", "max_position_embeddings"}  # a window becomes the context


def test_transformers_reads_the_same_model_and_tokens(tmp_path, tokenizer_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = Export(saved("llama", tmp_path / "hf", tokenizer_dir))
    place = export.write(tmp_path / "gguf/model.gguf", "F16").parent
    theirs = AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf", dtype=torch.float32).eval()
    ids, _ = probe_ids(export.chain.sources, export.model.config)
    live = logits(*live_model(export.plan, export.model.config), ids)
    with torch.inference_mode():
        difference = (theirs(ids).logits[0] - live).norm() / live.norm()
    assert 0 < difference < 2e-3  # what fp16 loses
    read = AutoTokenizer.from_pretrained(place, gguf_file="model.gguf")
    text = "the quick brown fox, it's 1 dog\n\n  über"
    assert read.encode(text, add_special_tokens=False) == export.text.tokenizer.encode(text)


def test_every_name_of_a_division_is_found_by_what_it_does(tmp_path):
    for division in DIVISIONS:
        directory = byte_level(tmp_path / division.name, division.name)
        text = text_of([directory], tiny_config(vocab_size=400), "plain")
        assert (text.vocabulary.model, text.vocabulary.pre) == ("gpt2", division.name)


def byte_level(directory: Path, name: str) -> Path:
    """A directory with a byte-level tokenizer that divides texts as llama.cpp does by that name."""
    division = next(one for one in DIVISIONS if one.name == name)
    steps = []
    for kind, *what in division.steps:
        if kind == "split":
            # DeepSeek's files have the characters themselves.
            pattern = what[0].replace(r"\r\n", "\r\n") if name == "deepseek-v3" else what[0]
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
        elif kind == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=what == ["one by one"]))
        elif kind == "punctuation":
            steps.append(pre_tokenizers.Punctuation("contiguous"))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if ("byte level", "GPT-2") not in division.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend = Tokenizer(models.BPE(ignore_merges=division.ignores_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS, trainer)
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


WORDS = ["don't THEY'LL 123 1234567 the quick  brown fox\n\n jumps; über naïve 你好 ... ))) they'll 2024"] * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.__setattr__("normalizer", normalizers.Lowercase()), "changes texts by Lowercase"),
        (
            lambda t: t.__setattr__("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "puts a space before every text",
        ),
        (
            lambda t: t.__setattr__("pre_tokenizer", pre_tokenizers.Split(Regex(r"\w+"), "isolated")),
            r"divides texts by split: \\w\+",
        ),
        (lambda t: t.__setattr__("model", models.WordLevel({"a": 0}, "a")), "is a WordLevel model"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(change, reason, tmp_path, tokenizer_dir):
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    change(backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with pytest.raises(CheckpointError, match=reason):
        text_of([tmp_path], tiny_config(), "plain")


def sentencepiece(directory: Path, name: str, **settings: object) -> Path:
    """A directory with one of the SentencePiece models of tests/sentencepiece_files."""
    directory.mkdir()
    source = Path(__file__).parent.parent / f"sentencepiece_files/{name}.model"
    shutil.copy(source, directory / "tokenizer.model")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **settings}))
    return directory


def test_sentencepiece_has_its_scores_back_in_order(tmp_path):
    text = text_of([sentencepiece(tmp_path / "bpe", "bpe")], tiny_config(), "plain")
    vocabulary = text.vocabulary
    assert (vocabulary.model, vocabulary.space_prefix, len(vocabulary.tokens)) == ("llama", True, 400)
    order = sorted(range(400), key=lambda number: -vocabulary.scores[number])
    made = [number for number in order if vocabulary.scores[number] > min(vocabulary.scores)]
    assert made == sorted(made)  # SentencePiece numbers its pieces by score
    with pytest.raises(CheckpointError, match="is a Unigram model"):
        text_of([sentencepiece(tmp_path / "unigram", "unigram")], tiny_config(), "plain")


def test_merges_that_no_scores_give_are_refused(tmp_path):
    made_tokenizers.write_tokenizer(tmp_path, "metaspace first", [])
    with pytest.raises(CheckpointError, match="has 1 merges for '.*', whose parts are [2-9] pairs of tokens"):
        text_of([tmp_path], tiny_config(), "plain")
    made_tokenizers.write_tokenizer(tmp_path, "metaspace always", [])
    with pytest.raises(CheckpointError, match="puts a space before every text that has none"):
        text_of([tmp_path], tiny_config(), "plain")


def test_a_template_whose_turns_would_never_end_is_refused(tmp_path, tokenizer_dir):
    with pytest.raises(CheckpointError, match="needs <.im_start.>, <.im_end.>, which the tokenizer cuts"):
        text_of([tokenizer_dir], tiny_config(), "chatml")
    directory = byte_level(tmp_path / "t", "qwen2")
    text = text_of([directory], tiny_config(), "chatml")
    assert text.stops == ["<|endoftext|>", "<|im_end|>"]
    assert text.ids["eot"] == text.tokenizer.encode("<|im_end|>")[0]


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi", "mistral"])
def test_ollamas_template_writes_what_the_chat_template_writes(name, tmp_path):
    special = made_tokenizers.CONTROL[name]
    made_tokenizers.write_tokenizer(tmp_path, "byte-level with a beginning", special)
    template = chosen_template(name, OurTokenizer(tmp_path)).template
    turns = turns_of(template)
    talk = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
    ]
    for messages in (talk, [{"role": "system", "content": "brief"}, *talk]):
        assert turns.text(messages) == template.render(messages)
        assert "<s>" + executed(go_template(turns, "<s>"), messages) == template.render(messages)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (
            "llama",
            {"hidden_act": "gelu"},
            "hidden_act is 'gelu', and llama.cpp's architecture llama has 'silu'",
        ),
        ("llama", {"qk_norm": "head"}, "qk_norm is 'head'"),
        (
            "qwen2",
            {"attention_bias": True, "attention_output_bias": False, "head_dim": 16},
            "num_attention_heads x head_dim is 64",
        ),
        ("smollm3", {"layers_without_rope": (0,)}, r"layers_without_rope is \[0\].* has \[\]"),
        ("gpt_oss", {}, "models of the family gpt_oss cannot be written as GGUF, only llama, mistral"),
        ("exaone4", {"num_hidden_layers": 64, "norm_position": "after", "qk_norm": "head"}, "above 63"),
        (
            "gemma",
            {"norm": "rmsnorm_plus_one", "hidden_act": "gelu_tanh", "scale_embeddings": True},
            "has an output head of its own, and llama.cpp's architecture gemma has none",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(kind, changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        graph_of(kind, tiny_config(**changes))


def test_every_family_that_is_written_is_run_in_llama_cpp():
    run = {name.replace("-", "_") for name in LLAMA_CPP}
    aliases = {kind: kind.removesuffix("_text") for kind in GRAPHS}
    aliases |= {"exaone4": "exaone4_full", "hunyuan_v1_dense": "hunyuan", "falcon": "falcon_7b"}
    assert {aliases.get(kind, kind) for kind in GRAPHS} <= run


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "falcon", "bpe", "bpe_user"])
def test_the_tokenizer_inside_a_file_is_the_one_that_was_written(name, tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    (base / "tokenizer.json").unlink()
    with_bytes = not name.startswith("bpe")
    make = byte_level if with_bytes else sentencepiece
    shutil.copytree(make(tmp_path / "made", name), base, dirs_exist_ok=True)
    export = Export(base, "chatml" if with_bytes else "alpaca")
    place = export.write(tmp_path / "gguf/model.gguf", "F32").parent
    ours, read = OurTokenizer(base), OurTokenizer(place)
    assert read.encode_batch([*HARD_TEXTS]) == ours.encode_batch([*HARD_TEXTS])
    ids = ours.encode("über <|im_end|> 你好 it's")
    assert read.decode(ids) == ours.decode(ids)
    assert (read.eos_id, read.begin_ids, read.vocab_size) == (ours.eos_id, ours.begin_ids, ours.vocab_size)
    assert read.stop_ids >= {*export.text.asking.stops}
    again = asking_of([place], read)  # the chat template is in the file, too
    assert again.template.source == export.text.asking.template.source
    assert again.stops == export.text.asking.stops
    # A tokenizer beside the file goes first.
    (place / "tokenizer.json").write_text(
        (tmp_path / "made/tokenizer.json").read_text() if with_bytes else "{"
    )
    if with_bytes:
        (place / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        assert OurTokenizer(place).eos_id == ours.encode("<|im_end|>")[0]
    else:
        with pytest.raises(CheckpointError, match="tokenizer.json: not a usable tokenizer file"):
            OurTokenizer(place)


def test_a_tokenizer_inside_that_is_not_known_is_named_where_it_is_needed(tmp_path, tokenizer_dir):
    export = Export(saved("llama", tmp_path / "hf", tokenizer_dir))
    file = export.write(tmp_path / "gguf/model.gguf", "F32")
    file.write_bytes(file.read_bytes().replace(b"gpt-2", b"gpt-7"))
    resolve(tmp_path / "gguf")  # the weights alone need none
    with pytest.raises(
        CheckpointError, match="model.gguf: .*divides texts as 'gpt-7', which is not known here"
    ):
        OurTokenizer(tmp_path / "gguf")


# ---- with llama.cpp


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_computes_what_the_live_model_does(name, tmp_path, tokenizer_dir):
    export = Export(saved(name, tmp_path / "hf", tokenizer_dir))
    window = export.model.config.sliding_window
    # A model whose windows llama.cpp does not have is the same within one window.
    tokens = window if window and context_of(export.model.graph, export.model.config) == window else 96
    # 27 random layers magnify what F16 rounds.
    for kind, limit in (("F32", 1e-3), ("F16", 1e-2))[: 1 if name == "moonlight" else 2]:
        found = export.run(export.write(tmp_path / f"gguf/{kind}.gguf", kind), tokens=tokens)
        print(found.line(f"{name} {kind}"))
        assert found.error < limit and found.kl < 1e-3 and found.agreement > 0.95, (kind, found)


@pytest.mark.slow
@needs_llama_cpp
def test_fewer_bits_lose_more(tmp_path):
    export = Export(QUICKSTART, "alpaca")
    plain = export.write(tmp_path / "plain.gguf", "F32")
    found = []
    for kind in ("F32", "BF16", "Q8_0"):
        found.append((kind, export.run(export.write(tmp_path / f"{kind}.gguf", kind))))
    for kind in ("Q6_K", "Q4_K_M", "Q2_K"):
        quantise(plain, tmp_path / f"{kind}.gguf", kind)
        assert "F32" in kinds_in(tmp_path / f"{kind}.gguf")
        found.append((kind, export.run(tmp_path / f"{kind}.gguf")))
    print(*(one.line(kind) for kind, one in found), sep="\n")
    losses = [one.kl for _, one in found]
    assert losses == sorted(losses) and losses[1] < 1e-3 < losses[-1], losses


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt-neox", "gemma"])
def test_an_adapter_alone_is_added_by_llama_cpp(name, tmp_path, tokenizer_dir):
    base = saved(name, tmp_path / "hf", tokenizer_dir)
    settings = LoRAConfig(rank=4, targets=("all-linear",), rank_pattern={"q_proj": 6})
    adapter_dir = random_adapter(tmp_path / "adapter", base, settings)
    export, below = Export(adapter_dir, "alpaca"), Export(base)
    adapter = export.chain.top
    check_adapter(adapter, below.model)
    alpha, tensors = adapter_tensors(adapter, below.model, export.chain.base.tensors)
    write_adapter_file(tmp_path / "adapter.gguf", below.model, alpha, tensors, "F32")
    file = below.write(tmp_path / "base.gguf", "F32")
    tokens = below.model.config.sliding_window or 96
    assert export.run(file, tmp_path / "adapter.gguf", tokens=tokens).error < 1e-3
    assert export.run(file, tokens=tokens).error > 0.05  # the base without it


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", [*(one.name for one in DIVISIONS), "bpe", "bpe_user"])
def test_llama_cpps_tokenizer_reads_hard_texts_as_ours_does(name, tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    bytes_first = not name.startswith("bpe")
    made = byte_level(tmp_path / "made", name) if bytes_first else sentencepiece(tmp_path / "made", name)
    (base / "tokenizer.json").unlink()
    shutil.copytree(made, base, dirs_exist_ok=True)
    # The text of prompts is compared, too, with the tokens that end turns in it.
    export = Export(base, "chatml" if bytes_first else "plain")
    assert export.text.stops == (["<|endoftext|>", "<|im_end|>"] if bytes_first else ["</s>"])
    assert export.run(export.write(tmp_path / "m/x.gguf", "F32")).error < 1e-3


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", ["llama3", "gemma", "phi", "mistral"])
def test_prompts_that_begin_with_a_token_have_it_once_in_llama_cpp(name, tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    kind, special = "byte-level with a beginning", made_tokenizers.CONTROL[name]
    made = made_tokenizers.write_tokenizer(tmp_path / "made", kind, special)
    shutil.copytree(made, base, dirs_exist_ok=True)
    export = Export(base, name)
    assert export.text.asking.begins and export.text.asking.marked
    assert export.run(export.write(tmp_path / "m/x.gguf", "F32")).error < 1e-3


def taking_spaces(base: Path, tmp_path: Path, plain: tuple[str, ...]) -> None:
    """Give a base the tokenizer of Phi 3 in small: its special tokens take the spaces behind them, but
    for the `plain` ones."""
    made = sentencepiece(tmp_path / "made", "bpe_user")
    source = OurTokenizer(made).source()
    size = max(source["model"]["vocab"].values()) + 1
    flags = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    for number, token in enumerate(["<|endoftext|>", *made_tokenizers.CONTROL["phi"]], size):
        source["added_tokens"].append({"id": number, "content": token, "rstrip": False, **flags})
    for token in source["added_tokens"]:
        token["rstrip"] = token["content"] not in plain
    (base / "tokenizer.json").write_text(json.dumps(source))
    (base / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<s>"}')


def test_tokens_that_take_spaces_are_those_of_phi_3_or_refused(tmp_path, make_checkpoint):
    base = make_checkpoint("my-phi-3")
    taking_spaces(base, tmp_path, ("<unk>", "<s>", "<|endoftext|>", "<|user|>"))
    with pytest.raises(CheckpointError, match=r"takes spaces beside <\|assistant\|>"):
        Export(base, "phi")
    export = Export(base, "plain")  # whose prompts have none of them
    file = export.write(tmp_path / "a/x.gguf", "F32")
    assert gguf.GGUFReader(file).fields["general.name"].contents() == "a"
    assert name_for("My-Phi3-run", strips=False) == "My-phi 3-run"


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_takes_the_spaces_behind_phi_3s_tokens(tmp_path, make_checkpoint):
    base = make_checkpoint("base")
    taking_spaces(base, tmp_path, ("<unk>", "<s>", "<|endoftext|>"))
    export = Export(base, "phi")
    file = export.write(tmp_path / "a/x.gguf", "F32")
    assert gguf.GGUFReader(file).fields["general.name"].contents() == "phi-3 a"
    assert export.run(file).error < 1e-3


@pytest.mark.slow
@needs_llama_cpp
def test_a_space_that_only_begins_a_text_fits_prompts_that_begin_with_a_token(tmp_path, make_checkpoint):
    """As tokenizers of Mistral have it: no space before what follows a special token."""
    base = make_checkpoint("base")
    backend = OurTokenizer(sentencepiece(tmp_path / "made", "bpe")).source()
    begin, backend["post_processor"], backend["normalizer"] = backend["post_processor"], None, None
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    backend["pre_tokenizer"] = metaspace
    (base / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (base / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(CheckpointError, match="puts a space before a text but not before what follows"):
        Export(base, "alpaca")
    (base / "tokenizer.json").write_text(json.dumps(backend | {"post_processor": begin}))
    export = Export(base, "alpaca")
    assert export.text.vocabulary.lacks_space and export.text.asking.begins
    assert export.run(export.write(tmp_path / "m/x.gguf", "F32")).error < 1e-3


def test_the_command_refuses_in_one_line_and_writes_what_it_says(tmp_path, forked):
    words = ("scripts/export_gguf.py", "--checkpoint_dir", QUICKSTART, "--out_dir", "gguf")
    said = forked.refuses(*words, cwd=tmp_path)
    assert "nothing says how to ask this model" in said and "--prompt_style" in said
    assert "--adapter_only needs an adapter" in forked.refuses(*words, "--adapter_only", "true", cwd=tmp_path)
    assert "choose F32, F16 or BF16" in forked.refuses(
        *words, "--adapter_only", "true", "--dtype", "Q8_0", cwd=tmp_path
    )
    said = forked.succeeds(
        *words, "--prompt_style", "alpaca", "--dtype", "Q8_0", "--verify", "false", cwd=tmp_path
    )
    assert "29 tensors in Q8_0, 9 tensors in F32" in said and "Answers end with `<|endoftext|>`." in said
    text = (tmp_path / "gguf/Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and text.endswith('PARAMETER stop "<|endoftext|>"\n')
    assert "already holds" in forked.refuses(*words, "--prompt_style", "alpaca", cwd=tmp_path)


@pytest.mark.slow
def test_a_file_alone_is_a_base(tmp_path, alpaca_file, forked):
    words = (
        "--checkpoint_dir",
        QUICKSTART,
        "--prompt_style",
        "alpaca",
        "--out_dir",
        "gguf",
        "--dtype",
        "Q8_0",
    )
    forked.succeeds("scripts/export_gguf.py", *words, cwd=tmp_path)
    words = ["--checkpoint_dir", "gguf/model.gguf", "--data", "JSON", "--data.path", alpaca_file]
    words += ["--train.max_steps", 2, "--out_dir", "run"]
    said = forked.succeeds("finetune/lora.py", *words, cwd=tmp_path)
    assert "stored in 8 bits (Q8_0, GGUF)" in said
    assert (tmp_path / "run/final/tokenizer.json").is_file()
    said = forked.succeeds(
        *("chat/base.py", "--checkpoint_dir", "run/final", "--prompt", "Hello", "--max_new_tokens", 4),
        cwd=tmp_path,
    )
    words = ("--checkpoint_dir", "run/final", "--out_dir", "again")
    said = forked.succeeds("scripts/export_gguf.py", *words, cwd=tmp_path)
    assert "Prompt style: template." in said and "merged: gguf + run/final" in said
