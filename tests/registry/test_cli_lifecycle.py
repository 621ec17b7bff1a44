"""The commands of a version's life: what they print, their JSON, and that each mistake is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from registry_tools import Draft, Tiny, run, run_json, told

from adapterbay.registry import Registry

DraftOf = Callable[[Tiny], Draft]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(tmp_path / "store"))
    monkeypatch.setenv("ADAPTERBAY_ACTOR", "ann")


@pytest.fixture
def trained(llama: Tiny, draft: DraftOf) -> Callable[[float], Path]:
    def make(accuracy: float) -> Path:
        made = draft(llama)
        made.edit_tensors(lambda tensors: next(iter(tensors.values())).flat.__setitem__(0, accuracy))
        made.write_training(metrics={"accuracy": accuracy})
        return made.path

    return make


def test_review_promote_roll_back_retire(trained: Callable[[float], Path], tmp_path: Path) -> None:
    run("push", trained(0.7), "team/x", "--alias", "champion")
    run("push", trained(0.9), "team/x")
    run("guard", "team/x@champion", "--min", "accuracy=0.8", "--requires", "comparison")
    assert "accuracy >= 0.8, a comparison" in run("guard", "team/x").stdout
    refused = told("alias", "set", "team/x", "champion", 2, code=1)
    assert "a comparison with the version it points or pointed at" in refused
    assert "accuracy" not in refused
    run(
        *("record-comparison", "team/x@2", "team/x@champion", "--metric", "accuracy", "--value", 0.9, "--other", 0.7),
        *("--inputs", 240, "--verdict", "better", "--test", "mcnemar", "--p-value", 0.01),
    )
    assert "champion → 2 (was 1)" in run("alias", "set", "team/x", "champion", 2).stdout
    assert "accuracy must be at least 0.8" in told("rollback", "team/x@champion", code=1)
    assert "why" in told("rollback", "team/x@champion", "--force", code=2)
    forced = run_json("rollback", "team/x@champion", "--force", "--why", "it leaks")
    assert (forced["version"], len(forced["overruled"])) == (1, 2)
    history = run_json("history", "team/x")["history"]
    assert [event["kind"] for event in history] == [
        *("pushed", "alias_set", "pushed", "guard_set", "compared", "alias_set", "alias_set"),
    ]
    assert {event["by"] for event in history} == {"ann"}
    assert history[-1]["detail"]["forced"] == "it leaks"
    table = run("history", "team/x").stdout
    assert "champion rolled back to 1 (was 2), forced: it leaks" in table

    assert "language=zh" in run("tag", "team/x@2", "language=zh", "good").stdout
    assert run_json("tag", "team/x@2", "--rm", "good")["tags"] == {"language": "zh"}
    run("deprecate", "team/x@2", "--reason", "use 3")
    shown = run("show", "team/x@2").stdout
    assert "use 3" in shown
    assert "language=zh" in shown
    run("deprecate", "team/x@2", "--undo")
    assert "Give --reason" in told("deprecate", "team/x@2", code=2)
    assert "champion" in told("delete", "team/x@1", "--yes", code=1)
    run("delete", "team/x@2", "--yes", "--reason", "wrong data")
    assert "was deleted" in told("show", "team/x@2", code=1)
    assert run_json("gc", "--grace", 0, "--dry-run")["removed_blobs"] == 2
    assert "2 blobs removed" in run("gc", "--grace", 0).stdout
    assert run_json("doctor")["ok"] is True
    assert "nothing is wrong" in run("doctor").stdout
    run("guard", "team/x@champion", "--rm")
    assert guarded("team/x") == []


def guarded(reference: str) -> list[tuple[str | None, str]]:
    return [(found["adapter"], found["alias"]) for found in run_json("guard", reference)["guards"]]


def test_a_guard_of_every_adapter(trained: Callable[[float], Path]) -> None:
    run("push", trained(0.7), "team/x")
    run("guard", "champion", "--min", "accuracy=0.8", "--requires", "comparison")
    assert "every champion: accuracy >= 0.8, a comparison" in run("guard", "champion").stdout
    assert "accuracy must be at least 0.8" in told("alias", "set", "team/x", "champion", 1, code=1)
    run("guard", "team/x@best", "--max", "accuracy=1")
    assert guarded("team/x") == [(None, "champion"), ("team/x", "best")]
    assert guarded("team/x@best") == [("team/x", "best")]
    assert guarded("team/x@champion") == [(None, "champion")]
    assert [event["kind"] for event in run_json("history")["history"]] == ["guard_set"]
    run("guard", "champion", "--rm")
    assert guarded("champion") == []
    assert "not guarded" in told("guard", "champion", "--rm", code=1)


def test_a_guard_is_never_set_or_shown_for_what_was_not_meant(trained: Callable[[float], Path]) -> None:
    run("push", trained(0.7), "sentiment")
    assert "write sentiment@ALIAS" in told("guard", "sentiment", "--min", "accuracy=0.8", code=2)
    assert run_json("history")["history"] == []
    run("guard", "best", "--min", "accuracy=0.8")
    assert guarded("champion") == []
    assert "not an alias" in told("guard", "x y z", code=2)
    assert "not an alias" in told("guard", "sentiment@Best", code=2)
    assert "no adapter" in told("guard", "sentimnet@best", code=1).lower()
    for value in ("inf", "nan"):
        assert "accuracy" in told("guard", "best", "--min", f"accuracy={value}", code=2)
        said = ("--metric", "accuracy", "--value", value, "--other", 1, "--inputs", 9, "--verdict", "better")
        assert "must be a number" in told("record-comparison", "sentiment@1", "base", *said, code=2)


def test_a_home_of_nobody_is_one_line(trained: Callable[[float], Path]) -> None:
    run("push", trained(0.5), "x")
    assert "no base at ~nobody-here" in told("list", "--base", "~nobody-here/x", code=2)
    for command in (["list"], ["doctor"], ["token", "list"]):
        assert "is no path" in told(*command, "--registry", "~nobody-here/x", code=2)
    assert "There is no registry at" in told("token", "list", "--registry", "/nowhere/at/all", code=2)


def test_verify_does_not_pass_for_a_version_it_was_not_asked_to_check(trained: Callable[[float], Path]) -> None:
    run("push", trained(0.5), "x")
    assert "write x." in told("verify", "x@99", code=2)


def test_delete_asks(trained: Callable[[float], Path]) -> None:
    run("push", trained(0.5), "x")
    run("delete", "x@1", code=1)
    assert run_json("resolve", "x")["version"] == 1


def test_list_filters(trained: Callable[[float], Path], bert: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    run("push", trained(0.7), "a")
    run("push", trained(0.9), "b")
    run("push", bert.adapter, "c")
    run("tag", "b", "language=zh")

    def names(*arguments: object) -> list[str]:
        return [found["name"] for found in run_json("list", *arguments)["adapters"]]

    assert names("--metric", "accuracy>=0.8") == names("--tag", "language") == names("--tag", "language=zh") == ["b"]
    assert names("--task", "sequence-classification") == names("--base", bert.base) == ["c"]
    monkeypatch.chdir(bert.base.parent)
    assert names("--base", f"{bert.base}/") == names("--base", f"./{bert.base.name}") == ["c"]
    assert names("--base", run_json("show", "c")["manifest"]["base_fingerprint"]) == ["c"]
    assert names("--method", "lora", "--limit", 1, "--after", "a") == ["b"]
    assert "'classification' is not one of causal-lm" in told("list", "--task", "classification", code=2)
    assert "write accuracy>=0.8" in told("list", "--metric", "accuracy", code=2)


def test_export_import(trained: Callable[[float], Path], tmp_path: Path) -> None:
    digest = run_json("push", trained(0.7), "team/x", "--alias", "champion")["digest"]
    archive = tmp_path / "x.tar"
    assert run_json("export", "team/x", "--output", archive)["versions"] == 1
    other = tmp_path / "other"
    assert "1 versions imported" in run("import", archive, "--registry", other).stdout
    assert Registry.open(other).resolve("team/x@champion").digest == digest
    assert "there already" in told("export", "team/x", "--output", archive, code=2)


def test_names_complete_in_a_shell(trained: Callable[[float], Path], tmp_path: Path) -> None:
    run("push", trained(0.7), "team/sentiment", "--alias", "champion")
    run("push", trained(0.7), "team/tales")

    def completed(words: str) -> list[str]:
        environment = {
            **os.environ,
            "_REGISTRY_COMPLETE": "complete_bash",
            "COMP_WORDS": f"registry {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        code = "from adapterbay.registry.cli import app; app(prog_name='registry')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout.split()

    assert completed("show team/s") == ["team/sentiment"]
    assert completed("show team/sentiment@") == ["team/sentiment@champion", "team/sentiment@1"]
    for verb in ("rollback", "history", "verify", "export", "record-comparison x", "fuse out"):
        assert completed(f"{verb} team/s") == ["team/sentiment"], verb
    assert completed("show nothing") == []


def test_reading_verbs_speak_json(trained: Callable[[float], Path]) -> None:
    run("push", trained(0.7), "x", "--alias", "champion")
    for verb in (
        *(["list"], ["show", "x"], ["resolve", "x"], ["history", "x"], ["verify"], ["doctor"], ["tag", "x"]),
        *(["guard", "x"], ["gc", "--dry-run"], ["diff", "x", "x@champion"], ["card", "x"]),
    ):
        assert isinstance(json.loads(run(*verb, "--json").stdout), dict), verb
