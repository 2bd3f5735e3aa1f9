"""A target is a preset, a name or its end, or a pattern; the first that means a layer counts."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from litlora.settings import PRESETS
from litlora.settings.targets import ByTarget, in_preset

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "q_proj"]
NAMES += ["model.layers.0.mlp.experts.3.up_proj"]
TARGETS = [
    "qv",
    "attention",
    "mlp",
    "experts",
    "all-linear",
    "q_proj",
    "self_attn.q_proj",
    r".*\.up_proj",
    "up.proj",
    *NAMES,
]


def one_by_one(values, name):
    if name in values:
        return values[name]
    for target, value in values.items():
        if target in PRESETS:
            meant = in_preset(name, target)
        else:
            meant = name.endswith("." + target) or re.fullmatch(target, name)
        if meant:
            return value
    return "default"


@settings(deadline=None)
@given(st.lists(st.sampled_from(TARGETS), unique=True), st.sampled_from(NAMES))
def test_together_they_mean_what_they_mean_one_by_one(targets, name):
    values = {target: number for number, target in enumerate(targets)}
    assert ByTarget(values).value(name, "default") == one_by_one(values, name)
