"""scripts/lora_extractor.py and lora_merger.py: what is extracted, added to the source, gives the target, in every format."""

import io
import re
import shlex
from contextlib import redirect_stdout

import pytest
import torch
from conftest import REPO
from conftest import fails as fails_as_a_process
from conftest import succeeds as succeeds_as_a_process
from safetensors.torch import load_file, save_file

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import full_meta, open_checkpoint, resolve, write_checkpoint
from litlora.cli import parse
from litlora.errors import UserError
from litlora.load import load
from litlora.settings import LoRAExtractor, LoRAMerger

EXTRACT, MERGE = "scripts/lora_extractor.py", "scripts/lora_merger.py"
SHAPES = {
    "blocks.0.attn.weight": (96, 80),
    "blocks.0.attn.bias": (96,),
    "blocks.1.conv.weight": (40, 12, 3, 3),
    "blocks.1.temporal.weight": (40, 12, 3),
    "blocks.1.volume.weight": (40, 6, 3, 3, 3),
    "blocks.1.modulation": (1, 6, 10),
    "weight_norm.weight": (80,),
    "scale": (7,),
    "frozen.weight": (20, 20),
}
RANK = 8


def succeeds(script: str, *arguments: object) -> str:
    """Run a command within this process, which need not import torch again; returns what it says."""
    module = {"__name__": "script"}
    exec(compile((REPO / script).read_text(), script, "exec"), module)
    said = io.StringIO()
    with redirect_stdout(said):
        module["main"](parse({EXTRACT: LoRAExtractor, MERGE: LoRAMerger}[script], [*map(str, arguments)]))
    return said.getvalue()


def fails(script: str, *arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        succeeds(script, *arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def pair(tmp_path):
    """Two models: the difference of each matrix has rank 8, but for a little noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    source = {name: noise(*shape) for name, shape in SHAPES.items()} | {"step": torch.tensor(3)}
    target = {name: tensor.clone() for name, tensor in source.items()}
    for name, shape in SHAPES.items():
        if name != "frozen.weight":
            change = noise(shape[0], RANK) @ noise(RANK, source[name][0].numel()) if len(shape) > 1 else noise(*shape)
            target[name] += change.view(shape) + 0.01 * noise(*shape)
    save_file(source, tmp_path / "source.safetensors")
    save_file(target, tmp_path / "target.safetensors")
    return source, target


def words(tmp_path, *more: object) -> list[object]:
    names = ["--source-model", tmp_path / "source.safetensors", "--target-model", tmp_path / "target.safetensors"]
    return [*names, "--output", tmp_path / "lora", "--rank", RANK, "--min_size", 100, *more]


def error_of(merged: dict, source: dict, target: dict, name: str) -> float:
    return ((merged[name] - target[name]).norm() / (target[name] - source[name]).norm()).item()


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", ["safetensors", "pytorch"])
def test_the_round_trip_is_as_near_as_the_exact_decomposition(tmp_path, pair, format, kind):
    source, target = pair
    ending = {"safetensors": ".safetensors", "pytorch": ".pt"}[kind]
    succeeds(EXTRACT, *words(tmp_path, "--format", format, "--output-format", kind, "--output-dtype", "fp32"))
    given = ["--source-model", tmp_path / "source.safetensors", "--lora-model", tmp_path / f"lora{ending}", "--lora-type", kind]
    succeeds(MERGE, *given, "--output", tmp_path / "merged", "--output-format", kind, "--output-dtype", "fp32")
    merged = load_file(tmp_path / "merged.safetensors") if ending != ".pt" else torch.load(tmp_path / "merged.pt", weights_only=True)
    assert merged.keys() == source.keys() and torch.equal(merged["step"], source["step"])
    assert torch.equal(merged["frozen.weight"], source["frozen.weight"])
    for name in SHAPES.keys() - {"frozen.weight"}:
        difference = (target[name] - source[name]).flatten(1 if target[name].ndim > 1 else 0)
        if target[name].numel() < 100:
            assert error_of(merged, source, target, name) < 1e-6, name
        else:
            least = torch.linalg.svdvals(difference.double())[RANK:].norm() / difference.double().norm()
            assert error_of(merged, source, target, name) <= 1.01 * least + 1e-6, name


def test_keys_are_those_of_the_formats(tmp_path, pair):
    succeeds(EXTRACT, *words(tmp_path))
    names = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in names.values()} == {torch.bfloat16}
    plain = {f"diffusion_model.{name}" for name in ("blocks.0.attn.diff_b", "blocks.1.diff_m", "weight_norm.diff", "scale.diff")}
    layers = ("blocks.0.attn", "blocks.1.conv", "blocks.1.temporal", "blocks.1.volume")
    assert names.keys() == plain | {f"diffusion_model.{name}.lora_{part}.weight" for name in layers for part in ("up", "down")}
    succeeds(EXTRACT, *words(tmp_path, "--format", "kohya"))
    names = load_file(tmp_path / "lora.safetensors")
    assert names["lora_unet_blocks_1_conv.alpha"] == RANK and names["lora_unet_blocks_1_conv.lora_down.weight"].shape == (RANK, 12, 3, 3)
    assert "lora_unet_scale.diff" in names and "lora_unet_blocks_1.diff_m" in names


def test_without_options_the_common_defaults_hold():
    for one in (parse(LoRAExtractor, "--source-model a --target-model b --output c".split()),):
        assert (one.rank, one.output_dtype, one.output_format, one.format, one.lowest_size) == (
            32,
            "bf16",
            "safetensors",
            "comfyui",
            1_000_000,
        )
    one = parse(LoRAMerger, "--source-model a --lora-model b --output c".split())
    assert (one.alpha, one.output_dtype, one.output_format, one.max_shard_size) == (1.0, "bf16", "safetensors", None)


@pytest.mark.parametrize(
    "spelling", ["--source-model a --target-model=b --output c --diff-only", "--source_m a --target-m b --output c --d"]
)
def test_dashes_and_beginnings_of_options_are_understood(spelling):
    one = parse(LoRAExtractor, spelling.split())
    assert (one.source_model, one.target_model, one.output, one.diff_only) == ("a", "b", "c", True)
    assert parse(LoRAMerger, "--source-m a --lora-m b --output c --al -0.5".split()).alpha == -0.5, "not --allow_unmatched"
    with pytest.raises(UserError, match="could match --output, --output_format"):
        parse(LoRAExtractor, "--source-model a --target-model b --outp c".split())


def test_a_model_may_be_a_folder_or_a_nested_torch_file(tmp_path, pair):
    source, target = pair
    (tmp_path / "folder").mkdir()
    items = [*source.items()]
    save_file(dict(items[:4]), tmp_path / "folder/a.safetensors")
    save_file(dict(items[3:]), tmp_path / "folder/b.safetensors")  # one tensor twice, but the same
    torch.save({"epoch": 3, "state_dict": {"model": target}}, tmp_path / "target.pth")
    given = ["--source-model", tmp_path / "folder", "--target-model", tmp_path / "target.pth", "--target-type", "pytorch"]
    succeeds(EXTRACT, *given, "--output", tmp_path / "a.safetensors", "--diff-only", "--output-dtype", "fp32")
    found = load_file(tmp_path / "a.safetensors")
    assert len(found) == 8
    torch.testing.assert_close(found["diffusion_model.blocks.1.conv.diff"], target["blocks.1.conv.weight"] - source["blocks.1.conv.weight"])
    save_file({"frozen.weight": target["blocks.0.attn.weight"]}, tmp_path / "folder/c.safetensors")
    assert "c.safetensors: frozen.weight is also in b.safetensors" in fails(EXTRACT, *given, "--output", tmp_path / "b.safetensors")


def test_the_printed_command_merges_what_was_extracted(tmp_path, pair):
    source, target = pair
    torch.save(source, tmp_path / "source.pth")
    given = ["--source-model", tmp_path / "source.pth", "--source-type", "pytorch", "--target-model", tmp_path / "target.safetensors"]
    said = succeeds(EXTRACT, *given, "--output", tmp_path / "lora.pt", "--output-format", "pytorch", "--rank", RANK, "--min_size", 100)
    program, script, *printed = shlex.split(re.search("next: (.*)", said)[1].replace("MERGED", str(tmp_path / "merged")))
    assert (program, script) == ("python", MERGE)
    assert "note: the model's float32 is written as bf16; --output_dtype says otherwise\n" in succeeds(MERGE, *printed)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged["step"].dtype == torch.int64 and error_of(merged, source, target, "blocks.0.attn.weight") < 0.1
    assert "note" not in succeeds(MERGE, *printed, "--output_dtype", "fp32")


def test_what_cannot_be_subtracted_is_listed_and_fatal(tmp_path, pair):
    source, target = pair
    target = {name: tensor for name, tensor in target.items() if name != "scale"}
    save_file({**target, "new": torch.ones(3), "step": torch.tensor(4), "frozen.weight": torch.ones(3, 3)}, tmp_path / "target.safetensors")
    said = fails(EXTRACT, *words(tmp_path))
    for name in ("scale (only in the source)", "new (only in the target)", "step (int64", "frozen.weight ((20, 20) in the source"):
        assert name in said
    assert not (tmp_path / "lora.safetensors").exists()
    assert succeeds(EXTRACT, *words(tmp_path, "--allow-mismatch")).count("left out: ") == 4


def test_an_update_that_fits_nothing_is_fatal(tmp_path, pair):
    source, _ = pair
    up, down = torch.randn(96, 4), torch.randn(4, 80)
    lora = {"unet.blocks.0.attn.lora_A.weight": down, "unet.blocks.0.attn.lora_B.weight": up, "unet.blocks.0.attn.alpha": torch.tensor(2.0)}
    save_file(lora | {"frozen.diff": torch.ones(3, 3), "other.diff": torch.ones(3)}, tmp_path / "lora.safetensors")
    given = ["--source-model", tmp_path / "source.safetensors", "--lora-model", tmp_path / "lora.safetensors", "--output", tmp_path / "out"]
    said = fails(MERGE, *given, "--output-dtype", "fp32")
    assert (
        "frozen.diff is (3, 3)" in said
        and "other.diff: the model has no such tensor" in said
        and not (tmp_path / "out.safetensors").exists()
    )
    succeeds(MERGE, *given, "--output-dtype", "fp32", "--allow-unmatched", "--alpha", "0.5")
    merged = load_file(tmp_path / "out.safetensors")["blocks.0.attn.weight"]
    torch.testing.assert_close(merged, source["blocks.0.attn.weight"] + 0.5 * (2 / 4) * up @ down)


def test_several_loras_are_added_with_their_weights_and_divided_into_shards(tmp_path, pair):
    source, _ = pair
    for name in ("a", "b"):
        save_file({"diffusion_model.frozen.diff": torch.full((20, 20), 1.0 + (name == "b"))}, tmp_path / f"{name}.safetensors")
    given = ["--source-model", tmp_path / "source.safetensors", "--output", tmp_path / "sharded/model", "--output-dtype", "fp32"]
    loras = ["--lora-model", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--weights", "3", "-1"]
    succeeds(MERGE, *given, *loras, "--max_shard_size", "20KB")
    files = sorted(path.name for path in (tmp_path / "sharded").iterdir())
    assert files[-1] == "model.safetensors.index.json" and len(files) > 3
    merged = {name: tensor for file in files[:-1] for name, tensor in load_file(tmp_path / "sharded" / file).items()}
    torch.testing.assert_close(merged["frozen.weight"], source["frozen.weight"] + 1)
    assert merged.keys() == source.keys()
    assert "would be taken for a part" in fails(MERGE, *given, *loras, "--max_shard_size", "1MB")


def test_underscored_names_are_matched_or_refused(tmp_path):
    save_file({"a.b_c.weight": torch.zeros(4, 4), "a.d.weight": torch.zeros(4, 4)}, tmp_path / "source.safetensors")
    save_file({"lora_unet_a_b_c.diff": torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    given = ["--source-model", tmp_path / "source.safetensors", "--lora-model", tmp_path / "lora.safetensors", "--output", tmp_path / "out"]
    succeeds(MERGE, *given)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["a.b_c.weight"], torch.ones(4, 4).bfloat16())
    save_file({"a.b_c.weight": torch.zeros(4, 4), "a_b.c.weight": torch.zeros(4, 4)}, tmp_path / "source.safetensors")
    assert "may mean a.b_c.weight or a_b.c.weight" in fails(MERGE, *given)
    save_file({"a.b_c.weight": torch.ones(4, 4), "a_b.c.weight": torch.ones(4, 4)}, tmp_path / "target.safetensors")
    assert "have the same name in the format kohya" in fails(EXTRACT, *words(tmp_path, "--format", "kohya"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rank", "0"], "--rank 0"),
        (["--rank", "auto"], "--rank auto: needs"),
        (["--energy", "0.5"], "--energy: is for --rank auto"),
        (["--rank", "auto", "--sv_ratio", "0.5"], "--sv_ratio 0.5: must be above 1"),
        (["--source-model", "nowhere.safetensors"], "no such file"),
        (["--source-type", "pytorch"], "say --source-type safetensors"),
        (["--output", "/proc/x/lora"], "cannot be written"),
        (["--format", "peft", "--diff-only"], "--diff_only: is for the formats"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(tmp_path, pair, more, says):
    assert says in fails(EXTRACT, *words(tmp_path), *more)


def test_as_a_process(tmp_path, pair):
    assert "total: 4 of low rank, 4 whole" in succeeds_as_a_process(EXTRACT, *words(tmp_path)).stdout
    given = ["--source-model", tmp_path / "source.safetensors", "--lora-model", tmp_path / "lora.safetensors"]
    assert "merged: 4 updates" in succeeds_as_a_process(MERGE, *given, "--output", tmp_path / "merged").stdout
    assert "no such file" in fails_as_a_process(MERGE, *given[:3], "nowhere.safetensors", "--output", tmp_path / "merged")


def test_broken_input_and_output_in_the_way(tmp_path, pair):
    source, target = pair
    file = tmp_path / "target.safetensors"
    assert "is" in (said := fails(EXTRACT, *words(tmp_path, "--output", file))) and "which is read" in said
    whole = file.read_bytes()
    for data in (b"", whole[:40], whole[:-5]):
        file.write_bytes(data)
        assert "target.safetensors: broken" in fails(EXTRACT, *words(tmp_path))
    target["blocks.0.attn.weight"][0, 0] = float("nan")
    save_file(target, file)
    assert "blocks.0.attn.weight: holds numbers that are not finite" in fails(EXTRACT, *words(tmp_path))
    save_file(source, file)
    assert "the two models are equal" in fails(EXTRACT, *words(tmp_path))
    torch.save({"x": print}, tmp_path / "evil.pt")
    assert "could run code" in fails(EXTRACT, *words(tmp_path, "--source-model", tmp_path / "evil.pt", "--source-type", "pytorch"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "lora"))], "nothing half made is left"


def test_a_rank_beyond_a_layer_is_cut_to_it(tmp_path, pair):
    said = succeeds(EXTRACT, *words(tmp_path, "--rank", 10_000, "--output-dtype", "fp32"))
    assert "blocks.0.attn.weight: 96 x 80, rank 80" in said
    ranks = succeeds(EXTRACT, *words(tmp_path, "--rank", "auto", "--max_error", "0.5", "--output-dtype", "fp32"))
    assert "blocks.0.attn.weight: 96 x 80, rank 5, error 4.8" in ranks


@pytest.fixture
def checkpoints(make_checkpoint):
    """(base, tuned): every matrix of the second differs by a difference of rank 4, and a norm."""
    base = make_checkpoint("base")
    opened = open_checkpoint(base)
    tensors = {name: tensor.clone() for name, tensor in opened.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor += 0.1 * torch.randn(tensor.size(0), 4, generator=generator) @ torch.randn(4, tensor.size(1), generator=generator)
    tensors["model.norm.weight"] += 0.5
    write_checkpoint(base.parent / "tuned", tensors, full_meta(), opened.config, sidecars_from=base)
    return base, base.parent / "tuned"


def test_a_litlora_adapter_is_the_tuned_model_on_its_base(tmp_path, checkpoints):
    base, tuned = checkpoints
    words = ["--source-model", base, "--target-model", tuned, "--output", tmp_path / "lora", "--rank", 4, "--output-dtype", "fp32"]
    succeeds(EXTRACT, *words, "--format", "litlora")
    merged, _ = merge_chain(resolve(tmp_path / "lora"))
    for name, wanted in open_checkpoint(tuned).tensors.items():
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-5)
    assert "already holds" in fails(EXTRACT, *words, "--format", "litlora")
    succeeds(EXTRACT, *words[:-3], 2, "--format", "litlora", "--overwrite")
    load(tmp_path / "lora")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_loads_what_is_extracted_from_checkpoints_and_from_files(tmp_path, checkpoints):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tuned = checkpoints
    for directory in checkpoints:
        out_dir = tmp_path / f"hf_{directory.name}"
        succeeds_as_a_process("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", directory, "--out_dir", out_dir)
    hf = [tmp_path / "hf_base", tmp_path / "hf_tuned"]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(hf[1]).state_dict()
    files = [directory / "model.safetensors" for directory in hf]
    for number, pair in enumerate((checkpoints, hf, files)):
        words = ["--source-model", pair[0], "--target-model", pair[1], "--output", tmp_path / f"peft{number}", "--rank", 4]
        succeeds(EXTRACT, *words, "--output-dtype", "fp32", "--format", "peft")
        model = transformers.AutoModelForCausalLM.from_pretrained(hf[0])
        merged = peft.PeftModel.from_pretrained(model, str(tmp_path / f"peft{number}")).merge_and_unload().state_dict()
        assert merged.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(merged[name], wanted[name], rtol=0, atol=1e-5)
    given = ["--source-model", files[0], "--lora-model", tmp_path / "peft2"]
    succeeds(MERGE, *given, "--output", tmp_path / "merged", "--output-dtype", "fp32")
    merged = load_file(tmp_path / "merged.safetensors")
    for name, tensor in load_file(files[1]).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)
