"""What PEFT is given when it reads a stranger's adapter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapterbay.registry.errors import Rejected
from adapterbay.server.convert.read import without_expressions

MODULES = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_patterns_become_names() -> None:
    config = {
        "peft_type": "LOHA",
        "target_modules": r".*\.(q_proj|down_proj)",
        "exclude_modules": r".*layers\.2.*",
        "rank_pattern": {r"layers\.0\.mlp.down_proj": 3, "q_proj": 5},
        "layers_pattern": None,
    }
    plain = without_expressions(config, MODULES)
    assert plain["target_modules"] == MODULES[:4]
    assert plain["exclude_modules"] is None
    assert plain["rank_pattern"] == {MODULES[0]: 5, MODULES[1]: 3, MODULES[2]: 5}


def test_layers_and_feed_forward_parts_are_named() -> None:
    config = {
        "peft_type": "IA3",
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "feedforward_modules": r".*down_proj",
    }
    plain = without_expressions(config, MODULES)
    assert plain["target_modules"] == MODULES[2:4]
    assert plain["feedforward_modules"] == [MODULES[3]]
    assert plain["layers_to_transform"] is None


HOSTILE = "(a+)+c"
TRAP = "a" * 40 + "b"
"""A name on which Python's matcher tries 2**40 ways to match HOSTILE, and `.*(a+)+c` as many."""

SETTINGS = {
    "target_modules": {"target_modules": HOSTILE},
    "exclude_modules": {"target_modules": [TRAP, "q_proj"], "exclude_modules": HOSTILE},
    "feedforward_modules": {"peft_type": "IA3", "target_modules": [TRAP, "q_proj"], "feedforward_modules": HOSTILE},
    "rank_pattern": {"target_modules": [TRAP, "q_proj"], "rank_pattern": {HOSTILE: 1}},
    "alpha_pattern": {"target_modules": [TRAP, "q_proj"], "alpha_pattern": {HOSTILE: 1, "q_proj": 2}},
    "rank_pattern that is searched": {"peft_type": "OSF", "target_modules": [TRAP], "rank_pattern": {HOSTILE: 1}},
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_expression_of_a_stranger_reaches_pythons_matcher(setting: str) -> None:
    """Python's matcher would not come back; ours is linear, and what PEFT gets holds names only."""
    plain = without_expressions({"peft_type": "LOHA", **SETTINGS[setting]}, [*MODULES, TRAP])
    assert HOSTILE not in json.dumps(plain)
    wanted = [] if setting == "target_modules" else [n for n in (*MODULES, TRAP) if n.endswith(("q_proj", TRAP))]
    if plain["peft_type"] == "OSF":
        wanted = [TRAP]
    assert plain["target_modules"] == wanted
    assert not plain.get("exclude_modules")
    assert not plain.get("feedforward_modules")
    assert not plain.get("rank_pattern")
    if setting == "alpha_pattern":
        assert plain["alpha_pattern"] == {name: 2 for name in MODULES if name.endswith("q_proj")}


LOOKING_AHEAD = "(?=q)q"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": LOOKING_AHEAD},
        {"exclude_modules": LOOKING_AHEAD},
        {"feedforward_modules": LOOKING_AHEAD},
        {"rank_pattern": {LOOKING_AHEAD: 1}},
        {"alpha_pattern": {LOOKING_AHEAD: 1}},
        {"layers_to_transform": [0], "layers_pattern": LOOKING_AHEAD},
        {"layers_to_transform": [0], "layers_pattern": HOSTILE},
        {"target_modules": "a{1000}" * 1000},
        {"rank_pattern": {f"(a|b){{100}}{number}": 1 for number in range(1000)}},
    ],
    ids=lambda settings: " and ".join(settings),
)
def test_what_cannot_be_matched_in_linear_time_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as caught:
        without_expressions({"peft_type": "LOHA", "target_modules": ["q_proj"], **settings}, MODULES)
    assert caught.value.reason == "BAD_PATTERN"
