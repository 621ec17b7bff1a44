"""What the demo trains is what the examples show."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterbay.demo import recipes
from adapterbay.trainer import load_config, parse_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("name", "recipe"), [("sentiment", recipes.SENTIMENT), ("critic", recipes.CRITIC)])
def test_the_demo_trains_what_the_examples_show(name: str, recipe: dict[str, object]) -> None:
    """Only the number of held-out reviews differs: the demo compares on more of them."""
    mine = parse_config(recipes.recipe(recipe, Path("out")))
    shown = load_config(EXAMPLES / f"{name}.yaml", {"output": "out", "data.eval_samples": mine.data.eval_samples})
    assert mine == shown
