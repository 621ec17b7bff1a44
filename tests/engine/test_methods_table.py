"""The table of methods says what PEFT has, what admission refuses and what the parity test runs."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import peft_zoo
from engine.test_bottlenecks import TYPES as BOTTLENECKS
from method_tools import EVERYTHING, REFUSED_HERE
from peft import PeftType
from typer.testing import CliRunner

from adapterbay.server.cli import app
from adapterbay.server.convert.methods import METHODS, markdown

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def test_every_peft_type_has_a_row() -> None:
    assert set(METHODS) == {kind.value for kind in PeftType} | {"BOTTLENECK"}


def test_tested_is_what_the_parity_test_runs() -> None:
    run = defaultdict(set)
    for architecture in EVERYTHING:
        for name, recipe in peft_zoo.recipes(architecture).items():
            assert peft_zoo.skipped(recipe) is None, "the parity test leaves it out: run `make setup`"
            if (architecture, name) not in REFUSED_HERE:
                run[recipe.peft_type].add(architecture)
    run["BOTTLENECK"] = {architecture for architecture in EVERYTHING if architecture in BOTTLENECKS}
    assert {kind: set(row.tested) for kind, row in METHODS.items() if row.execution != "refused"} == dict(run)
    assert not any(row.tested for row in METHODS.values() if row.execution == "refused")


def test_what_is_refused_is_refused_by_admission() -> None:
    from adapterbay.registry.admission.methods import METHODS as ADMITTED

    refused = {kind for kind, row in METHODS.items() if row.execution == "refused"}
    assert {kind for kind, method in ADMITTED.items() if method.refused} == refused


def test_the_page_holds_the_table() -> None:
    assert markdown() in DOCS.read_text()


def test_the_command_prints_it() -> None:
    result = CliRunner().invoke(app, ["methods", "--json"])
    assert result.exit_code == 0
    assert {row["peft_type"] for row in json.loads(result.output)} == set(METHODS)
    table = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert table.exit_code == 0
    assert "FourierFT" in table.output
