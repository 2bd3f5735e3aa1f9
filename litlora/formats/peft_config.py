"""adapter_config.json of a PEFT adapter: its settings, checked; see peft.py."""

from pathlib import Path
from typing import Any

from litlora.errors import CheckpointError
from litlora.formats import PEFT_CONFIG_FILE as CONFIG_FILE
from litlora.settings import LEAST_ALPHA
from litlora.storage.patterns import ByPattern
from litlora.storage.untrusted import read_json_object

EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""{a parameter of a layer's experts in transformers: the layers of one expert that it consists of}, in
their order: PEFT wraps the first in the second."""
_READ = set(
    """
    peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern
    base_model_name_or_path target_modules modules_to_save init_lora_weights ensure_weight_tying
    """.split()
)
_IN_FILES = {"use_dora", "lora_bias"}
_IN_FOLDERS = _IN_FILES | {"target_parameters", "trainable_token_indices"}
"""What is read besides plain LoRA; the last two stand beside a folder's own names."""
_WITHOUT_EFFECT = set(
    """
    task_type auto_mapping peft_version revision inference_mode exclude_modules bias
    layers_to_transform layers_pattern megatron_config megatron_core loftq_config eva_config
    corda_config lora_ga_config qalora_group_size runtime_config velora_config fan_in_fan_out
    """.split()
)
"""Settings that decide what is trained or how, and leave no trace except the tensors."""
_OTHERS = {
    "lora_dtype": "ms-swift: the dtype in training; the file's tensors have theirs",
    "lorap_lr_ratio": "ms-swift: LoRA+, a learning rate",
    "lorap_emb_lr": "ms-swift: LoRA+, a learning rate",
    "merge_weights": "PEFT before 0.2: whether eval() merges",
    "torch_dtype": "the dtype of the base while the adapter was trained",
    "transformers_version": "which version wrote the file",
}
"""{setting that PEFT's LoraConfig does not have: why it changes nothing}."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise that also change the base's weights."""
_KEEPS_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Those that do not, so that the adapter fits the base as it is."""
_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "ensure_weight_tying": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "base_model_name_or_path": None,
    "init_lora_weights": True,
}
"""PEFT's, of the settings that decide what the tensors mean."""
_KINDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "ensure_weight_tying": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, with PEFT's defaults for missing settings. Raises CheckpointError for a
    value that is not usable."""
    path = directory / CONFIG_FILE
    return checked_config(path, read_json_object(path))


def checked_config(path: Path | str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a LoraConfig that stands at `path`, with PEFT's defaults. Raises
    CheckpointError for a value that is not usable."""
    config = _DEFAULTS | {
        name: value for name, value in values.items() if value is not None or name not in _DEFAULTS
    }
    for name, kind in _KINDS.items():
        if not isinstance(config[name], kind) or (isinstance(config[name], bool) and kind is not bool):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}")
    if (name := config["base_model_name_or_path"]) is not None and not isinstance(name, str):
        raise CheckpointError(f"{path}: base_model_name_or_path is {name!r}; it must be text")
    for name, allowed in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        try:
            config[name] = ByPattern(config[name])
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from None
        for pattern, value in config[name].items():
            if not allowed(value):
                raise CheckpointError(f"{path}: {name}: {pattern!r} has the value {value!r}")
    if not 0 <= config["lora_dropout"] < 1:
        raise CheckpointError(
            f"{path}: lora_dropout is {config['lora_dropout']!r}; it must be at least 0 and below 1"
        )
    for name, allowed in (("r", _is_rank), ("lora_alpha", _is_alpha)):
        if not allowed(config[name]):
            raise CheckpointError(f"{path}: {name} is {config[name]}, which no adapter can have")
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and LEAST_ALPHA <= abs(value) <= 1 / LEAST_ALPHA


def refuse_variants(path: Path | str, config: dict[str, Any], *, is_folder: bool = True) -> None:
    """Raise CheckpointError for anything but LoRA, rsLoRA and DoRA, and what else is read of them;
    `path` is the config's. `is_folder`: whether it stands in an adapter's folder, or in the header of
    a LoRA file."""
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type {kind} is not supported; LORA is")
    _check_start(path, str(config["init_lora_weights"]))
    also_read = _IN_FOLDERS if is_folder else _IN_FILES
    known = _READ | _WITHOUT_EFFECT | also_read | _OTHERS.keys()  # null, false and empty change nothing
    if odd := sorted(name for name, value in config.items() if value and name not in known):
        raise CheckpointError(
            f"{path}: {odd[0]} ({config[odd[0]]!r}) is not supported: plain LoRA, rsLoRA and DoRA are"
        )
    _check_tokens(path, config)
    _check_parameters(path, config)


def _check_start(path: Path | str, how: str) -> None:
    """Raise CheckpointError unless the adapter fits the base as it is."""
    if how.lower() in _KEEPS_BASE:
        return
    if not how.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {how[:60]!r} is not known here, and may have changed the base's "
            "weights as well; set it to true if it did not"
        )
    convert = "save the adapter again in PEFT with path_initial_model_for_weight_conversion, which makes it "
    merge = "merge it in PEFT (merge_and_unload) and use the merged model"
    mend = merge if how.lower().startswith("loftq") else f"{convert}a plain LoRA"
    raise CheckpointError(f"{path}: init_lora_weights {how} changed the base's weights as well; {mend}")


def _check_tokens(path: Path | str, config: dict[str, Any]) -> None:
    tokens = config.get("trainable_token_indices") or []
    for wanted in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(wanted, list) or not all(type(token) is int and token >= 0 for token in wanted):
            raise CheckpointError(f"{path}: trainable_token_indices is {tokens!r}")


def _check_parameters(path: Path | str, config: dict[str, Any]) -> None:
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list):
        raise CheckpointError(f"{path}: target_parameters is {parameters!r}; it must be a list of names")
    for name in parameters:
        if str(name).rpartition(".")[2] not in (*EXPERTS, "weight"):
            raise CheckpointError(
                f"{path}: target_parameters {name!r} is not supported; gate_up_proj and down_proj of a "
                "layer's experts are, and the weight of a layer"
            )


def tokens_of(module: str, config: dict[str, Any]) -> list[int]:
    """The tokens whose rows of a module trainable_token_indices names."""
    wanted = config.get("trainable_token_indices") or []
    if isinstance(wanted, dict):
        wanted = next((found for key, found in wanted.items() if f".{module}".endswith(f".{key}")), [])
    return wanted


def is_parameter(name: str, config: dict[str, Any]) -> bool:
    """Whether PEFT adapted the tensor of this name as a parameter, not its module."""
    return any(f".{name}".endswith(f".{target}") for target in config.get("target_parameters") or ())


def by_pattern(pattern: ByPattern, module: str, default: Any) -> Any:
    """The value for a module, of a pattern that `checked_config` returned."""
    return pattern.value(module, default)
