"""The commands for whole checkpoints: convert, download."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from litlora.errors import setting
from litlora.settings.checks import check, check_size, check_value, num_bytes


@dataclass(frozen=True, kw_only=True)
class ConvertHF:
    """Write a Hugging Face model folder as a litlora checkpoint directory. No command needs this:
    such folders can be used as they are."""

    checkpoint_dir: str
    """The folder: config.json with *.safetensors or pytorch_model*.bin."""
    out_dir: str
    """Directory to write."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""


@dataclass(frozen=True, kw_only=True)
class ConvertLit:
    """Write any checkpoint as a complete Hugging Face folder, which transformers can load. Adapters
    are merged on the way."""

    checkpoint_dir: str
    """Any checkpoint directory: full, an adapter or a chain of them."""
    out_dir: str
    """Folder to write."""
    max_shard_size: str = "5GB"
    """Largest weights file, in bytes, MB or GB."""
    overwrite: bool = False
    """Replace what out_dir holds; without this, a directory that is not empty is refused."""
    base_checkpoint_dir: str | None = None
    """An adapter's base, when it is no longer where the adapter says."""
    allow_base_mismatch: bool = False
    """Use a base even if its weights are not those that the adapter was trained on."""

    def __post_init__(self) -> None:
        check_size("max_shard_size", self.max_shard_size)

    @property
    def max_shard_bytes(self) -> int:
        """The size in bytes."""
        return num_bytes(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class Download:
    """Fetch a model from the Hugging Face hub; after an interruption the same command goes on with
    the file that broke off."""

    positional: ClassVar[str] = "repo_id"
    """The setting whose option name may be left out."""

    repo_id: str
    """Its name there: OWNER/NAME; the option's name may be left out."""
    out_dir: str | None = None
    """Where it goes; default: checkpoints/REPO_ID."""
    revision: str = "main"
    """Branch, tag or commit."""
    access_token: str | None = None
    """For models that need a login; default: HF_TOKEN in the environment, or what `hf auth login`
    stored."""

    def __post_init__(self) -> None:
        _check_repo_id(self)
        _check_token(self)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Upload an exported folder, with its model card, to the Hugging Face hub. What is uploaded is
    listed first."""

    folder: str
    """What scripts/convert_lit_checkpoint.py, scripts/export_peft.py or scripts/export_gguf.py
    wrote."""
    repo_id: str
    """Where it goes: OWNER/NAME. The repository is made, unless it exists."""
    private: bool = True
    """Only you and those whom you let in see a new repository. One that exists stays as it is."""
    gated: Literal["false", "auto", "manual"] = "false"
    """People must ask for access: auto lets everyone in who agrees to share who they are, manual
    leaves it to you."""
    yes: bool = False
    """Upload without asking."""
    access_token: str | None = None
    """Of a login that may write; default: HF_TOKEN in the environment, or what `hf auth login`
    stored."""

    def __post_init__(self) -> None:
        _check_repo_id(self)
        _check_token(self)


def _check_repo_id(settings: Download | Upload) -> None:
    name, part = settings.repo_id, r"\w([\w.-]{0,94}\w)?"  # what huggingface_hub takes for a name
    ok = re.fullmatch(f"({part}/)?{part}", name, re.ASCII) and not name.endswith(".git")
    ok = ok and not any(pair in name for pair in ("--", ".."))
    check_value(
        settings,
        "repo_id",
        bool(ok),
        "must be OWNER/NAME, as in EleutherAI/pythia-70m: letters, digits, -, _ and .",
    )


def _check_token(settings: Download | Upload) -> None:
    """Without its value in the message: it is a secret."""
    token = settings.access_token or ""
    sound = token.isascii() and token.isprintable() and " " not in token
    check(sound, f"{setting('access_token')}: holds a space or another character that no token has")
