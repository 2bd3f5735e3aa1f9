"""What a LoRA file's header says is part of the file: alpha that stands only there, and what is
carried on to what is made of the file."""

import hashlib
import json

import pytest
import torch
from conftest import REPO
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from test_lora_tools import COMBINE, EXTRACT, INSPECT, MERGE, RESIZE, fails, succeeds

from litlora.errors import CheckpointError
from litlora.formats.lora_files import read_lora
from litlora.storage.tensors import training_hashes, write_safetensors

FILES = REPO / "tests/diffusers_files"
"""Made by the real diffusers, see make.py there."""
ADAPTERS = "lora_adapter_metadata"
HASHES = {"sshs_model_hash": "ab", "sshs_legacy_hash": "cd"}


def factors(*modules: str, rank: int = 16, spelling=("lora_A", "lora_B")) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = dict(zip(spelling, ((rank, 10), (8, rank)), strict=True))
    return {
        f"{module}.{part}.weight": torch.randn(shape) for module in modules for part, shape in shapes.items()
    }


def header(file) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return content.metadata()


def deltas(file) -> dict[str, torch.Tensor]:
    return {name: update.product() for name, update in read_lora(file).updates.items()}


def merged(tmp_path, source: dict, lora, *more: object) -> dict[str, torch.Tensor]:
    save_file(source, tmp_path / "source.safetensors")
    words = ["--source-model", tmp_path / "source.safetensors", "--lora-model", lora]
    succeeds(MERGE, *words, "--output", tmp_path / "merged.safetensors", "--output_dtype", "fp32", *more)
    return load_file(tmp_path / "merged.safetensors")


def test_the_issues_example_is_added_four_times(tmp_path):
    A, B, W = torch.randn(16, 10), torch.randn(8, 16), torch.randn(8, 10)
    save_file(
        {"transformer.b.q.lora_A.weight": A, "transformer.b.q.lora_B.weight": B},
        tmp_path / "lora.safetensors",
        {ADAPTERS: json.dumps({"transformer.r": 16, "transformer.lora_alpha": 64})},
    )
    result = merged(tmp_path, {"b.q.weight": W}, tmp_path / "lora.safetensors")["b.q.weight"]
    wanted = W.double() + 4 * B.double() @ A.double()
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-4)
    described = json.loads(succeeds(INSPECT, tmp_path / "lora.safetensors", "--json"))
    assert described["layers"][0]["scale"] == 4 and described["lora"]["alpha"] == [64]


@pytest.mark.parametrize("kind", ["hada_w1", "dora"])
def test_the_headers_scale_counts_for_products_and_dora_too(tmp_path, kind):
    A, B, W = torch.randn(4, 10), torch.randn(8, 4), torch.randn(8, 10)
    C, D, m = torch.randn(4, 10), torch.randn(8, 4), torch.rand(8)
    lora = {"b.q.hada_w1_a": B, "b.q.hada_w1_b": A, "b.q.hada_w2_a": D, "b.q.hada_w2_b": C}
    V = W + 3 * (B @ A) * (D @ C)
    if kind == "dora":
        lora = {"b.q.lora_A.weight": A, "b.q.lora_B.weight": B, "b.q.lora_magnitude_vector": m}
        V = W + 3 * B @ A
    wanted = m[:, None] * V / V.norm(dim=1, keepdim=True) if kind == "dora" else V
    lora = {f"transformer.{name}": tensor for name, tensor in lora.items()}
    stated = {"transformer.r": 4, "transformer.lora_alpha": 12, "transformer.use_dora": kind == "dora"}
    save_file(lora, tmp_path / "lora.safetensors", {ADAPTERS: json.dumps(stated)})
    result = merged(tmp_path, {"b.q.weight": W}, tmp_path / "lora.safetensors")["b.q.weight"]
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_dora_that_only_the_header_tells_of_is_refused(tmp_path):
    stated = {"transformer.r": 16, "transformer.lora_alpha": 16, "transformer.use_dora": True}
    file = tmp_path / "lora.safetensors"
    save_file(factors("transformer.b.q"), file, {ADAPTERS: json.dumps(stated)})
    with pytest.raises(CheckpointError, match="b.q has no lora_magnitude_vector, though use_dora is set"):
        read_lora(file)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns"])
@pytest.mark.parametrize("end", ["", "_bare"])
def test_a_merge_gives_what_diffusers_gives(tmp_path, name, end):
    source, wanted = load_file(FILES / "base.safetensors"), load_file(FILES / f"{name}_merged.safetensors")
    result = merged(tmp_path, source, FILES / f"{name}{end}.safetensors")
    assert max((wanted[key] - source[key]).abs().max() for key in wanted) > 0.5
    for key, tensor in wanted.items():
        torch.testing.assert_close(result[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns"])
def test_a_resized_file_tells_its_alpha_to_peft(tmp_path, name):
    """diffusers hands the metadata to LoraConfig; so does this."""
    peft = pytest.importorskip("peft")
    file = FILES / f"{name}.safetensors"
    before = deltas(file)
    succeeds(RESIZE, "--lora_path", file, "--rank", 6, "--out_dir", tmp_path / "resized")
    result = tmp_path / "resized" / file.name
    settings = json.loads(header(result)[ADAPTERS])
    config = peft.LoraConfig(**{key.removeprefix("transformer."): value for key, value in settings.items()})
    assert config.r == 6 and not config.rank_pattern
    stored = load_file(result)
    for key, delta in before.items():
        module = key.removeprefix("transformer.")
        alpha = config.alpha_pattern.get(module, config.alpha_pattern.get(f"^{module}", config.lora_alpha))
        found = alpha / config.r * stored[f"{key}.lora_B.weight"] @ stored[f"{key}.lora_A.weight"]
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(deltas(result)[key], delta, rtol=1e-5, atol=1e-6)


def test_a_combination_of_files_with_alpha_in_the_header_is_their_sum(tmp_path):
    files = [FILES / "plain.safetensors", FILES / "patterns.safetensors"]
    succeeds(COMBINE, "--lora_path", *files, "--weights", 0.5, 2, "--out_dir", tmp_path / "out")
    one, other, found = (deltas(file) for file in (*files, tmp_path / "out/plain.safetensors"))
    for key, delta in found.items():
        torch.testing.assert_close(delta, 0.5 * one[key] + 2 * other[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({ADAPTERS: "{"}, "cannot be read as JSON"),
        ({ADAPTERS: "[]"}, "must hold a JSON object"),
        ({ADAPTERS: json.dumps({"transformer.r": 16})}, "lacks lora_alpha"),
        ({ADAPTERS: json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8})}, "has rank 16"),
        ({ADAPTERS: json.dumps({"transformer.r": 16, "transformer.lora_alpha": "x"})}, "lora_alpha is 'x'"),
        (
            {ADAPTERS: json.dumps({"r": 16, "lora_alpha": 8, "peft_type": "LOKR"})},
            "peft_type LOKR is not supported",
        ),
        (
            {ADAPTERS: json.dumps({"text_encoder.r": 16, "text_encoder.lora_alpha": 8})},
            "describes text_encoder",
        ),
        ({"lora_alpha": "8"}, "says lora_alpha 8"),
        ({"scale": "0.5"}, "says scale 0.5"),
        ({"alpha": "1e999"}, "says alpha inf"),
        ({"network_alpha": "nan"}, "says network_alpha nan"),
        ({"lora_config": '{"adapters": {"default": {"lora_alpha": 8}}}'}, "adapters.default.lora_alpha 8"),
        ({"lora_config": json.dumps({"rank": 16, "alpha": 8})}, "says lora_config.alpha 8"),
    ],
)
def test_what_looks_like_a_scale_and_is_not_understood_is_refused(tmp_path, metadata, says):
    file = tmp_path / "lora.safetensors"
    save_file(factors("transformer.x"), file, metadata)
    for words in ([INSPECT, file], [RESIZE, "--lora_path", file, "--rank", 2, "--out_dir", tmp_path / "out"]):
        message = fails(*words)
        assert says in message and "lora.safetensors" in message and "\n" not in message


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_alpha": "16", "scale": "1.0", "lora_config": '{"alpha": 16}'},
        {"modelspec.scale": "3", "training_info": '{"step": 5}', "name": "alpha"},
    ],
)
def test_metadata_that_agrees_or_says_nothing_of_scale_is_no_obstacle(tmp_path, metadata):
    save_file(factors("x"), tmp_path / "lora.safetensors", metadata)
    assert read_lora(tmp_path / "lora.safetensors").updates["x"].scale == 1


def test_alpha_in_the_header_and_beside_the_factors_must_agree(tmp_path):
    metadata = {ADAPTERS: json.dumps({"r": 16, "lora_alpha": 64})}
    save_file({**factors("x"), "x.alpha": torch.tensor(64.0)}, tmp_path / "a.safetensors", metadata)
    assert read_lora(tmp_path / "a.safetensors").updates["x"].scale == 4
    save_file({**factors("x"), "x.alpha": torch.tensor(8.0)}, tmp_path / "b.safetensors", metadata)
    assert "x.alpha is 8, but lora_adapter_metadata in the header says 64" in fails(
        INSPECT, tmp_path / "b.safetensors"
    )


def test_kohyas_header_does_not_scale_and_a_contradiction_is_said(tmp_path):
    """networks/lora.py: a module without .alpha has alpha = rank, whatever the header says."""
    file = tmp_path / "lora.safetensors"
    tensors = factors("lora_unet_x", spelling=("lora_down", "lora_up"))
    save_file(tensors, file, {"ss_network_dim": "16", "ss_network_alpha": "4.0"})
    lora = read_lora(file)
    assert lora.updates["lora_unet_x"].scale == 1
    assert "note     " in succeeds(INSPECT, file) and "ss_network_alpha 4" in lora.notices[0]
    save_file(tensors | {"lora_unet_x.alpha": torch.tensor(4.0)}, file, {"ss_network_alpha": "4.0"})
    assert read_lora(file).notices == []


def kohya_file(file, rank: int, alpha: float, **metadata: str) -> None:
    tensors = factors("lora_unet_x", "lora_unet_y", rank=rank, spelling=("lora_down", "lora_up"))
    alphas = {f"lora_unet_{name}.alpha": torch.tensor(alpha) for name in "xy"}
    sizes = {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    save_file(tensors | alphas, file, sizes | HASHES | {"format": "pt", "ss_v2": "False"} | metadata)


def kohyas_hashes(file) -> dict[str, str]:
    """As kohya's scripts compute them of the bytes that they are about to save."""
    said = {name: text for name, text in header(file).items() if name.startswith("ss_")}
    data = save(load_file(file), said)
    begin = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(data[begin:]).hexdigest(), "sshs_legacy_hash": legacy}


@pytest.mark.parametrize("size", [100, 250_000, 262_100, 300_000])
def test_kohyas_hashes_are_computed_as_kohya_does(size, tmp_path):
    tensors = {"b": torch.randn(size), "a": torch.randn(3, 4), "c": torch.randn(7).half()}
    metadata = {"ss_title": 'é "x"\n\x01', "other": "y" * 999}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert training_hashes(tensors, metadata) == kohyas_hashes(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", dict(sorted(tensors.items())), metadata)
    data = (tmp_path / "b.safetensors").read_bytes()
    whole = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert whole == training_hashes(tensors, metadata)["sshs_model_hash"]


def test_a_resized_file_keeps_what_is_true_and_updates_rank_and_alpha(tmp_path):
    file = tmp_path / "a.safetensors"
    args = json.dumps({"conv_dim": "8", "dropout": "0.1"})
    kohya_file(file, 6, 3.0, ss_learning_rate="0.1", ss_network_args=args)
    said = succeeds(RESIZE, "--lora_path", file, "--rank", 2, "--out_dir", tmp_path / "out")
    assert header(tmp_path / "out/a.safetensors") == {
        **kohyas_hashes(tmp_path / "out/a.safetensors"),
        "format": "pt",
        "ss_v2": "False",
        "ss_learning_rate": "0.1",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
        "ss_network_args": json.dumps({"dropout": "0.1"}),
    }
    assert said.count("left out of the header") == 1
    assert "ss_network_args.conv_dim" in said and not any(name in said for name in HASHES)


def test_a_combined_file_keeps_what_all_its_files_say(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    kohya_file(files[0], 2, 2.0, ss_learning_rate="0.1", **{"modelspec.title": "one"})
    kohya_file(files[1], 1, 2.0, ss_learning_rate="0.2", **{"modelspec.author": "me"})
    said = succeeds(COMBINE, "--lora_path", *files, "--mode", "cat", "--out_dir", tmp_path / "out")
    kept = header(tmp_path / "out/a.safetensors")
    assert kept.keys() == {"format", "ss_v2", "ss_network_dim", "ss_network_alpha", *HASHES}
    assert kohyas_hashes(tmp_path / "out/a.safetensors").items() <= kept.items()
    assert kept["ss_network_dim"] == "3"
    stored = load_file(tmp_path / "out/a.safetensors")
    alphas = {tensor.item() for key, tensor in stored.items() if "alpha" in key}
    assert float(kept["ss_network_alpha"]) == alphas.pop() and not alphas
    for name in ("ss_learning_rate", "modelspec.title", "modelspec.author"):
        assert name in said


def test_a_merged_model_keeps_the_metadata_of_its_base(tmp_path):
    kohya_file(tmp_path / "lora.safetensors", 2, 2.0)
    metadata = {"modelspec.architecture": "flux-1-dev", "config": "{}", "modelspec.hash_sha256": "0x1"}
    source = {f"{name}.weight": torch.randn(8, 10) for name in "xy"}
    save_file(source, tmp_path / "a.safetensors", metadata)
    words = ["--source-model", tmp_path / "a.safetensors", "--lora-model", tmp_path / "lora.safetensors"]
    said = succeeds(MERGE, *words, "--output", tmp_path / "out")
    assert header(tmp_path / "out.safetensors") == {
        "format": "pt",
        "modelspec.architecture": "flux-1-dev",
        "config": "{}",
    }
    assert "left out of the header, as it no longer holds: modelspec.hash_sha256\n" in said
    said = succeeds(MERGE, *words, "--output", tmp_path / "out", "--output-format", "pytorch")
    assert "torch files have no header: config, modelspec.architecture\n" in said


def test_an_extracted_lora_says_which_model_it_is_for(tmp_path):
    source = {"x.weight": torch.randn(8, 10)}
    metadata = {"modelspec.architecture": "flux-1-dev", "modelspec.title": "base"}
    save_file(source, tmp_path / "a.safetensors", metadata)
    save_file({"x.weight": torch.randn(8, 10)}, tmp_path / "b.safetensors")
    words = ["--source-model", tmp_path / "a.safetensors", "--target-model", tmp_path / "b.safetensors"]
    succeeds(EXTRACT, *words, "--output", tmp_path / "lora", "--min_size", 0)
    assert header(tmp_path / "lora.safetensors") == {
        "format": "pt",
        "modelspec.architecture": "flux-1-dev/lora",
    }


def test_a_short_suffix_is_a_safetensors_file_everywhere(tmp_path):
    kohya_file(tmp_path / "lora.sft", 2, 4.0)
    assert "scale" in succeeds(INSPECT, tmp_path / "lora.sft")
    succeeds(RESIZE, "--lora_path", tmp_path / "lora.sft", "--rank", 1, "--out_dir", tmp_path / "out")
    assert read_lora(tmp_path / "out/lora.sft").updates["lora_unet_x"].rank == 1
    source = {f"{name}.weight": torch.randn(8, 10) for name in "xy"}
    save_file(source, tmp_path / "base.sft")
    words = ["--source-model", tmp_path / "base.sft", "--lora-model", tmp_path / "lora.sft"]
    succeeds(MERGE, *words, "--output", tmp_path / "out.sft")
    assert load_file(tmp_path / "out.sft").keys() == source.keys()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_in_8_bits_is_resized_and_combined_in_16_and_says_so(tmp_path, kind):
    for name in "ab":
        tensors = factors(f"{name}.x", "x", rank=4)
        save_file({key: tensor.to(kind) for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    words = ["--lora_path", tmp_path / "a.safetensors", "--rank", 4]
    said = succeeds(RESIZE, *words, "--out_dir", tmp_path / "out")
    assert "factors in 8 bits are written as float16" in said
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "out/a.safetensors")
    assert all(torch.equal(after[key].float(), before[key].float()) for key in before)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert "in float16, which holds what the files have in 8 bits" in succeeds(
        COMBINE, "--lora_path", *files, "--out_dir", tmp_path / "both"
    )
