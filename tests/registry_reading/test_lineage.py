"""The graph above a version, read from a real registry, and what is made of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny import make_adapter

from adapterbay.registry import Registry
from adapterbay.registry.cli import reading
from adapterbay.registry.errors import InvalidArgument, NotFound
from adapterbay.registry.lineage import Lineage, LineageEdge, LineageNode, lineage, recorded_parents
from adapterbay.registry.lineage_svg import to_svg, visible_edges
from adapterbay.registry.lineage_text import to_dot, tree_lines

UNKNOWN = "sha256:" + "9" * 64

Push = Callable[..., str]


@pytest.fixture
def push(bases: dict[str, Path], tmp_path: Path, registry: Registry) -> Push:
    """Pushes the same small adapter with another training record; gives the digest."""
    folder = make_adapter(bases["llama"], tmp_path / "a", targets=["q_proj"], rank=2)

    def one(name: str, training: dict[str, Any] | None = None, parents: Sequence[str] = ()) -> str:
        record = {"note": name, **(training or {})}
        (folder / "training.json").write_text(json.dumps(record))
        return registry.push(folder, name, base=f"folder:{bases['llama']}", parents=parents).digest

    return one


def data(name: str) -> dict[str, Any]:
    return {"data": {"source": name, "digest": "sha256:" + name[-1] * 64, "train_rows": 80, "eval_rows": 20}}


def test_a_version_its_base_and_its_data(push: Push, registry: Registry) -> None:
    record = {
        **data("/home/me/reviews-a"),
        "seed": 7,
        "settings": {"optimization": {"learning_rate": 0.0005, "epochs": 3.0, "max_steps": None}},
        "metrics": {"accuracy": 0.8166, "base_loss": 1.0, "eval_loss": 0.4},
        "versions": {"adapterbay": "0.1.0", "peft": "0.21.2", "torch": "2.13.0"},
        "code_version": "abc123",
    }
    digest = push("team/x", record)
    graph = lineage(registry, "team/x")
    manifest = registry.manifest(digest)
    assert graph.root == digest
    assert [(node.kind, node.title) for node in graph.nodes] == [
        ("version", "team/x@1"),
        ("base", "folder:…/llama"),
        ("data", "…/reviews-a"),
    ]
    assert [(edge.source, edge.target, edge.kind) for edge in graph.edges] == [
        (f"base:{manifest.base_fingerprint}", digest, "base"),
        ("data:sha256:" + "a" * 64, digest, "data"),
    ]
    details = graph.node(digest).details
    assert (details["seed"], details["metrics"]["accuracy"], details["rank"]) == (7, 0.8166, 2)
    assert graph.node(f"base:{manifest.base_fingerprint}").details["reference"] == manifest.base_reference
    lines = tree_lines(graph)
    assert lines[0] == f"team/x@1  {digest}"
    assert "├─ seed 7, learning rate 0.0005, epochs 3" in lines
    assert "├─ accuracy 0.8166, eval_loss 0.4, base_loss 1" in lines
    assert "├─ code abc123, adapterbay 0.1.0, peft 0.21.2, torch 2.13.0" in lines
    assert lines[-1] == "└─ data: …/reviews-a  sha256:aaaaaaaaaaaa…  80 training, 20 held out"


def test_parents_of_parents_and_children(push: Push, registry: Registry) -> None:
    first = push("team/chat", data("day-1"))
    second = push("team/chat", data("day-2"), [first])
    third = push("team/chat", data("day-3"), [second])
    graph = lineage(registry, "team/chat@3")
    assert [edge.source for edge in graph.edges if edge.kind == "parent"] == [second, first]
    assert {node.title for node in graph.nodes if node.kind == "version"} == {f"team/chat@{n}" for n in (1, 2, 3)}
    assert lineage(registry, "team/chat@1").children == (("team/chat", 2, second),)
    assert f"  team/chat@3  {third[:19]}…" in tree_lines(lineage(registry, f"team/chat@{second}"))
    # One base: said once, drawn to the first alone.
    assert sum("base:" in line for line in tree_lines(graph)) == 1
    assert [edge.target for edge in visible_edges(graph) if edge.kind == "base"] == [first]


def test_a_fusion_has_weights(push: Push, registry: Registry) -> None:
    parents = [push(name, data("shared-1")) for name in ("a", "b")]
    fusion = {"fusion": {"method": "ties", "density": 0.5, "parents": parents, "weights": [0.7, -0.3]}}
    root = push("out", fusion, parents)
    graph = lineage(registry, "out")
    assert [(node.title, edge.weight) for node, edge in graph.above(root, "parent")] == [("a@1", 0.7), ("b@1", -0.3)]
    lines = "\n".join(tree_lines(graph))
    assert "fusion by ties, density 0.5" in lines
    assert "parent × 0.7: a@1" in lines
    assert "parent × -0.3: b@1" in lines
    assert sum(node.kind == "data" for node in graph.nodes) == 1  # the same digest is the same data


def test_a_parent_that_is_not_here(push: Push, registry: Registry) -> None:
    push("x", parents=[UNKNOWN])
    graph = lineage(registry, "x")
    node = graph.node(UNKNOWN)
    assert (node.kind, node.title) == ("unknown", "sha256:999999999999…")
    assert "parent: sha256:999999999999…  (it is not in this registry)" in tree_lines(graph)[-1]
    assert "UNKNOWN PARENT" in to_svg(graph)


def test_a_parent_that_was_deleted(push: Push, registry: Registry) -> None:
    first = push("x")
    push("x", {"second": 2}, [first])
    registry.delete("x", 1, "bad data")
    node = lineage(registry, "x@2").node(first)
    assert node.kind == "unknown"
    assert "deleted" in node.details["why"]


def test_an_ancestor_of_both_sides_is_described_once(push: Push, registry: Registry) -> None:
    first = push("a")
    left, right = push("b", parents=[first]), push("c", parents=[first])
    push("d", parents=[left, right])
    graph = lineage(registry, "d")
    assert len([node for node in graph.nodes if node.kind == "version"]) == 4
    lines = tree_lines(graph)
    assert sum("a@1" in line for line in lines) == 2
    assert sum("(described above)" in line for line in lines) == 1


def test_it_is_bounded(push: Push, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterbay.registry.lineage.MAX_VERSIONS", 3)
    digest = push("x")
    for index in range(6):
        digest = push("x", {"index": index}, [digest])
    graph = lineage(registry, "x")
    assert [node.kind for node in graph.nodes if node.kind != "base"] == ["version"] * 3 + ["unknown"]
    assert "its ancestors were not followed" in tree_lines(graph)[-1]


def test_the_content_under_another_name_is_found(push: Push, registry: Registry, tmp_path: Path) -> None:
    first = push("a")
    second = push("b", parents=[first])
    other = Registry.open(tmp_path / "other")
    for name, digest in (("elsewhere/x", first), ("elsewhere/y", second)):
        folder = registry.pull(f"{'a' if digest == first else 'b'}@{digest}", tmp_path / name.replace("/", "-"))
        assert other.push(folder, name).digest == digest
    assert lineage(other, "elsewhere/y").node(first).title == "elsewhere/x@1"


def test_what_is_not_there(registry: Registry) -> None:
    with pytest.raises(NotFound):
        lineage(registry, "nobody")


def test_recorded_parents() -> None:
    assert recorded_parents({"parents": [UNKNOWN, "x", 3, UNKNOWN]}) == (UNKNOWN,)
    assert recorded_parents({"parents": UNKNOWN}) == ()
    assert recorded_parents(None) == ()


# DOT and SVG

HOSTILE = 'a "quoted" \\N \\" <b>&amp;</b> ]]> -->\x00\x1b[31m\u202e\nnew "line'


def hostile() -> Lineage:
    nodes = (
        LineageNode(
            "sha256:1", "version", HOSTILE, {"digest": "sha256:1", "method": HOSTILE, "rank": 1, "task": HOSTILE}
        ),
        LineageNode(f"base:{HOSTILE}", "base", HOSTILE, {"fingerprint": HOSTILE}),
        LineageNode(f"data:{HOSTILE}", "data", HOSTILE, {"source": HOSTILE, "train_rows": 1}),
        LineageNode("sha256:2", "unknown", HOSTILE, {"digest": "sha256:2", "why": HOSTILE}),
    )
    edges = (
        LineageEdge(f"base:{HOSTILE}", "sha256:1", "base"),
        LineageEdge(f"data:{HOSTILE}", "sha256:1", "data"),
        LineageEdge("sha256:2", "sha256:1", "parent", 0.5),
    )
    return Lineage("sha256:1", nodes, edges)


_STRING = r'"(?:[^"\\]|\\.)*"'
_DOT_LINE = re.compile(rf"  (?:{_STRING}(?: -> {_STRING})?|node|edge)(?: \[(?:\w+=(?:{_STRING}|[\w.]+)(?:, )?)+\])?;")


def test_dot_cannot_be_broken_out_of() -> None:
    first, *lines, last = to_dot(hostile()).splitlines()
    assert (first, last) == ("digraph lineage {", "}")
    assert lines[0] == "  rankdir=LR;"
    for line in lines[1:]:
        assert _DOT_LINE.fullmatch(line), line
    assert len(lines) == 3 + 4 + 3
    # `\N` would be the node's name, `\"` the end of nothing: both are literal.
    assert r"\\N \\\"" in lines[3]


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_it(tmp_path: Path) -> None:
    done = subprocess.run(["dot", "-Tjson"], input=to_dot(hostile()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["objects"]) == 4
    assert len(found["edges"]) == 3


def test_svg_cannot_be_broken_out_of() -> None:
    root = ElementTree.fromstring(to_svg(hostile()))
    tags = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in root.iter()}
    assert tags == {"svg", "title", "style", "defs", "marker", "path", "rect", "text", "g"}
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "× 0.5" in texts
    assert any("<b>" in text for text in texts)


def test_the_tree_has_one_line_for_each_fact() -> None:
    assert not [line for line in tree_lines(hostile()) if re.search(r"[\x00-\x1f\u202e]", line)]


# For `registry show`


def test_show(push: Push, registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    digest = push("x", data("d-1"))
    reading.show_lineage(registry, "x")
    assert capsys.readouterr().out.startswith(f"x@1  {digest}\n├─ ")
    reading.show_lineage(registry, "x", dot=True)
    assert capsys.readouterr().out.startswith("digraph lineage {")
    reading.show_lineage(registry, "x", svg=True)
    ElementTree.fromstring(capsys.readouterr().out)
    reading.show_lineage(registry, "x", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["root"] == digest
    assert {node["kind"] for node in found["nodes"]} == {"version", "base", "data"}
    with pytest.raises(InvalidArgument, match="Choose one"):
        reading.show_lineage(registry, "x", dot=True, svg=True)
