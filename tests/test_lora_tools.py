"""scripts/lora_extractor.py and lora_merger.py: what is extracted, added to the source, gives the
target, in every format."""

import io
import re
import shlex
from contextlib import redirect_stdout

import pytest
import torch
from conftest import REPO
from conftest import fails as fails_as_a_process
from conftest import succeeds as succeeds_as_a_process
from peft import PeftModel
from safetensors.torch import load_file, save_file

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import open_checkpoint, resolve, write_full
from litlora.cli import option_for, parse
from litlora.errors import UserError
from litlora.load import load
from litlora.settings import CombineLoRA, InspectCheckpoint, LoRAExtractor, LoRAMerger, ResizeLoRA

EXTRACT, MERGE = "scripts/lora_extractor.py", "scripts/lora_merger.py"
RESIZE, COMBINE = "scripts/resize_lora.py", "scripts/combine_lora.py"
INSPECT = "scripts/inspect_checkpoint.py"
SETTINGS = {
    EXTRACT: LoRAExtractor,
    MERGE: LoRAMerger,
    RESIZE: ResizeLoRA,
    COMBINE: CombineLoRA,
    INSPECT: InspectCheckpoint,
}
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
    """Run a command within this process, which need not import torch again; returns what it
    says."""
    module = {"__name__": "script"}
    exec(compile((REPO / script).read_text(), script, "exec"), module)
    said = io.StringIO()
    with redirect_stdout(said):
        module["main"](parse(SETTINGS[script], [*map(str, arguments)]))
    return said.getvalue()


def fails(script: str, *arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        succeeds(script, *arguments)
    said = raised.value.with_options(lambda name: option_for(SETTINGS[script], name))
    assert "\n" not in said
    return said


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
            change = (
                noise(shape[0], RANK) @ noise(RANK, source[name][0].numel())
                if len(shape) > 1
                else noise(*shape)
            )
            target[name] += change.view(shape) + 0.01 * noise(*shape)
    save_file(source, tmp_path / "source.safetensors")
    save_file(target, tmp_path / "target.safetensors")
    return source, target


def words(tmp_path, *more: object) -> list[object]:
    names = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--target-model",
        tmp_path / "target.safetensors",
    ]
    return [*names, "--output", tmp_path / "lora", "--rank", RANK, "--min_size", 100, *more]


def error_of(merged: dict, source: dict, target: dict, name: str) -> float:
    return ((merged[name] - target[name]).norm() / (target[name] - source[name]).norm()).item()


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", ["safetensors", "pytorch"])
def test_the_round_trip_is_as_near_as_the_exact_decomposition(tmp_path, pair, format, kind):
    source, target = pair
    ending = {"safetensors": ".safetensors", "pytorch": ".pt"}[kind]
    succeeds(EXTRACT, *words(tmp_path, "--format", format, "--output-format", kind, "--output-dtype", "fp32"))
    given = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--lora-model",
        tmp_path / f"lora{ending}",
        "--lora-type",
        kind,
    ]
    succeeds(
        MERGE, *given, "--output", tmp_path / "merged", "--output-format", kind, "--output-dtype", "fp32"
    )
    merged = (
        load_file(tmp_path / "merged.safetensors")
        if ending != ".pt"
        else torch.load(tmp_path / "merged.pt", weights_only=True)
    )
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
    plain = {
        f"diffusion_model.{name}"
        for name in ("blocks.0.attn.diff_b", "blocks.1.diff_m", "weight_norm.diff", "scale.diff")
    }
    layers = ("blocks.0.attn", "blocks.1.conv", "blocks.1.temporal", "blocks.1.volume")
    assert names.keys() == plain | {
        f"diffusion_model.{name}.lora_{part}.weight" for name in layers for part in ("up", "down")
    }
    succeeds(EXTRACT, *words(tmp_path, "--format", "kohya"))
    names = load_file(tmp_path / "lora.safetensors")
    assert names["lora_unet_blocks_1_conv.alpha"] == RANK and names[
        "lora_unet_blocks_1_conv.lora_down.weight"
    ].shape == (RANK, 12, 3, 3)
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
    assert (one.alpha, one.output_dtype, one.output_format, one.max_shard_size) == (
        1.0,
        "bf16",
        "safetensors",
        None,
    )


@pytest.mark.parametrize(
    "spelling",
    ["--source-model a --target-model=b --output c --diff-only", "--source_m a --target-m b --output c --d"],
)
def test_dashes_and_beginnings_of_options_are_understood(spelling):
    one = parse(LoRAExtractor, spelling.split())
    assert (one.source_model, one.target_model, one.output, one.diff_only) == ("a", "b", "c", True)
    assert parse(LoRAMerger, "--source-m a --lora-m b --output c --al -0.5".split()).alpha == -0.5, (
        "not --allow_unmatched"
    )
    with pytest.raises(UserError, match="could match --output, --output_format"):
        parse(LoRAExtractor, "--source-model a --target-model b --outp c".split())


def test_a_model_may_be_a_folder_or_a_nested_torch_file(tmp_path, pair):
    source, target = pair
    (tmp_path / "folder").mkdir()
    items = [*source.items()]
    save_file(dict(items[:4]), tmp_path / "folder/a.safetensors")
    save_file(dict(items[3:]), tmp_path / "folder/b.safetensors")  # one tensor twice, but the same
    torch.save({"epoch": 3, "state_dict": {"model": target}}, tmp_path / "target.pth")
    given = [
        "--source-model",
        tmp_path / "folder",
        "--target-model",
        tmp_path / "target.pth",
        "--target-type",
        "pytorch",
    ]
    succeeds(EXTRACT, *given, "--output", tmp_path / "a.safetensors", "--diff-only", "--output-dtype", "fp32")
    found = load_file(tmp_path / "a.safetensors")
    assert len(found) == 8
    torch.testing.assert_close(
        found["diffusion_model.blocks.1.conv.diff"],
        target["blocks.1.conv.weight"] - source["blocks.1.conv.weight"],
    )
    save_file({"frozen.weight": target["blocks.0.attn.weight"]}, tmp_path / "folder/c.safetensors")
    assert "c.safetensors: frozen.weight is also in b.safetensors" in fails(
        EXTRACT, *given, "--output", tmp_path / "b.safetensors"
    )


def test_the_printed_command_merges_what_was_extracted(tmp_path, pair):
    source, target = pair
    torch.save(source, tmp_path / "source.pth")
    given = [
        "--source-model",
        tmp_path / "source.pth",
        "--source-type",
        "pytorch",
        "--target-model",
        tmp_path / "target.safetensors",
    ]
    said = succeeds(
        EXTRACT,
        *given,
        "--output",
        tmp_path / "my lora.pt",
        "--output-format",
        "pytorch",
        "--rank",
        RANK,
        "--min_size",
        100,
    )
    program, script, *printed = shlex.split(
        re.search("next: (.*)", said)[1].replace("MERGED", str(tmp_path / "merged"))
    )
    assert (program, script) == ("python", MERGE)
    assert "note: the model's float32 is written as bf16; --output_dtype chooses another\n" in succeeds(
        MERGE, *printed
    )
    merged = load_file(tmp_path / "merged.safetensors")
    assert (
        merged["step"].dtype == torch.int64 and error_of(merged, source, target, "blocks.0.attn.weight") < 0.1
    )
    assert "note" not in succeeds(MERGE, *printed, "--output_dtype", "fp32")


def test_what_cannot_be_subtracted_is_listed_and_fatal(tmp_path, pair):
    source, target = pair
    target = {name: tensor for name, tensor in target.items() if name != "scale"}
    save_file(
        {**target, "new": torch.ones(3), "step": torch.tensor(4), "frozen.weight": torch.ones(3, 3)},
        tmp_path / "target.safetensors",
    )
    said = fails(EXTRACT, *words(tmp_path))
    for name in (
        "scale (only in the source)",
        "new (only in the target)",
        "step (int64",
        "frozen.weight ((20, 20) in the source",
    ):
        assert name in said
    assert not (tmp_path / "lora.safetensors").exists()
    assert succeeds(EXTRACT, *words(tmp_path, "--allow-mismatch")).count("left out: ") == 4


def test_an_update_that_fits_nothing_is_fatal(tmp_path, pair):
    source, _ = pair
    up, down = torch.randn(96, 4), torch.randn(4, 80)
    lora = {
        "unet.blocks.0.attn.lora_A.weight": down,
        "unet.blocks.0.attn.lora_B.weight": up,
        "unet.blocks.0.attn.alpha": torch.tensor(2.0),
    }
    save_file(
        lora | {"frozen.diff": torch.ones(3, 3), "other.diff": torch.ones(3)}, tmp_path / "lora.safetensors"
    )
    given = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--lora-model",
        tmp_path / "lora.safetensors",
        "--output",
        tmp_path / "out",
    ]
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
        save_file(
            {"diffusion_model.frozen.diff": torch.full((20, 20), 1.0 + (name == "b"))},
            tmp_path / f"{name}.safetensors",
        )
    given = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--output",
        tmp_path / "sharded/model",
        "--output-dtype",
        "fp32",
    ]
    loras = ["--lora-model", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--weights", "3", "-1"]
    succeeds(MERGE, *given, *loras, "--max_shard_size", "20KB")
    files = sorted(path.name for path in (tmp_path / "sharded").iterdir())
    assert files[-1] == "model.safetensors.index.json" and len(files) > 3
    merged = {
        name: tensor for file in files[:-1] for name, tensor in load_file(tmp_path / "sharded" / file).items()
    }
    torch.testing.assert_close(merged["frozen.weight"], source["frozen.weight"] + 1)
    assert merged.keys() == source.keys()
    assert "would be taken for a part" in fails(MERGE, *given, *loras, "--max_shard_size", "1MB")


def test_underscored_names_are_matched_or_refused(tmp_path):
    save_file(
        {"a.b_c.weight": torch.zeros(4, 4), "a.d.weight": torch.zeros(4, 4)}, tmp_path / "source.safetensors"
    )
    save_file({"lora_unet_a_b_c.diff": torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    given = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--lora-model",
        tmp_path / "lora.safetensors",
        "--output",
        tmp_path / "out",
    ]
    succeeds(MERGE, *given)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["a.b_c.weight"], torch.ones(4, 4).bfloat16())
    save_file(
        {"a.b_c.weight": torch.zeros(4, 4), "a_b.c.weight": torch.zeros(4, 4)},
        tmp_path / "source.safetensors",
    )
    assert "may mean a.b_c.weight or a_b.c.weight" in fails(MERGE, *given)
    save_file(
        {"a.b_c.weight": torch.ones(4, 4), "a_b.c.weight": torch.ones(4, 4)}, tmp_path / "target.safetensors"
    )
    assert "two of its tensors would be called lora_unet_a_b_c.diff; choose another --format" in fails(
        EXTRACT, *words(tmp_path, "--format", "kohya")
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rank", "0"], "--rank 0"),
        (["--rank", "auto"], "--rank auto: needs"),
        (["--energy", "0.5"], "--energy: is for --rank auto"),
        (["--rank", "auto", "--sv_ratio", "0.5"], "--sv_ratio 0.5: must be above 1"),
        (["--source-model", "nowhere.safetensors"], "no such file"),
        (["--source-type", "pytorch"], "set --source_type safetensors"),
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
    assert "no such file" in fails_as_a_process(
        MERGE, *given[:3], "nowhere.safetensors", "--output", tmp_path / "merged"
    )


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
    assert "blocks.0.attn.weight: holds values that are not finite" in fails(EXTRACT, *words(tmp_path))
    save_file(source, file)
    assert "the two models are equal" in fails(EXTRACT, *words(tmp_path))
    torch.save({"x": print}, tmp_path / "evil.pt")
    assert "could run code" in fails(
        EXTRACT, *words(tmp_path, "--source-model", tmp_path / "evil.pt", "--source-type", "pytorch")
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "lora"))], (
        "nothing half made is left"
    )


def test_a_rank_beyond_a_layer_is_cut_to_it(tmp_path, pair):
    said = succeeds(EXTRACT, *words(tmp_path, "--rank", 10_000, "--output-dtype", "fp32"))
    assert "blocks.0.attn.weight: 96 x 80, rank 80" in said
    ranks = succeeds(
        EXTRACT, *words(tmp_path, "--rank", "auto", "--max_error", "0.5", "--output-dtype", "fp32")
    )
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
            tensor += (
                0.1
                * torch.randn(tensor.size(0), 4, generator=generator)
                @ torch.randn(4, tensor.size(1), generator=generator)
            )
    tensors["model.norm.weight"] += 0.5
    write_full(base.parent / "tuned", tensors, opened.config, sidecars_from=[base])
    return base, base.parent / "tuned"


def test_a_litlora_adapter_is_the_tuned_model_on_its_base(tmp_path, checkpoints):
    base, tuned = checkpoints
    words = [
        "--source-model",
        base,
        "--target-model",
        tuned,
        "--output",
        tmp_path / "lora",
        "--rank",
        4,
        "--output-dtype",
        "fp32",
    ]
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
        succeeds_as_a_process(
            "scripts/convert_lit_checkpoint.py", "--checkpoint_dir", directory, "--out_dir", out_dir
        )
    hf = [tmp_path / "hf_base", tmp_path / "hf_tuned"]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(hf[1]).state_dict()
    files = [directory / "model.safetensors" for directory in hf]
    for number, pair in enumerate((checkpoints, hf, files)):
        words = [
            "--source-model",
            pair[0],
            "--target-model",
            pair[1],
            "--output",
            tmp_path / f"peft{number}",
            "--rank",
            4,
        ]
        succeeds(EXTRACT, *words, "--output-dtype", "fp32", "--format", "peft")
        model = transformers.AutoModelForCausalLM.from_pretrained(hf[0])
        merged = (
            peft.PeftModel.from_pretrained(model, str(tmp_path / f"peft{number}"))
            .merge_and_unload()
            .state_dict()
        )
        assert merged.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(merged[name], wanted[name], rtol=0, atol=1e-5)
    given = ["--source-model", files[0], "--lora-model", tmp_path / "peft2"]
    succeeds(MERGE, *given, "--output", tmp_path / "merged", "--output-dtype", "fp32")
    merged = load_file(tmp_path / "merged.safetensors")
    for name, tensor in load_file(files[1]).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-5)


def kohya(path, name: str, value: float, **more: torch.Tensor) -> None:
    save_file(
        {
            f"{name}.lora_up.weight": torch.full((4, 1), value),
            f"{name}.lora_down.weight": torch.ones(1, 4),
            **more,
        },
        path,
    )


def merges(tmp_path, source: dict, *more: object) -> dict[str, torch.Tensor]:
    save_file(source, tmp_path / "source.safetensors")
    words = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--output",
        tmp_path / "out",
        "--output_dtype",
        "fp32",
        *more,
    ]
    succeeds(MERGE, *words)
    return load_file(tmp_path / "out.safetensors")


def test_two_files_and_a_pair_and_a_difference_of_one_underscored_name(tmp_path):
    kohya(tmp_path / "a.safetensors", "lora_unet_a_q", 1.0)
    kohya(
        tmp_path / "b.safetensors", "lora_unet_a_q", 2.0, **{"lora_unet_a_q.diff": torch.full((4, 4), 10.0)}
    )
    loras = ["--lora-model", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--weights", 1, 0.5]
    assert (merges(tmp_path, {"a.q.weight": torch.zeros(4, 4)}, *loras)["a.q.weight"] == 1 + 1 + 5).all()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_base_in_8_bits_without_scales_is_added_to_in_fp32(tmp_path, kind):
    kohya(tmp_path / "a.safetensors", "diffusion_model.x", 0.25)
    source = {"x.weight": torch.full((4, 4), 1.5).to(kind)}
    assert (merges(tmp_path, source, "--lora-model", tmp_path / "a.safetensors")["x.weight"] == 1.75).all()


def test_the_very_name_comes_before_one_with_a_prefix(tmp_path):
    kohya(tmp_path / "a.safetensors", "diffusion_model.x", 1.0)
    source = {
        name: torch.zeros(4, 4) for name in ("x.weight", "transformer.x.weight", "diffusion_model.x.weight")
    }
    merged = merges(tmp_path, source, "--lora-model", tmp_path / "a.safetensors")
    assert {name: tensor.max().item() for name, tensor in merged.items()} == dict.fromkeys(source, 0.0) | {
        "x.weight": 1.0
    }


@pytest.mark.parametrize("name", ["lora_A.default", "lora.down"])
def test_other_spellings_of_the_factors(tmp_path, name):
    up = {"lora_A.default": "lora_B.default", "lora.down": "lora.up"}[name]
    factors = {f"base_model.model.diffusion_model.x.{name}.weight": torch.ones(1, 4)}
    save_file(
        factors | {f"base_model.model.diffusion_model.x.{up}.weight": torch.ones(4, 1)},
        tmp_path / "[style] a.safetensors",
    )
    merged = merges(
        tmp_path, {"x.weight": torch.zeros(4, 4)}, "--lora-model", tmp_path / "[style] a.safetensors"
    )
    assert (merged["x.weight"] == 1).all()


def test_a_layer_with_factors_of_two_spellings_is_refused(tmp_path):
    more = {"x.lora_A.weight": torch.ones(1, 4), "x.lora_B.weight": torch.ones(4, 1)}
    kohya(tmp_path / "a.safetensors", "x", 1.0, **more)
    save_file({"x.weight": torch.zeros(4, 4)}, tmp_path / "source.safetensors")
    words = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--lora-model",
        tmp_path / "a.safetensors",
        "--output",
        tmp_path / "out",
    ]
    assert "x has factors of two kinds" in fails(MERGE, *words)


def test_shards_take_no_inputs_place(tmp_path):
    source, lora = tmp_path / "m-00001-of-00002.safetensors", tmp_path / "m-00002-of-00002.safetensors"
    save_file({"x.weight": torch.zeros(4, 4), "y.weight": torch.zeros(4, 4)}, source)
    kohya(lora, "x", 1.0)
    before = source.read_bytes(), lora.read_bytes()
    words = [
        "--source-model",
        source,
        "--lora-model",
        lora,
        "--output",
        tmp_path / "m.safetensors",
        "--max_shard_size",
        40,
    ]
    assert "would be a part of it, and is an input" in fails(MERGE, *words)
    assert "would be taken for a part of it" in fails(MERGE, *words[:-2])
    assert before == (source.read_bytes(), lora.read_bytes()) and len(list(tmp_path.iterdir())) == 2


def test_what_is_infinite_in_both_models_stays(tmp_path):
    mask = torch.full((4, 4), -torch.inf).triu(1)
    source = {"mask": mask, "x.weight": torch.zeros(4, 4)}
    save_file(source, tmp_path / "source.safetensors")
    save_file(source | {"x.weight": torch.ones(4, 4)}, tmp_path / "target.safetensors")
    succeeds(EXTRACT, *words(tmp_path))
    assert torch.equal(merges(tmp_path, source, "--lora-model", tmp_path / "lora.safetensors")["mask"], mask)


def test_parameters_in_torch_files(tmp_path):
    layer, other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    for name, module in (("a", layer), ("b", other)):
        torch.save(dict(module.named_parameters()), tmp_path / f"{name}.pt")
    kinds = ["--source-type", "pytorch", "--target-type", "pytorch", "--min_size", 0, "--rank", 8]
    succeeds(
        EXTRACT,
        "--source-model",
        tmp_path / "a.pt",
        "--target-model",
        tmp_path / "b.pt",
        *kinds,
        "--output",
        tmp_path / "lora",
    )
    lora = [
        "--lora-model",
        tmp_path / "lora.safetensors",
        "--output",
        tmp_path / "out",
        "--output_dtype",
        "fp32",
    ]
    succeeds(MERGE, "--source-model", tmp_path / "a.pt", "--source-type", "pytorch", *lora)
    assert (load_file(tmp_path / "out.safetensors")["weight"] - other.weight).abs().max() < 0.01


@pytest.mark.parametrize("names", [("proj", "blocks.0.proj"), ("blocks.0.proj", "proj")])
def test_a_peft_folder_of_layers_whose_names_end_alike(tmp_path, names):
    generator = torch.Generator().manual_seed(0)
    source = {f"{name}.weight": torch.randn(12, 10, generator=generator) for name in names}
    change = [
        torch.randn(12, rank, generator=generator) @ torch.randn(rank, 10, generator=generator)
        for rank in (1, 4)
    ]
    target = {name: tensor + by for (name, tensor), by in zip(source.items(), change, strict=True)}
    save_file(source, tmp_path / "source.safetensors")
    save_file(target, tmp_path / "target.safetensors")
    model = ["--source-model", tmp_path / "source.safetensors"]
    more = ["--rank", "auto", "--max_error", 1e-4, "--output-dtype", "fp32", "--format", "peft"]
    succeeds(
        EXTRACT,
        *model,
        "--target-model",
        tmp_path / "target.safetensors",
        *more,
        "--output",
        tmp_path / "peft",
    )
    merged = merges(tmp_path, source, "--lora-model", tmp_path / "peft")
    module = torch.nn.ModuleDict({"proj": torch.nn.Linear(10, 12, bias=False)})
    module.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(10, 12, bias=False)})])
    module.load_state_dict(source)
    theirs = PeftModel.from_pretrained(module, tmp_path / "peft").merge_and_unload().state_dict()
    for name in source:
        assert (merged[name] - target[name]).abs().max() < 1e-2 and (
            theirs[name] - merged[name]
        ).abs().max() < 1e-5


def test_what_peft_cannot_load_is_refused(tmp_path):
    save_file({"norm.weight": torch.zeros(4), "x.weight": torch.zeros(4, 4)}, tmp_path / "source.safetensors")
    save_file({"norm.weight": torch.ones(4), "x.weight": torch.zeros(4, 4)}, tmp_path / "target.safetensors")
    assert "PEFT needs at least one pair of factors" in fails(EXTRACT, *words(tmp_path, "--format", "peft"))
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_the_proof_holds_for_differences_of_any_size(tmp_path, unit):
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(300, 280, generator=generator) * torch.linspace(1, 0.2, 280) * unit
    save_file({"x.weight": torch.zeros(300, 280)}, tmp_path / "source.safetensors")
    save_file({"x.weight": D}, tmp_path / "target.safetensors")
    said = succeeds(EXTRACT, *words(tmp_path, "--output-dtype", "fp32"))
    told = float(re.search("error ([0-9.e+-]+), at most", said)[1])
    values = torch.linalg.svdvals(D.double())
    assert told <= 1.01 * (values[RANK:].norm() / values.norm()).item()


def test_a_bound_that_rounding_breaks_is_said(tmp_path, pair):
    names = [
        "--source-model",
        tmp_path / "source.safetensors",
        "--target-model",
        tmp_path / "target.safetensors",
    ]
    auto = ["--rank", "auto", "--max_error", 1e-3, "--min_size", 0]
    assert "have a larger error than asked for, because bf16 rounds them" in succeeds(
        EXTRACT, *names, "--output", tmp_path / "lora", *auto
    )
    assert "larger error" not in succeeds(
        EXTRACT, *names, "--output", tmp_path / "lora", *auto, "--output-dtype", "fp32"
    )


def test_an_index_that_names_what_a_file_lacks(tmp_path, pair):
    (tmp_path / "folder").mkdir()
    (tmp_path / "source.safetensors").rename(tmp_path / "folder/model.safetensors")
    (tmp_path / "folder/model.safetensors.index.json").write_text(
        '{"weight_map": {"gone": "model.safetensors"}}'
    )
    more = ["--target-model", tmp_path / "target.safetensors", "--output", tmp_path / "lora"]
    assert "lacks gone, though model.safetensors.index.json lists it" in fails(
        EXTRACT, "--source-model", tmp_path / "folder", *more
    )


def test_what_a_killed_merge_left_is_removed_by_the_next(tmp_path):
    kohya(tmp_path / "a.safetensors", "x", 1.0)
    left = tmp_path / ".out.safetensors.999999999.new"
    left.write_text("half a model")
    merges(tmp_path, {"x.weight": torch.zeros(4, 4)}, "--lora-model", tmp_path / "a.safetensors")
    assert not left.exists()


@pytest.mark.parametrize("sdxl", [False, True])
@pytest.mark.parametrize("format", ["comfyui", "kohya"])
def test_a_whole_checkpoint_gives_the_names_that_loaders_know(tmp_path, format, sdxl):
    """ComfyUI maps diffusion_model.*, kohya diffusers' names for Stable Diffusion and the original
    ones for SDXL."""
    unet = "model.diffusion_model"
    attention = f"{unet}.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    conv = "in_layers.2.weight"
    source = {
        attention: torch.zeros(16, 16),
        f"{unet}.input_blocks.1.0.{conv}": torch.zeros(4, 4, 3, 3),
        f"{unet}.input_blocks.2.0.{conv}": torch.zeros(4, 4, 3, 3),
        f"{unet}.input_blocks.3.0.op.weight": torch.zeros(4, 4, 3, 3),
        f"{unet}.input_blocks.4.0.{conv}": torch.zeros(4, 4, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(4, 4),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(4, 4),
    } | ({f"{unet}.label_emb.0.0.weight": torch.zeros(4, 4)} if sdxl else {})
    kept = {name: source[name] for name in source if not name.startswith("first")}
    target = {name: tensor + ("conv_in" not in name) for name, tensor in source.items()}
    save_file(source, tmp_path / "source.safetensors")
    save_file(target, tmp_path / "target.safetensors")
    more = ["--format", format, "--min_size", 200, "--output-dtype", "fp32"]
    said = succeeds(EXTRACT, *words(tmp_path, *more))
    left_out = "left out: {}, not of the diffusion model: {} of 1 tensors differ"
    assert left_out.format("cond_stage_model (text encoder)", 1) in said
    assert left_out.format("first_stage_model (VAE)", 0) in said
    tensors = load_file(tmp_path / "lora.safetensors")
    module = attention.removeprefix("model.diffusion_model.").removesuffix(".weight")
    if format == "kohya" and not sdxl:
        module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    prefix = "diffusion_model." if format == "comfyui" else "lora_unet_"
    module = prefix + (module if format == "comfyui" else module.replace(".", "_"))
    assert f"{module}.lora_up.weight" in tensors
    assert not any("model_diffusion" in key or "model.diffusion" in key or "stage" in key for key in tensors)
    merged = merges(tmp_path, kept, "--lora-model", tmp_path / "lora.safetensors")
    for name in kept:
        expected = target[name] if name.startswith(unet) else source[name]
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)


def test_an_embedding_whose_head_is_tied_to_it_is_left_to_merge_lora(tmp_path):
    """Whoever loads the result would tie a head to the changed embedding; PEFT's head keeps the
    base's."""
    model = {"model.embed_tokens.weight": torch.randn(12, 8), "model.layers.0.mlp.weight": torch.randn(8, 8)}
    save_file(model, tmp_path / "model.safetensors")
    module = "model.embed_tokens"
    lora = {f"{module}.lora_down.weight": torch.randn(2, 8), f"{module}.lora_up.weight": torch.randn(12, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    words = ["--source-model", tmp_path / "model.safetensors", "--lora-model", tmp_path / "lora.safetensors"]
    words += ["--output", tmp_path / "out.safetensors"]
    assert "scripts/merge_lora.py unties them" in fails("scripts/lora_merger.py", *words)
    save_file({**model, "lm_head.weight": torch.randn(12, 8)}, tmp_path / "model.safetensors")
    succeeds("scripts/lora_merger.py", *words)
