"""The demo itself, every step of it, on the real model and real reviews, with little training.

What needs more training than a test should take (accuracy, perplexity) is not asserted; `make demo` does.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from adapterbay.demo import recipes
from adapterbay.demo.console import Narrator
from adapterbay.demo.script import Demo

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

NEEDS_TRAINING = {
    "critic lowers held-out perplexity below the base's",
    "the trained adapter clearly beats the untouched base",
}


def test_every_step_of_the_demo_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, samples in (("SENTIMENT", 24), ("CRITIC", 48)):
        settings = copy.deepcopy(getattr(recipes, name))
        settings["data"] |= {"train_samples": samples, "eval_samples": 24}
        monkeypatch.setattr(recipes, name, settings)
    monkeypatch.setattr(recipes, "FEW", 16)
    demo = Demo(tmp_path, Narrator())
    report = demo.run()
    failed = {claim for claim, held in demo.checks.items() if not held}
    assert failed <= NEEDS_TRAINING
    assert len(demo.checks) == 9
    assert report["ok"] == (not failed)
    assert len(report["crowd"]) == 16
    assert report["swap"]["failed"] == report["swap"]["stale"] == 0
    assert report["swap"]["old_digest"] == report["versions"]["sentiment@1"] != report["swap"]["new_digest"]
    compared = report["comparison"]["versions"]
    assert compared["inputs"] == 24
    assert 0 <= compared["p_value"] <= 1
    assert compared["verdict"] in ("first is better", "second is better", "inconclusive")
