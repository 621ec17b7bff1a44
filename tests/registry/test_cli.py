"""The command line: what it prints, its JSON, its exit codes, and that a mistake is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Tiny, run, run_json, told
from typer.testing import CliRunner

from adapterbay.registry import Registry
from adapterbay.registry.cli import app
from adapterbay.registry.errors import AdapterbayError


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(tmp_path / "store"))


def test_a_life(llama: Tiny, tmp_path: Path) -> None:
    output = run("push", llama.adapter, "team/x", "--alias", "champion").stdout
    assert "found: LoRA of rank 4 on 6 modules (down_proj, q_proj, v_proj)" in output
    assert f"found: base folder:{llama.base} (from adapter_config.json)" in output
    assert "found: task causal-lm (from adapter_config.json)" in output
    assert "pushed team/x@1 sha256:" in output
    assert "alias team/x@champion → 1" in output
    assert "same content as version 1" in run("push", llama.adapter, "team/x").stdout
    assert "champion → 1" in run("list").stdout
    shown = run("show", "team/x@champion").stdout
    assert "team/x@1" in shown
    assert "adapter_model.safetensors" in shown
    assert "(was 1)" in run("alias", "set", "team/x", "champion", 2, "--expected", 1).stdout
    assert run("resolve", "team/x@champion").stdout.startswith("team/x@2 sha256:")
    assert run("pull", "team/x@1", tmp_path / "out").stdout == f"team/x@1 → {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "2 versions and 4 blobs were checked" in run("verify").stdout
    assert "was removed (was 2)" in run("alias", "rm", "team/x", "champion").stdout
    assert Registry.open().aliases("team/x") == {}


def test_json(bert: Tiny) -> None:
    receipt = run_json("push", bert.adapter, "cls", "--label", "no", "--label", "yes", "--alias", "champion")
    assert (receipt["name"], receipt["version"], receipt["same_as"], receipt["aliases"]) == (
        "cls",
        1,
        None,
        ["champion"],
    )
    assert receipt["manifest"]["labels"] == ["no", "yes"]
    (listed,) = run_json("list")["adapters"]
    assert (listed["name"], listed["digest"], listed["alias_versions"]) == ("cls", receipt["digest"], {"champion": 1})
    assert run_json("list", "--prefix", "z") == {"adapters": []}
    assert run_json("resolve", "cls") == {"reference": "cls", "name": "cls", "version": 1, "digest": receipt["digest"]}
    shown = run_json("show", "cls@1")
    assert shown["manifest"] == receipt["manifest"]
    assert shown["version"]["created_at"].endswith("+00:00")
    assert run_json("verify", "cls")["ok"] is True
    assert run_json("alias", "set", "cls", "new", 1, "--expected", 0) == {
        "overruled": [],
        "alias": "new",
        "previous": None,
        "version": 1,
    }
    assert run_json("alias", "rm", "cls", "new") == {"alias": "new", "previous": 1, "version": None, "overruled": []}


def test_mistakes_are_one_line(llama: Tiny, tmp_path: Path) -> None:
    assert "no registry at" in told("list", code=2)
    run("push", llama.adapter, "team/sentiment", "--alias", "champion")
    assert "Did you mean team/sentiment?" in told("resolve", "team/sentimant", code=1)
    assert "Did you mean team/sentiment@champion?" in told("show", "team/sentiment@champoin", code=1)
    assert "is not an adapter name" in told("push", llama.adapter, "Team", code=2)
    assert "There is no folder" in told("push", tmp_path / "none", "x", code=1)
    assert "no base folder at /nowhere" in told("push", llama.adapter, "x", "--base", "/nowhere", code=2)
    assert "is not one of" in told("push", llama.adapter, "x", "--task", "poetry", code=2)
    assert "expected" in told("alias", "set", "team/sentiment", "champion", 1, "--expected", 0, code=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "not empty" in told("pull", "team/sentiment", tmp_path / "full", code=2)
    assert "not a registry" in told("push", llama.adapter, "x", "--registry", tmp_path / "full", code=1)
    bad = tmp_path / "bad"
    shutil.copytree(llama.adapter, bad)
    (bad / "x.py").touch()
    assert "code is never taken" in told("push", bad, "x", code=1)


def test_usage_is_exit_2(llama: Tiny) -> None:
    for arguments in (["push"], ["nonsense"], ["alias", "set", "x", "a", "zero"], ["push", "a", "b", "--nonsense"]):
        assert run(*arguments, code=2).stdout == ""


def test_verify_fails_on_damage(llama: Tiny, tmp_path: Path) -> None:
    run("push", llama.adapter, "x")
    store = Registry.open()
    blob = store.open_snapshot(store.resolve("x").digest).files["adapter_model.safetensors"]
    blob.chmod(0o644)
    blob.write_bytes(b"")
    result = run("verify", code=1)
    assert "problem: x@1: adapter_model.safetensors has 0 bytes" in result.stdout
    assert result.stderr.startswith("error: 1 problem was found")
    report = run("verify", "--json", code=1)
    assert json.loads(report.stdout)["ok"] is False


def test_programming_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, llama: Tiny) -> None:
    run("push", llama.adapter, "x")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Registry, "adapters", broken)
    result = CliRunner().invoke(app, ["list"])
    assert isinstance(result.exception, RuntimeError)


def every_error(kind: type[AdapterbayError]) -> list[type[AdapterbayError]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in every_error(sub))]


def test_exit_codes_are_1_or_2() -> None:
    assert {kind.exit_code for kind in every_error(AdapterbayError)} == {1, 2}


def test_a_real_process(llama: Tiny, tmp_path: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = "from adapterbay.registry.cli import app; app()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = call("push", llama.adapter, "x", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    done = call("resolve", "y")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: There is no adapter y in the registry.\n"
    done = call("list", "--registry", tmp_path / "none")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
