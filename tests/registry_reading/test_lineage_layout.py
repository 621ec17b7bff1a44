"""The drawing: no box over another, no line through a box, everything inside of the picture."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterbay.registry.lineage import Lineage, LineageEdge, LineageNode
from adapterbay.registry.lineage_layout import Box, Layout, arrange
from adapterbay.registry.lineage_svg import LINE_WIDTH, TITLE_WIDTH, _width, to_svg

SVG = "{http://www.w3.org/2000/svg}"


def check(boxes: list[Box], edges: list[tuple[str, str]], layout: Layout, gap: float) -> None:
    heights = {box.id: box.height for box in boxes}
    for source, target in edges:
        assert layout.columns[source] < layout.columns[target]
    columns: dict[int, list[tuple[float, float]]] = {}
    for id, column in layout.columns.items():
        top = layout.middles[id] - heights[id] / 2
        assert top >= -1e-6
        assert top + heights[id] <= layout.height + 1e-6
        columns.setdefault(column, []).append((top, top + heights[id]))
    for spans in columns.values():
        for upper, lower in pairwise(sorted(spans)):
            assert lower[0] - upper[1] >= gap - 1e-6
    for (source, _), bends in layout.bends.items():
        for index, middle in enumerate(bends):
            for top, bottom in columns.get(layout.columns[source] + 1 + index, []):
                assert middle < top or middle > bottom  # the line goes between boxes


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_graph_is_drawn_without_overlap(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    boxes = [Box(str(index), data.draw(st.floats(20, 200)), data.draw(st.integers(0, 2))) for index in range(count)]
    pairs = [(str(a), str(b)) for a in range(count) for b in range(a + 1, count)]
    edges = data.draw(st.lists(st.sampled_from(pairs), max_size=20, unique=True)) if pairs else []
    pulled = frozenset(data.draw(st.sets(st.sampled_from([box.id for box in boxes]))))
    level = frozenset(data.draw(st.sets(st.sampled_from(edges)))) if edges else frozenset()
    layout = arrange(boxes, edges, pulled=pulled, level=level, gap=16.0)
    check(boxes, edges, layout, 16.0)


def test_a_chain_is_level_and_a_cycle_is_refused() -> None:
    boxes = [Box(str(index), 50.0) for index in range(6)]
    edges = [(str(index), str(index + 1)) for index in range(5)]
    layout = arrange(boxes, edges)
    assert len(set(layout.middles.values())) == 1
    assert [layout.columns[str(index)] for index in range(6)] == list(range(6))
    with pytest.raises(ValueError, match="cycle"):
        arrange(boxes, [*edges, ("5", "0")])


def test_two_rows_do_not_cross() -> None:
    boxes = [Box(name, 40.0) for name in "abcd"]
    layout = arrange(boxes, [("a", "d"), ("b", "c")])
    assert (layout.middles["a"] < layout.middles["b"]) == (layout.middles["d"] < layout.middles["c"])


def fusion(parents: int) -> Lineage:
    base = LineageNode(
        "base:1", "base", "hub:organization/a-base-with-a-long-name-Instruct@0123456789", {"fingerprint": ""}
    )
    root = LineageNode("root", "version", "team/fused@1", {"fusion": {"method": "ties", "density": 0.5}, "rank": 8})
    nodes, edges = [root, base], [LineageEdge("base:1", "root", "base")]
    for index in range(parents):
        digest = "sha256:" + hashlib.sha256(str(index).encode()).hexdigest()
        facts = {
            "digest": digest,
            "method": "LORA",
            "rank": 8,
            "alpha": 16,
            "task": "sequence-classification",
            "seed": 0,
            "settings": {"optimization": {"learning_rate": 0.0005, "epochs": 3.0}},
            "metrics": {"accuracy": 0.81666, "macro_f1": 0.8158, "eval_loss": 0.3},
        }
        source = f"organization/a-data-set-with-a-long-name-{index}"
        nodes += [
            LineageNode(digest, "version", f"team/WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW-{index}@{index + 1}", facts),
            LineageNode(f"data:{index}", "data", source, {"source": source, "train_rows": 25_000, "eval_rows": 25_000}),
        ]
        edges += [
            LineageEdge("base:1", digest, "base"),
            LineageEdge(f"data:{index}", digest, "data"),
            LineageEdge(digest, "root", "parent", 1 / 3),
        ]
    return Lineage("root", tuple(nodes), tuple(edges))


@pytest.mark.parametrize("parents", [1, 2, 8, 20])
def test_a_fusion_of_many(parents: int) -> None:
    picture = ElementTree.fromstring(to_svg(fusion(parents)))
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    rects = [group.find(f"{SVG}rect") for group in picture.iter(f"{SVG}g")]
    spots = [
        tuple(float(rect.attrib[key]) for key in ("x", "y", "width", "height")) for rect in rects if rect is not None
    ]
    assert len(spots) == 2 + 2 * parents
    for index, (x, y, w, h) in enumerate(spots):
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        for a, b, c, d in spots[:index]:
            assert x + w <= a or a + c <= x or y + h <= b or b + d <= y
    for group in picture.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        bottom = float(rect.attrib["y"]) + float(rect.attrib["height"])
        for text in group.iter(f"{SVG}text"):
            assert float(text.attrib["y"]) < bottom
            assert _width(text.text or "") <= (TITLE_WIDTH if text.attrib["class"] == "t" else LINE_WIDTH)


def test_lines_end_at_different_places() -> None:
    picture = ElementTree.fromstring(to_svg(fusion(8)))
    ends = [
        re.findall(r"[\d.]+ [\d.]+", path.attrib["d"])[-1]
        for path in picture.iter(f"{SVG}path")
        if "url(#arrow-parent)" in path.attrib.get("marker-end", "")
    ]
    assert len(set(ends)) == 8
