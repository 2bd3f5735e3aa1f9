"""Write an adapter as a PEFT folder (adapter_config.json and adapter_model.safetensors), or as one
of mlx-lm.

python scripts/export_peft.py --lora_path $dir/final/lit_model.pth --out_dir $dir/peft
python scripts/export_peft.py --lora_path $dir/final/lit_model.pth --format mlx --out_dir $dir/mlx
"""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litlora.cli import call, run
from litlora.config import ModelConfig
from litlora.console import say
from litlora.errors import CheckpointError, UserError
from litlora.formats import MLX_WEIGHTS_FILE, PEFT_WEIGHTS_FILES
from litlora.formats.families import FAMILIES
from litlora.inputs import check_inputs
from litlora.paths import MLX_NAMES, PEFT_NAMES
from litlora.settings import ExportPEFT
from litlora.storage.untrusted import own_file

if TYPE_CHECKING:
    from torch import Tensor

    from litlora.checkpoint import Chain
    from litlora.formats.full import FullModel

_NF4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4"'
QUANTIZED_BY = {
    name: f', dtype="auto", quantization_config=BitsAndBytesConfig({how})'
    for name, how in {
        "nf4": _NF4,
        "nf4-dq": f"{_NF4}, bnb_4bit_use_double_quant=True",
        "int8": "load_in_8bit=True",
    }.items()
}
"""What makes transformers quantise a base to the values that an adapter was trained on; it has
nothing like our fp8."""


def main(settings: ExportPEFT) -> None:
    if settings.model_type is not None and settings.model_type not in FAMILIES:
        raise UserError(
            f"--model_type {settings.model_type}: no such family; there are {', '.join(FAMILIES)}"
        )
    inputs = check_inputs(
        [settings.lora_path],
        settings.checkpoint_dir,
        settings.out_dir,
        overwrite=settings.overwrite,
        names=PEFT_NAMES if settings.format == "peft" else MLX_NAMES,
    )
    out_dir = inputs.out_dir

    from litlora.card import of_mlx, of_peft, write_card
    from litlora.formats.mlx_export import to_mlx
    from litlora.formats.peft_export import to_peft, write_peft
    from litlora.storage.atomic import replacing_directory
    from litlora.storage.fingerprint import check_finite
    from litlora.tokenizer import find_sidecars

    (chain,) = inputs.chains(allow_base_mismatch=settings.allow_base_mismatch)
    _check_base(chain)
    if settings.format == "mlx":
        _check_for_mlx(chain)
    check_finite(chain.top.tensors, chain.top.file)
    for notice in chain.notices:
        say(f"note: {notice}")
    base = chain.base
    family = _family(base, settings.model_type)
    base_name = settings.base_model or str(base.directory.resolve())
    if settings.format == "mlx":
        _write_mlx(
            out_dir,
            *to_mlx(chain.top, family, chain.config, base.tensors, base_name),
            lambda staging: write_card(staging, chain, of_mlx(base_name)),
        )
        return
    tensors, config = to_peft(chain.top, family, chain.config, base.tensors, base_name, base.parts)
    with replacing_directory(out_dir) as staging:
        write_peft(staging, tensors, config)
        for file in find_sidecars([chain.top.directory]):
            if file.name in PEFT_NAMES:
                shutil.copyfile(file, staging / file.name)
        hint = _add_template(staging, chain)
        added = _name_stops(staging, chain)
        write_card(staging, chain, of_peft(chain, settings.base_model, staging, _quantised_by(chain)))
    _sum_up(out_dir / PEFT_WEIGHTS_FILES[0], config, family + hint, chain.top.config.dropout)
    _say_next(settings, chain, base_name, added)


def _say_next(settings: ExportPEFT, chain: "Chain", base_name: str, added: list[str]) -> None:
    """How to use the folder with a base of this name, which does not stop at the tokens `added`."""
    base, rows, out_dir = chain.base, chain.top.rows, Path(settings.out_dir)
    how = _quantised_by(chain)
    if not settings.base_model and not base.has_hf_config:
        say(
            f"note: {base.directory} is not a Hugging Face folder; make one with "
            "scripts/convert_lit_checkpoint.py, or name one with --base_model"
        )
        folder = f"{base.directory}-hf"
        options = "--checkpoint_dir", base.directory, "--out_dir", folder
        say(f"next: {call('scripts/convert_lit_checkpoint.py', *options)}")
        base_name = folder
    if added:
        say(
            f"note: answers end with {', '.join(added)}, at which the base does not stop; generate with "
            f'generation_config=GenerationConfig.from_pretrained("{out_dir}")'
        )
    loader = "AutoModelForImageTextToText" if base.parts else "AutoModelForCausalLM"
    model = f"{loader}.from_pretrained({json.dumps(base_name)}{how})"
    if rows is not None and rows.num_rows > chain.config.vocab_size:
        say(
            f"note: it adds {len(rows.ids)} tokens, for which the base has too few rows: call "
            f"resize_token_embeddings({rows.num_rows}) on the base before PeftModel.from_pretrained"
        )
    say(f"next: PeftModel.from_pretrained({model}, {json.dumps(str(out_dir))})")


def _add_template(staging: Path, chain: "Chain") -> str:
    """Give a folder with a tokenizer a chat template that asks as in training, if the model has none."""
    from litlora.formats.chat_template import add_template
    from litlora.tokenizer import TOKENIZER_NAMES, Tokenizer

    has_tokenizer = any((staging / name).is_file() for name in TOKENIZER_NAMES)
    return add_template(staging, chain.sources, Tokenizer(chain.sources)) if has_tokenizer else ""


def _sum_up(result: Path, config: dict[str, Any], family: str, dropout: float) -> None:
    """Say what has been written."""
    from litlora.formats.peft_export import NO_TARGETS

    if dropout != config["lora_dropout"]:
        say(
            f"note: PEFT adapts experts without dropout: {dropout:g} is written as 0, which matters if the "
            "adapter is trained further"
        )
    if config["target_modules"] == NO_TARGETS:
        what = "only whole modules"
    else:
        layers = config["target_modules"] + config.get("target_parameters", [])
        what = f"rank {config['r']}, {', '.join(layers)}"
    say(f"result: {result} ({result.stat().st_size:,} bytes: for {family}, {what})")


def _quantised_by(chain: "Chain") -> str:
    """What makes transformers quantise the base to what the adapter was trained on; says so if it was
    quantised."""
    quantized = chain.top.base.quantized
    if quantized is None:
        return ""
    name = quantized.quantizer.name
    say(f"note: trained on the base's values in {name}; on the base as it is stored, its answers differ")
    if chain.top.needs_quantised:
        say(f"note: started by LoftQ: use it on the base in {name} only, whose losses it makes up for")
    return QUANTIZED_BY.get(name, "")


def _name_stops(staging: Path, chain: "Chain") -> list[str]:
    """Let a folder's generation_config.json name the tokens that answers end with, if the base does
    not stop at all of them; returns those at which it does not."""
    from litlora.stop_tokens import name_stops, named_stops, stops_of, usable_tokenizer
    from litlora.tokenizer import GENERATION_FILE

    base = chain.base
    if (tokenizer := usable_tokenizer(chain.sources)) is None:
        return []
    stops = stops_of(chain.sources, tokenizer)
    theirs = named_stops(base.directory) if base.has_hf_config else [tokenizer.eos_id]
    added = [stop for stop in stops if stop not in theirs]
    file = base.directory / GENERATION_FILE
    if added and file.is_file() and not (staging / GENERATION_FILE).is_file():
        shutil.copyfile(own_file(file), staging / GENERATION_FILE)
    if added or (staging / GENERATION_FILE).is_file():
        name_stops(staging, list(dict.fromkeys([*theirs, *stops])))
    return [tokenizer.token(stop) for stop in added]


def _check_for_mlx(chain: "Chain") -> None:
    """Raise UserError for a base that mlx-lm does not have."""
    where = chain.base.directory
    if not isinstance(chain.config, ModelConfig):
        raise UserError(f"--format mlx: {where} runs through transformers, whose names are not mlx-lm's")
    if chain.base.parts is not None:
        raise UserError(
            f"--format mlx: {where} is multimodal, and mlx-lm calls the layers of such a model by names of "
            "its own; merge the adapter and convert the merged model"
        )
    if chain.top.needs_quantised:
        raise UserError(
            f"--format mlx: {chain.top.file} was started by LoftQ, which makes up for what quantising its "
            "base lost, and mlx-lm has no base of these bits; export the merged model"
        )


def _write_mlx(
    out_dir: Path, tensors: "dict[str, Tensor]", config: dict[str, Any], add_card: Callable[[Path], None]
) -> None:
    """The two files of mlx-lm, which takes the tokenizer from the base, and the card."""
    from litlora.formats.mlx_export import write_mlx
    from litlora.storage.atomic import replacing_directory

    with replacing_directory(out_dir) as staging:
        write_mlx(staging, tensors, config)
        add_card(staging)
    result, parameters = out_dir / MLX_WEIGHTS_FILE, config["lora_parameters"]
    said = f"rank {parameters['rank']}, scale {parameters['scale']:g}, {', '.join(parameters['keys'])}"
    say(f"result: {result} ({result.stat().st_size:,} bytes: {said})")
    options = shlex.join(("--model", str(config["model"]), "--adapter-path", str(out_dir)))
    say(f"next: mlx_lm.generate {options}")


def _check_base(chain: "Chain") -> None:
    """Raise CheckpointError unless the adapter's base is a full model, as it is or quantised."""
    if chain.top.has_own_base:
        raise CheckpointError(
            f"{chain.top.file}: was started by LoftQ in several iterations, which took a part out of its "
            "base before that was quantised, and no other program has a base of these bits; merge it with "
            "scripts/merge_lora.py"
        )
    if len(chain.adapters) > 1:
        inner = chain.adapters[-2].directory
        raise CheckpointError(
            f"{chain.top.directory}: its base {inner} is an adapter itself, and a PEFT folder names a "
            f"full model; merge {inner} with scripts/merge_lora.py, then name the result with "
            "--checkpoint_dir"
        )


def _family(base: "FullModel", model_type: str | None) -> str:
    """The Hugging Face family to write for. Raises UserError if the base is of another than
    --model_type."""
    family = base.family(model_type)
    if model_type not in (None, family):
        raise UserError(
            f"--model_type {model_type}: {base.directory} is of the family {family}; leave the option out"
        )
    return family


if __name__ == "__main__":
    run(main, ExportPEFT)
