"""A lineage as a picture: SVG that needs nothing but a browser."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from adapterbay.registry.card_text import figure
from adapterbay.registry.lineage import Lineage, LineageEdge, LineageNode
from adapterbay.registry.lineage_layout import Box, Layout, arrange
from adapterbay.registry.lineage_text import node_lines
from adapterbay.registry.markdown import plain_text

BOX_WIDTH: Final = 292.0
COLUMN_GAP: Final = 88.0
ROW_GAP: Final = 20.0
MARGIN: Final = 28.0
HEADING: Final = 40.0
TITLE_HEIGHT: Final = 44.0
LINE_HEIGHT: Final = 17.0
PADDING: Final = 12.0
TITLE_WIDTH: Final = 27.0
LINE_WIDTH: Final = 35.0
"""What fits into a box at 14 px bold and 12 px, in letters of common width; measured with DejaVu Sans, a wide one."""

_NARROW: Final = frozenset("ijlftrI.,:;'|!()[]/- ")
_BROAD: Final = frozenset("mwMW@%…×")

_COLORS: Final = {
    "version": ("#4338ca", "#eef2ff", "adapter"),
    "fusion": ("#7e22ce", "#faf5ff", "fusion"),
    "unknown": ("#b45309", "#fffbeb", "unknown parent"),
    "base": ("#334155", "#f1f5f9", "base"),
    "data": ("#047857", "#ecfdf5", "training data"),
}
_EDGES: Final = {"parent": ("#4338ca", ""), "data": ("#047857", ""), "base": ("#64748b", ' stroke-dasharray="5 4"')}
_KIND_ORDER: Final = {"data": 0, "version": 1, "unknown": 1, "base": 2}
_STYLE: Final = (
    "text{font-family:ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:#0f172a}"
    ".h{font-size:18px;font-weight:600}.k{font-size:10.5px;letter-spacing:.06em;font-weight:600}"
    ".t{font-size:14px;font-weight:600}.l{font-size:12px;fill:#334155}"
    ".m{font-size:11.5px;fill:#475569;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}"
    ".w{font-size:12px;font-weight:600;paint-order:stroke;stroke:#fff;stroke-width:5px;stroke-linejoin:round}"
)


def to_svg(graph: Lineage) -> str:
    """The picture. Sources stand on the left, the version itself on the right; widths and heights are in px.

    A base is joined to the versions that no parent of theirs joins to it, so that lines stay few.
    """
    edges = visible_edges(graph)
    texts = {node.id: _texts(node, root=node.id == graph.root) for node in graph.nodes}
    boxes = [
        Box(node.id, TITLE_HEIGHT + LINE_HEIGHT * len(texts[node.id][1:]) + PADDING, _KIND_ORDER[node.kind])
        for node in graph.nodes
    ]
    pulled = frozenset(node.id for node in graph.nodes if node.kind != "version")
    level = frozenset((edge.source, edge.target) for edge in edges if edge.kind == "parent")
    links = [(edge.source, edge.target) for edge in edges]
    layout = arrange(boxes, links, pulled=pulled, level=level, gap=ROW_GAP)
    heights = {box.id: box.height for box in boxes}
    columns = max(layout.columns.values(), default=0) + 1
    title = f"Lineage of {_cut_front(graph.node(graph.root).title, 60)}"
    # The heading is about 12 px a letter.
    width = max(columns * BOX_WIDTH + (columns - 1) * COLUMN_GAP, 12.0 * _width(title)) + 2 * MARGIN
    height = layout.height + 2 * MARGIN + HEADING
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label={quoteattr(title)}>',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        *_markers(),
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text class="h" x="{MARGIN:.0f}" y="{MARGIN + 14:.0f}">{escape(title)}</text>',
        *_lines(edges, layout, heights),
        *(_box(node, texts[node.id], layout, heights[node.id], graph.root) for node in graph.nodes),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def visible_edges(graph: Lineage) -> list[LineageEdge]:
    """The edges to draw: without those to a base that a parent, on the same base, has already."""
    bases = {edge.target: edge.source for edge in graph.edges if edge.kind == "base"}
    inherited = {
        edge.target
        for edge in graph.edges
        if edge.kind == "parent" and bases.get(edge.source) == bases.get(edge.target)
    }
    return [edge for edge in graph.edges if edge.kind != "base" or edge.target not in inherited]


def _kind(node: LineageNode) -> str:
    return "fusion" if node.kind == "version" and "fusion" in node.details else node.kind


def _texts(node: LineageNode, *, root: bool) -> list[str]:
    """The title, and the lines below it, wrapped to the width of a box. Libraries are said of the root alone."""
    title, *lines = [line for line in node_lines(node, libraries=root) if line]
    return [_cut_front(title, TITLE_WIDTH), *(part for line in lines for part in _wrapped(line))]


def _wrapped(line: str) -> list[str]:
    """At most two lines, broken after a comma or else at a space."""
    for separator in (", ", " "):
        words = line.split(separator)
        first = ""
        for count in range(1, len(words) + 1):
            begin = separator.join(words[:count])
            if _width(begin) > LINE_WIDTH:
                break
            first = begin
        if first == line:
            return [line]
        if first:
            return [f"{first}{separator}".rstrip(), _cut(line[len(first) + len(separator) :], LINE_WIDTH)]
    return [_cut(line, LINE_WIDTH)]


def _width(text: str) -> float:
    """In letters of a common width; Chinese, Japanese and Korean ones take more room."""
    total = 0.0
    for sign in text:
        if sign in _NARROW:
            total += 0.6
        elif sign in _BROAD:
            total += 1.5
        elif unicodedata.east_asian_width(sign) in "WF":
            total += 1.7
        else:
            total += 1.15 if sign.isupper() else 1.0
    return total


def _cut(text: str, width: float) -> str:
    text = _xml(text)
    if _width(text) <= width:
        return text
    while text and _width(text) > width - 1.5:
        text = text[:-1]
    return f"{text}…"


def _cut_front(text: str, width: float) -> str:
    """A name, a path or a repository is known by its end."""
    text = _xml(text)
    if _width(text) <= width:
        return text
    while text and _width(text) > width - 1.5:
        text = text[1:]
    return f"…{text}"


def _xml(text: str) -> str:
    """Without what XML 1.0 does not allow even escaped."""
    return "".join(sign for sign in plain_text(text, 400) if sign not in "\ufffe\uffff")


def _x(layout: Layout, id: str) -> float:
    return MARGIN + layout.columns[id] * (BOX_WIDTH + COLUMN_GAP)


def _y(middle: float) -> float:
    return middle + MARGIN + HEADING


def _markers() -> list[str]:
    return [
        "<defs>",
        *(
            f'<marker id="arrow-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
            for kind, (color, _) in _EDGES.items()
        ),
        "</defs>",
    ]


def _lines(edges: Sequence[LineageEdge], layout: Layout, heights: dict[str, float]) -> list[str]:
    """Curves behind the boxes; those that end at one box arrive at even distances over its left side."""
    entries = _entries(edges, layout, heights)
    leaving = Counter(edge.source for edge in edges)
    drawn: list[str] = []
    labels: list[str] = []
    for edge in edges:
        color, dashes = _EDGES[edge.kind]
        points = _points(edge, layout, entries[edge.source, edge.target])
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}" + "".join(
            _curve(left, right) for left, right in itertools.pairwise(points)
        )
        drawn.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-opacity="0.75"{dashes} '
            f'marker-end="url(#arrow-{edge.kind})"/>'
        )
        if edge.weight is not None:
            x, y = points[0]
            if leaving[edge.source] > 1:
                # A quarter along the curve, (points[1] − y) · (3·¾·¼² + ¼³): where it has left the others.
                y += (points[1][1] - y) * 0.15625
            labels.append(f'<text class="w" x="{x + 8:.1f}" y="{y - 6:.1f}">× {escape(figure(edge.weight))}</text>')
    return [*drawn, *labels]


def _entries(edges: Sequence[LineageEdge], layout: Layout, heights: dict[str, float]) -> dict[tuple[str, str], float]:
    """Where each edge meets its target, vertically: in the order of where the edges come from."""
    arriving: dict[str, list[tuple[float, str]]] = {}
    for edge in edges:
        bends = layout.bends[edge.source, edge.target]
        arriving.setdefault(edge.target, []).append((bends[-1] if bends else layout.middles[edge.source], edge.source))
    found: dict[tuple[str, str], float] = {}
    for target, sources in arriving.items():
        span = min(heights[target] - 24.0, 22.0 * (len(sources) - 1))
        for index, (_, source) in enumerate(sorted(sources)):
            share = index / (len(sources) - 1) - 0.5 if len(sources) > 1 else 0.0
            found[source, target] = layout.middles[target] + share * span
    return found


def _points(edge: LineageEdge, layout: Layout, entry: float) -> list[tuple[float, float]]:
    """From the right side of the source through the columns it passes to the left side of the target."""
    points = [(_x(layout, edge.source) + BOX_WIDTH, _y(layout.middles[edge.source]))]
    first = layout.columns[edge.source] + 1
    for index, middle in enumerate(layout.bends[edge.source, edge.target]):
        x = MARGIN + (first + index) * (BOX_WIDTH + COLUMN_GAP)
        points += [(x, _y(middle)), (x + BOX_WIDTH, _y(middle))]
    return [*points, (_x(layout, edge.target) - 1.0, _y(entry))]


def _curve(left: tuple[float, float], right: tuple[float, float]) -> str:
    bend = (right[0] - left[0]) / 2
    return f" C{left[0] + bend:.1f} {left[1]:.1f} {right[0] - bend:.1f} {right[1]:.1f} {right[0]:.1f} {right[1]:.1f}"


def _box(node: LineageNode, texts: Sequence[str], layout: Layout, height: float, root: str) -> str:
    color, fill, label = _COLORS[_kind(node)]
    x, top = _x(layout, node.id), _y(layout.middles[node.id]) - height / 2
    border = 2.6 if node.id == root else 1.2
    dashes = ' stroke-dasharray="6 4"' if node.kind == "unknown" else ""
    lines = [
        f"<g><title>{escape(_xml(' | '.join([*node_lines(node), node.id])))}</title>",
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{BOX_WIDTH:.0f}" height="{height:.1f}" rx="8" fill="{fill}" '
        f'stroke="{color}" stroke-width="{border}"{dashes}/>',
        f'<text class="k" x="{x + 14:.1f}" y="{top + 18:.1f}" style="fill:{color}">{label.upper()}</text>',
        f'<text class="t" x="{x + 14:.1f}" y="{top + 36:.1f}">{escape(texts[0])}</text>',
    ]
    for index, line in enumerate(texts[1:]):
        style = "m" if line.startswith("sha256:") else "l"
        y = top + TITLE_HEIGHT + 11 + index * LINE_HEIGHT
        lines.append(f'<text class="{style}" x="{x + 14:.1f}" y="{y:.1f}">{escape(line)}</text>')
    return "".join([*lines, "</g>"])
