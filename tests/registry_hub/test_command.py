"""The verbs of `registry` over a registry on the Hub, as people type them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hub_tools import environment
from plain_hub import PlainHub

Content = Callable[[int], Path]

RUN = """
import json, sys
from typer.testing import CliRunner
from adapterbay.registry.cli import app
results = []
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(app, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    results.append([done.exit_code, done.stdout, done.stderr])
json.dump(results, sys.stdout)
"""


@pytest.fixture
def run(plain: PlainHub, tmp_path: Path) -> Callable[[Sequence[Sequence[object]]], list[list[Any]]]:
    """Runs commands one after the other, in one process whose caches are the test's own. `prod` is hub:team."""
    home = tmp_path / "home"
    (home / "adapterbay").mkdir(parents=True)
    config = f'[prod]\nplace = "hub:team"\nendpoint = "{plain.endpoint}"\n'
    (home / "adapterbay" / "registries.toml").write_text(config, encoding="utf-8")

    def all_of(commands: Sequence[Sequence[object]]) -> list[list[Any]]:
        asked = json.dumps([[str(argument) for argument in command] for command in commands])
        env = environment(home, "http://127.0.0.1:9") | {"ADAPTERBAY_REGISTRY": "prod"}
        command = [sys.executable, "-c", RUN]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        answers: list[list[Any]] = json.loads(done.stdout)
        return answers

    return all_of


def test_a_day_with_the_hub(
    run: Callable[[Sequence[Sequence[object]]], list[list[Any]]], content: Content, tmp_path: Path
) -> None:
    commands: list[list[object]] = [
        ["push", content(1), "tales", "--alias", "champion", "--json"],
        ["push", content(2), "team/tales"],
        ["list", "--json"],
        ["show", "tales@champion"],
        ["resolve", "hub:team/tales@v2", "--json"],
        ["alias", "set", "tales", "champion", 2, "--expected", 1, "--json"],
        ["alias", "set", "tales", "champion", 1, "--expected", 1],
        ["rollback", "tales@champion", "--json"],
        ["history", "tales", "--json"],
        ["pull", "tales@champion", tmp_path / "pulled"],
        ["verify"],
        ["verify", "tales", "--json"],
        ["alias", "rm", "tales", "champion"],
        ["resolve", "tales@champion"],
        ["show", "tales@7"],
        ["gc"],
    ]
    results = run(commands)
    codes = [code for code, _, _ in results]
    assert codes == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 2], results
    answers = [json.loads(out) if out.startswith("{") else out for _, out, _ in results]
    pushed, _, listed, shown, resolved, moved, _, back, history, pulled, _, verified, *_ = answers
    assert (pushed["name"], pushed["version"], pushed["aliases"]) == ("team/tales", 1, ["champion"])
    assert [(each["name"], each["version"], each["alias_versions"]) for each in listed["adapters"]] == [
        ("team/tales", 2, {"champion": 1})
    ]
    assert "team/tales@1" in shown
    assert (resolved["reference"], resolved["version"]) == ("hub:team/tales@v2", 2)
    assert (moved["previous"], moved["version"], back["previous"], back["version"]) == (1, 2, 2, 1)
    assert [event["kind"] for event in history["history"]] == [
        "pushed",
        "alias_set",
        "pushed",
        "alias_set",
        "alias_set",
    ]
    assert "team/tales@1" in pulled
    assert (tmp_path / "pulled" / "adapter_model.safetensors").read_bytes() == (
        content(1) / "adapter_model.safetensors"
    ).read_bytes()
    assert verified["ok"] is True
    errors = [error for code, _, error in results if code]
    assert all(error.startswith("error: ") and error.count("\n") == 1 for error in errors), errors
    assert "Did you mean" in errors[-2]
