"""Tiny bases made once a session, and settings of short runs on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterbay.trainer import TrainingConfig, parse_config

from .tiny_bases import make_bert, make_gpt2, make_llama, reviews, write_csv


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a chat template whose padding token is its end token."""
    return make_llama(tmp_path_factory.mktemp("chat") / "base", chat=True)


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without chat template and without padding token."""
    return make_llama(tmp_path_factory.mktemp("plain") / "base", chat=False)


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 (Conv1D layers, no chat template)."""
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "base")


@pytest.fixture(scope="session")
def bert_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers."""
    return make_bert(tmp_path_factory.mktemp("bert") / "base")


@pytest.fixture
def review_csv(tmp_path: Path) -> Path:
    """96 labelled reviews."""
    return write_csv(tmp_path / "reviews.csv", ["text", "label"], reviews(96))


Configure = Callable[..., TrainingConfig]


@pytest.fixture
def configure(tmp_path: Path, review_csv: Path) -> Configure:
    """Settings of a short run on a tiny base; keyword arguments are sections or values to add."""

    def build(base: Path, **changes: Any) -> TrainingConfig:
        values: dict[str, Any] = {
            "base": str(base),
            "task": "sequence-classification",
            "output": str(tmp_path / "out"),
            "data": {"source": str(review_csv), "train_samples": 32, "eval_samples": 16},
            "optimization": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2, "evaluate": "end"},
            "max_length": 64,
            "precision": "float32",
            "threads": 1,
        }
        for name, change in changes.items():
            values[name] = values.get(name, {}) | change if isinstance(change, dict) else change
        return parse_config(values)

    return build
