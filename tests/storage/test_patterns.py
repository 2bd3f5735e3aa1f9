"""Patterns of layer names mean what they mean to `re`, and take linear time."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litlora.errors import CheckpointError
from litlora.storage.patterns import Patterns


def by_peft(pattern: str, name: str) -> bool:
    """PEFT's own rule (peft.utils.get_pattern_key)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


NAMES = st.text("ab.01_", max_size=8)
ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "0", r"\d", r"\w", r"\D", r"\W", r"\s", "[ab]", "[^a]", "[a-b0]", r"[\d_]", "[]a]"]
)
ANCHORS = st.sampled_from(["^", "$", r"\A", r"\Z"])
QUANTIFIERS = st.sampled_from(["", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,}", "{,2}", "{1,3}?"])
TREES = st.recursive(
    st.one_of(st.builds("{}{}".format, ATOMS, QUANTIFIERS), ANCHORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.builds(
            "{}{}){}".format,
            st.sampled_from(["(", "(?:"]),
            st.lists(inner, max_size=3).map("|".join),
            QUANTIFIERS,
        ),
    ),
    max_leaves=6,
)
ANYTHING = st.text(r"ab.01_()[]{}*+?|^$\-,:wdsZbB<=!P", max_size=8)


@settings(max_examples=400, deadline=None)
@given(st.one_of(TREES, ANYTHING), st.lists(NAMES, min_size=1, max_size=6))
def test_what_is_accepted_matches_as_in_re(pattern, names):
    try:
        Patterns([pattern], ends=True)
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        re.compile(pattern)
    whole, ends = Patterns([pattern], ends=False), Patterns([pattern], ends=True)
    for name in names:
        assert (whole.first(name) is not None) == (re.fullmatch(pattern, name) is not None), name
        assert (ends.first(name) is not None) == by_peft(pattern, name), name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(TREES, NAMES), max_size=5), NAMES)
def test_the_first_of_several_counts(patterns, name):
    try:
        several = Patterns(patterns, ends=True)
    except ValueError:
        return
    assert several.first(name) == next((text for text in patterns if by_peft(text, name)), None)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "model.layers.3.self_attn.q_proj",
        r"layers\.(1|12)\.mlp\..*_proj",
        r"^model.decoder.layers.\d+.encoder_attn.k_proj",
        r".*\.layers\.[0-7]\..*",
        r"(?:layers)\.1[0-9]\..+(q|v)_proj",
        r"layers\.\d{1,2}\.(self_attn|mlp)\.\w+$",
    ],
)
def test_patterns_that_people_write_are_accepted_and_mean_the_same(pattern):
    leaves = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "encoder_attn.k_proj")
    tops = ("model", "model.decoder", "base.model", "x")
    names = [f"{top}.layers.{n}.{leaf}" for top in tops for n in (0, 1, 3, 12, 100) for leaf in leaves]
    found = Patterns([pattern], ends=True)
    assert [found.first(n) is not None for n in names] == [by_peft(pattern, n) for n in names]
    assert any(by_peft(pattern, n) for n in names)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(a", "does not close a group"),
        ("a)|(b", "closes a group that is not open"),
        ("(?=a)", "group of the kind"),
        ("(?i)a", "group of the kind"),
        (r"(a)\1", r"has \\1"),
        (r"\bq", r"has \\b"),
        ("a**", "repeats a repetition"),
        ("a++", "repeats a repetition"),
        ("*a", "after nothing"),
        ("(a*)*", "repeats what may be empty"),
        ("(a{99}){99}", "too many states"),
        ("a{2,1}", "fewer times"),
        ("a{99999}", "repeats 99999 times"),
        ("^*", "repeats an anchor"),
        ("[[a]", "unusual set"),
        ("[b-a]", "set of characters that is not one"),
        ("(" * 200 + ")" * 200, "groups within groups"),
        ("a" * 1001, "is not the name of a layer"),
        (3, "is not the name of a layer"),
    ],
)
def test_what_is_refused_is_named(pattern, says):
    with pytest.raises(ValueError, match=says):
        Patterns([pattern], ends=True)


NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    ["(|)" * 40 + "X", ".?" * 40 + "X", r"(\w+\.?)+X", r"(a|a|\w)+$", "(.*)" * 50 + "X", ".*a" * 200],
)
def test_a_pattern_that_never_ends_in_re_ends_here(pattern):
    started = time.perf_counter()
    found = Patterns([pattern], ends=True)
    assert [found.first(NAME.replace("11", str(n))) for n in range(200)].count(None) in (0, 200)
    assert time.perf_counter() - started < 5


def test_thousands_of_names_are_matched_together():
    names = [f"model.layers.{n}.mlp.experts.{m}.up_proj" for n in range(100) for m in range(300)]
    started = time.perf_counter()
    found = Patterns(names, ends=True)
    assert all(found.first(f"base.{name}") == name for name in names[::10])
    assert found.first("model.layers.5.mlp.down_proj") is None
    assert time.perf_counter() - started < 10


@pytest.mark.slow
def test_patterns_that_cost_too_much_together_are_refused():
    found = Patterns([".*a" * 100 + f"{n}.*" for n in range(2000)], ends=True)
    with pytest.raises(CheckpointError, match="2,000 patterns .* take too long"):
        for number in range(2000):
            found.first(("ab" * number)[:9000] + ".")


def test_a_name_of_several_lines_is_refused():
    with pytest.raises(CheckpointError, match="several lines"):
        Patterns(["a"], ends=True).first("b.a\n")
