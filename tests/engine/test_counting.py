"""What the engine counts of rows, and what it builds once for a step, where positions are not tokens of the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from engine_tools import Harness
from peft import PromptTuningConfig, get_peft_model
from tiny import load_reference, make_base
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.server import runner
from adapterbay.server.batch import Share

TEXT = list(range(30, 42))
NEW = 5


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A Llama with seven virtual tokens."""
    root = tmp_path_factory.mktemp("counting")
    made = Zoo(make_base(root / "base", "llama", layers=2), Registry.open(root / "registry"))
    model = get_peft_model(load_reference(made.base), PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)  # type: ignore[union-attr, operator, index]
    model.save_pretrained(root / "virtual")
    made.registry.push(root / "virtual", "virtual", base=f"folder:{made.base}")
    return made


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    root: Path = tmp_path_factory.mktemp("t5")
    return Zoo(make_base(root / "base", "t5", layers=1), Registry.open(root / "registry"))


@pytest.fixture(params=["llama", "t5"])
def harness(request: pytest.FixtureRequest, zoo: Zoo, t5: Zoo) -> Iterator[Harness]:
    chosen = zoo if request.param == "llama" else t5
    with Harness(chosen.base, chosen.registry) as made:
        yield made


def ask_all(harness: Harness) -> None:
    adapters = ["virtual", None] if harness.engine.base.kind == "causal-lm" else [None, None]
    answers = [harness.generate(adapter, TEXT, NEW) for adapter in adapters]
    assert all(len(answer.generated().token_ids) == NEW for answer in answers)
    harness.embed(None, TEXT).wait()
    harness.idle()


def test_generated_tokens_are_those_that_callers_got(harness: Harness) -> None:
    ask_all(harness)
    tally = harness.engine.row_tally
    assert tally.generated_tokens.of() == 2 * NEW
    assert tally.prompt_tokens.of() == 3 * len(TEXT)


def test_a_step_finds_its_rows_places_once(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    find = runner._stretches_of

    def counted(order: Sequence[Share]) -> list[runner.Stretch]:
        calls.append(len(order))
        return find(order)

    monkeypatch.setattr(runner, "_stretches_of", counted)
    ask_all(harness)
    assert NEW <= len(calls) <= harness.engine.stats().steps
