"""What `fuse` is told, what it costs, and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fuse_tools import Bench
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adapterbay.registry.cli import app, fusing
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.fusing import FusionSettings, WeightedReference, find_fuser, parse_weighted
from adapterbay.registry.gate import Guard

assert fusing  # its command is in `app` once it is imported


def test_the_base_costs_no_memory(bench: Bench, tmp_path: Path) -> None:
    """Two embeddings of 4 GB are asked for and never touched; the process stays below 1.5 GB."""
    bench.add("a", targets=["q_proj"])
    bench.add("b", targets=["q_proj"])
    folder = tmp_path / "wide"
    folder.mkdir()
    config = json.loads((bench.base / "config.json").read_text()) | {"vocab_size": 32_000_000}
    (folder / "config.json").write_text(json.dumps(config))
    code = f"""
import resource
from pathlib import Path
from adapterbay.registry.base import BaseFiles, BaseReference
from adapterbay.registry.fusing import FusionSettings, find_fuser
import json
folder = Path({str(folder)!r})
files = BaseFiles(BaseReference("folder", str(folder)), folder, json.loads((folder / "config.json").read_text()))
folders = {[str(bench.folders[name]) for name in "ab"]!r}
parts = [{{path.name: path for path in Path(name).iterdir()}} for name in folders]
out = folder / "out"
out.mkdir()
find_fuser()(files, "causal-lm", parts, [0.5, 0.5], FusionSettings("cat"), out)
assert (out / "adapter_model.safetensors").is_file()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1_500_000  # kB
    assert done.stderr == ""  # nothing of the libraries' inside


def test_the_fuser_is_found_by_its_entry_point() -> None:
    assert find_fuser().__module__ == "adapterbay.base.fuse"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"method": "average"}, "method"),
        ({"method": "cat", "density": 0.5}, "density"),
        ({"method": "cat", "rank": 4}, "rank"),
        ({"method": "ties", "seed": 1}, "seed"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.5}, "density"),
        ({"method": "ties", "density": float("nan")}, "density"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"method": "dare_ties", "seed": -1}, "seed"),
        ({"method": "dare_linear", "majority_sign": "total"}, "majority_sign"),
        ({"method": "ties", "majority_sign": "most"}, "majority_sign"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        FusionSettings(**settings)
    assert error.value.field == field


DIGEST = "sha256:" + "1" * 64


@pytest.mark.parametrize(
    ("text", "reference", "weight"),
    [
        ("a:1", "a", 1.0),
        ("team/a@3:0.25", "team/a@3", 0.25),
        ("a@champion:-1.5e-1", "a@champion", -0.15),
        (f"a@{DIGEST}:.5", f"a@{DIGEST}", 0.5),
        ("hub:org/repo@v2:2", "hub:org/repo@v2", 2.0),
    ],
)
def test_weighted_references(text: str, reference: str, weight: float) -> None:
    assert parse_weighted(text) == WeightedReference(reference, weight)


@pytest.mark.parametrize(
    "text",
    ["a", "a@1", f"a@{DIGEST}", "hub:org/repo", "a:", ":1", "a:one", "a:nan", "a:1_0", "a: 1", "", "a:1:", "a:--1"],
)
def test_a_missing_weight_shows_the_form(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"write REF:WEIGHT, such as team/a@1:0\.7"):
        parse_weighted(text)


@pytest.mark.parametrize("text", ["a:0", "a:-0.0", "a:1e999"])
def test_weights_are_finite_and_not_zero(text: str) -> None:
    with pytest.raises(InvalidArgument, match="finite and not 0"):
        parse_weighted(text)


@given(weight=st.floats(allow_nan=False, allow_infinity=False).filter(bool))
def test_printing_and_parsing_are_inverse(weight: float) -> None:
    for reference in ("a@2", f"a/b@{DIGEST}", "hub:o/r@v1"):
        assert parse_weighted(str(WeightedReference(reference, weight))) == WeightedReference(reference, weight)


# The command


def test_the_command(pair: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(pair.registry.root))
    arguments = [
        "fuse",
        "team/both",
        "a@1:0.7",
        f"b@{pair.registry.resolve('b').digest}:-0.3",
        "--method",
        "dare_linear",
    ]
    done = CliRunner().invoke(app, [*arguments, "--seed", "3", "--alias", "champion"])
    assert done.exit_code == 0, done.output
    assert "pushed team/both@1 sha256:" in done.stdout
    assert pair.registry.aliases("team/both") == {"champion": 1}
    done = CliRunner().invoke(app, [*arguments, "--seed", "3", "--json"])
    assert done.stdout.count("\n") == 1
    receipt = json.loads(done.stdout)
    assert receipt["same_as"] == 1
    assert receipt["manifest"]["training"]["fusion"]["weights"] == [0.7, -0.3]
    pair.registry.guard("team/both", "champion", Guard(minimum={"accuracy": 0.8}))
    refused = CliRunner().invoke(app, [*arguments, "--alias", "champion"])
    assert refused.exit_code == 1
    assert "--force with --why" in refused.stderr
    forced = CliRunner().invoke(app, [*arguments, "--alias", "champion", "--force", "--why", "a demo"])
    assert forced.exit_code == 0, forced.output
    assert pair.registry.history("team/both")[-1].detail["forced"] == "a demo"
    for wrong, message in (
        (["fuse", "out", "a", "b:1"], "'a' has no weight"),
        (["fuse", "out", "a:1", "b:1", "--method", "mean"], "'mean' is not a method"),
        (["fuse", "out", "a:1", "b:1", "--density", "0.5"], "The method cat has no density"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr
