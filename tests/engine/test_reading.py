"""What PEFT is given when it reads a stranger's adapter."""

from __future__ import annotations

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


def test_no_expression_of_a_stranger_reaches_pythons_matcher() -> None:
    """Python's matcher takes for ever on this one; ours is linear, or refuses."""
    hostile = "(a+)+$"
    plain = without_expressions({"peft_type": "LOHA", "target_modules": hostile, "rank_pattern": {hostile: 1}}, MODULES)
    assert plain["target_modules"] == []
    assert plain["rank_pattern"] == {}
    with pytest.raises(Rejected):
        without_expressions({"peft_type": "LOHA", "target_modules": "(?=q)q"}, MODULES)
