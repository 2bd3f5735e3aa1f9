"""Rotary position embeddings in a config.json, read and written. Torch-free."""

import math
from typing import TYPE_CHECKING, Any

from litlora.config import ModelConfig, RopeScaling
from litlora.errors import CheckpointError

if TYPE_CHECKING:
    from litlora.formats.families.hf_config import HFConfig

SCALING_KEYS = RopeScaling.NEEDS
"""The settings of each type of scaling."""
OTHER_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "mscale",
    "mscale_all_dim",
    "finetuned",
}


def rope_fields(
    c: "HFConfig", theta: float = 10_000.0, partial: float = 1.0, *, scaling: Any = None
) -> dict[str, Any]:
    """The rotary fields of ModelConfig.

    They come from `rope_parameters` (2025 and later), or from `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`. `theta` and `partial` are the family's defaults; `scaling` takes the
    place of the file's own settings.
    """
    values = scaling or c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise CheckpointError(
            f"rope_parameters {values!r}: settings of this form are not implemented for this architecture"
        )
    known = OTHER_KEYS.union(*SCALING_KEYS.values())
    if unknown := sorted(values.keys() - known):
        raise CheckpointError(f"rope scaling: {', '.join(unknown)} is not implemented")
    share = values.get("partial_rotary_factor", c.get("partial_rotary_factor", partial))
    return {
        "rope_theta": values.get("rope_theta") or c.get("rope_theta") or theta,
        "partial_rotary_factor": 1.0 if share is None else share,
        "rope_scaling": _scaling(c, values),
    }


def rope_by_kind(c: "HFConfig") -> tuple["HFConfig", dict[str, Any], float | None]:
    """(the settings without `rope_parameters`, those of the layers without a window, the base in
    layers with one) where `rope_parameters` has one entry for each kind of layer. Files of before
    2025 have `rope_scaling`, which is meant for the layers without a window."""
    by_kind = c.get("rope_parameters") or {}
    local = by_kind.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise CheckpointError(
            "rope_parameters: scaling in the layers with a sliding window is not implemented"
        )
    scaling = {**(by_kind.get("full_attention") or {}), **(c.get("rope_scaling") or {})}
    return c.replace(rope_parameters=None), scaling, local.get("rope_theta")


def _scaling(c: "HFConfig", values: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of RopeScaling. Absent ones are derived from the others."""
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind == "su":
        kind = "longrope"  # Phi-3's first name for it
    if kind not in SCALING_KEYS:
        raise CheckpointError(
            f"rope scaling of type {kind!r} is not implemented; choose from {', '.join(SCALING_KEYS)}"
        )
    original = values.get("original_max_position_embeddings") or c.get("original_max_position_embeddings")
    found = {**values, "original_max_position_embeddings": original or c.need("max_position_embeddings")}
    if kind == "yarn":
        found["beta_fast"] = values.get("beta_fast") or 32
        found["beta_slow"] = values.get("beta_slow") or 1
        found["truncate"] = values.get("truncate", True)
    if kind in ("yarn", "longrope") and values.get("attention_factor") is None:
        found["attention_factor"] = _attention_factor(c.get("max_position_embeddings"), kind, found)
    return {"rope_type": kind, **{key: found.get(key) for key in SCALING_KEYS[kind]}}


def _attention_factor(context: Any, kind: str, values: dict[str, Any]) -> float:
    """The default: 0.1 ln(factor) + 1 for yarn, sqrt(1 + ln(factor) / ln(original)) for longrope.

    `context` is the context length, which gives the factor where no factor is set.
    """
    original = values["original_max_position_embeddings"]
    factor = values.get("factor")
    if not factor:
        if context is None:
            raise CheckpointError("max_position_embeddings missing")
        factor = context / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    shares = (values.get("mscale"), values.get("mscale_all_dim"))
    if all(shares):
        return (0.1 * shares[0] * math.log(factor) + 1) / (0.1 * shares[1] * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def rope_settings(config: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling` in a config.json."""
    if config.rope_scaling is None:
        return None
    values = config.rope_scaling.to_dict()
    if values["rope_type"] == "longrope":  # readers of before 2025 want exactly the type and the factors
        default = _attention_factor(config.max_position_embeddings, "longrope", {**values, "factor": None})
        if values["attention_factor"] == default:
            del values["attention_factor"]
    return values
