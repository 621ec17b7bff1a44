"""Expressions that strangers write: the answers of Python's `re`, in linear time."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
from hostile_tools import fuzz
from hypothesis import assume, given
from hypothesis import strategies as st

from adapterbay.registry.admission.linear_regex import LinearPattern, UnusablePattern
from adapterbay.registry.admission.patterns import MAX_KEYS, ModulePatterns, Targets
from adapterbay.registry.errors import Rejected

atoms = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\S",
        "[ab]",
        "[^a]",
        "[a-c1]",
        r"[\d.]",
        "[]a]",
        "[^]b]",
        "1",
        "_",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "-",
        "{",
        "}",
        "{x",
    ]
)
repeats = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{,2}", "{1,}", "{0}", "{}"])
patterns = st.recursive(
    st.builds(lambda atom, repeat: atom + repeat, atoms, repeats),
    lambda inner: st.one_of(
        st.builds(lambda parts: "".join(parts), st.lists(inner, max_size=4)),
        st.builds(lambda opening, parts, repeat: f"{opening}{'|'.join(parts)}){repeat}",
                  st.sampled_from(["(", "(?:"]), st.lists(inner, min_size=1, max_size=3), repeats),
        st.builds(lambda one, two: f"{one}|{two}", inner, inner),
    ),
    max_leaves=8,
)  # fmt: skip
NAMES = ["".join(letters) for length in (1, 2, 3) for letters in itertools.product("ab.1", repeat=length)]


@fuzz(400)
@given(patterns, st.text(alphabet="ab1._-{}x", min_size=1, max_size=8))
def test_the_answers_of_re(pattern: str, name: str) -> None:
    try:
        theirs = re.compile(pattern)
    except re.error:
        with pytest.raises(UnusablePattern):
            LinearPattern(pattern)
        return
    try:
        ours = LinearPattern(pattern)
    except UnusablePattern:
        assume(False)
    wrong = [text for text in (*NAMES, name) if ours.fullmatch(text) != (theirs.fullmatch(text) is not None)]
    assert not wrong, (pattern, wrong)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\ba.*",
        r"a\b.*",
        r"a\B.*",
        r".*\b\.\b.*",
        r"\Aa+\Z",
        "^a$",
        "a^b",
        "a$b",
        "(^a|b)+",
        "(?:a$|b)+",
        r"(\b|a)+",
        "a{2}",
        "a{,2}",
        "a{1,}",
        "a{1,2}?",
        "a{}",
        "a{x",
        "(a|ab)(1|b1)",
        "(a?)*",
        "()*a",
        "(|a)b",
        "[]a]",
        "[^]a]",
        r"[\d.]+",
        "(?P<x>a)b",
    ],
)
def test_every_construct(pattern: str) -> None:
    ours, theirs = LinearPattern(pattern), re.compile(pattern)
    assert [text for text in NAMES if ours.fullmatch(text)] == [text for text in NAMES if theirs.fullmatch(text)]


@fuzz(300)
@given(st.text(max_size=30))
def test_any_text_compiles_or_is_refused(pattern: str) -> None:
    try:
        LinearPattern(pattern)
    except UnusablePattern:
        return
    re.compile(pattern)


RUNS_AWAY = [
    "(a+)+$",
    "(a*)*",
    "(a|a)*$",
    "(?:a+){10}x",
    "((a)|b)+x",
    "(a?){50}a{50}x",
    r"(.*\.)*x",
    "([a-z]+)*x",
    ".*" * 40 + "x",
    "(?:..|..)" * 30 + "x",
    "(a|b|ab)*(a|ba|b)*x",
    "(?:a*a*)*x",
]


@pytest.mark.parametrize("pattern", RUNS_AWAY)
def test_what_takes_re_ages_takes_no_time(pattern: str) -> None:
    began = time.process_time()
    compiled = LinearPattern(pattern)
    for number in range(300):
        compiled.fullmatch("a" * 60 + str(number) + "!")
    assert time.process_time() - began < 15


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [f"m{number}" for number in range(200_000)]},
        {"target_modules": ["q_proj"], "exclude_modules": [f"m{number}" for number in range(200_000)]},
        {"target_modules": ["q_proj"], "layers_to_transform": list(range(200_000))},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["x"] * 50},
    ],
    ids=lambda config: ", ".join(config),
)
def test_long_lists_take_no_time(config: dict[str, Any]) -> None:
    began = time.process_time()
    targets = Targets(config)
    for layer in range(2000):
        assert f"model.layers.{layer}.self_attn.k_proj" not in targets
    assert time.process_time() - began < 15


def test_many_keys_take_no_time() -> None:
    """EVA and AdaLoRA write a key for every module."""
    modules = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(40) for expert in range(20)]
    began = time.process_time()
    keys = ModulePatterns(modules)
    assert [keys.first(module) for module in modules] == modules
    assert time.process_time() - began < 15
    with pytest.raises(Rejected) as caught:
        ModulePatterns(f"m{number}" for number in range(MAX_KEYS + 1))
    assert caught.value.reason == "BAD_PATTERN"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["a"], "layers_to_transform": [1], "layers_pattern": "(?P<index>a)"},
        {"target_modules": ["a"], "layers_to_transform": [1], "layers_pattern": "a|b"},
        {"target_modules": ["a"], "layers_to_transform": [1], "layers_pattern": ["x"] * 51},
        {"target_modules": "a" * 3000},
        {"exclude_modules": "(?=a)"},
    ],
    ids=str,
)
def test_settings_that_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as caught:
        Targets(config)
    assert caught.value.reason == "BAD_PATTERN"


def test_nothing_is_targeted_below_what_is_saved_whole() -> None:
    """PEFT puts no adapter on a module of modules_to_save, nor inside it."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = {"target_modules": ["dense"], "modules_to_save": ["classifier"]}
    for module in ("classifier.dense", "x.classifier.dense", "classifier2.dense", "x.dense", "my.classifiers.dense"):
        theirs = check_target_module_exists(LoraConfig(**settings), module)
        assert (module in Targets(settings)) == (theirs is True), module
