"""A lineage in words: lines for a terminal, and a graph in the DOT language of Graphviz."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from adapterbay.registry.card_text import figure, flattened
from adapterbay.registry.lineage import EdgeKind, Lineage, LineageEdge, LineageNode, short
from adapterbay.registry.markdown import plain_text

MAX_LINE: Final = 100
_SHOWN_METRICS: Final = 3
_CODE: Final = ("adapterbay", "peft", "torch")


def tree_lines(graph: Lineage) -> list[str]:
    """The root, and below it what it was made from. What appears twice is described once."""
    root = graph.node(graph.root)
    lines = [f"{plain_text(root.title, 300)}  {root.id}"]
    _branches(graph, root, "", lines, {root.id})
    if graph.children:
        lines.append("made from it:")
        lines += [f"  {name}@{version}  {short(digest)}" for name, version, digest in graph.children]
    return lines


def _branches(graph: Lineage, node: LineageNode, indent: str, lines: list[str], seen: set[str], base: str = "") -> None:
    """`base` is that of the version below, which need not be said again."""
    entries: list[tuple[str, LineageNode | None]] = []
    if node.kind == "version":
        entries += [(line, None) for line in version_lines(node)[2:]]
    kinds: tuple[EdgeKind, ...] = ("base", "data", "parent")
    own = base
    for kind in kinds:
        for above, edge in graph.above(node.id, kind):
            if kind == "base":
                own = above.id
                if own == base:
                    continue
            entries.append((_branch(kind, above, edge), above if kind == "parent" else None))
    for index, (text, above_here) in enumerate(entries):
        last = index == len(entries) - 1
        repeated = above_here is not None and above_here.id in seen and above_here.kind == "version"
        lines.append(f"{indent}{'└─' if last else '├─'} {text}{'  (described above)' if repeated else ''}")
        if above_here is not None and not repeated:
            seen.add(above_here.id)
            _branches(graph, above_here, indent + ("   " if last else "│  "), lines, seen, own)


def _branch(kind: EdgeKind, above: LineageNode, edge: LineageEdge) -> str:
    weight = f" × {figure(edge.weight)}" if edge.weight is not None else ""
    digest = short(_digest(above))
    more = [digest] if digest != above.title else []
    if above.kind == "data" and (rows := _rows(above.details)):
        more.append(rows)
    if above.kind == "unknown":
        more.append(f"({above.details['why']})")
    return f"{kind}{weight}: {'  '.join(plain_text(part, 300) for part in (above.title, *more))}"


def node_lines(node: LineageNode, *, libraries: bool = True) -> list[str]:
    """A node in a few lines, its title first: what a box of a picture holds."""
    if node.kind == "version":
        return version_lines(node, libraries=libraries)
    if node.kind == "unknown":
        return [node.title, "not known here"] if node.title.startswith("sha256:") else [node.title, short(node.id)]
    rows = _rows(node.details)
    return [node.title, short(_digest(node)), *([rows] if rows else [])]


def version_lines(node: LineageNode, *, libraries: bool = True) -> list[str]:
    """Title, digest, method, settings, metrics and code of a version; what is not recorded is left out."""
    details = node.details
    method = "LoRA" if details.get("method") == "LORA" else str(details.get("method"))
    alpha = f", alpha {figure(details['alpha'])}" if details.get("alpha") is not None else ""
    rank = f" rank {details['rank']}" if details.get("rank") else ""
    lines = [node.title, short(node.id), f"{method}{rank}{alpha}, {details.get('task')}"]
    fusion = details.get("fusion")
    if isinstance(fusion, Mapping):
        kept = {key: value for key, value in fusion.items() if key not in ("parents", "weights", "method")}
        settings = ", ".join(f"{key} {value}" for key, value in flattened(kept))
        lines.append(f"fusion by {plain_text(fusion.get('method'), 40)}" + (f", {settings}" if settings else ""))
    code = _code(details) if libraries else ""
    lines += [line for line in (_settings(details), _metrics(details), code) if line]
    return [plain_text(line, MAX_LINE) for line in lines]


def _settings(details: Mapping[str, Any]) -> str:
    found = details.get("settings")
    settings = found if isinstance(found, Mapping) else {}
    part = settings.get("optimization")
    optimization = part if isinstance(part, Mapping) else {}
    facts = [
        ("seed", details.get("seed")),
        ("learning rate", optimization.get("learning_rate")),
        ("epochs", optimization.get("epochs")),
        ("steps", optimization.get("max_steps")),
    ]
    return ", ".join(f"{name} {figure(value)}" for name, value in facts if value is not None)


def _metrics(details: Mapping[str, Any]) -> str:
    found = details.get("metrics")
    if not isinstance(found, Mapping):
        return ""
    # What the adapter reached, before figures of its base and of its training.
    names = sorted(found, key=lambda name: (str(name).startswith(("base_", "train_", "majority_")), str(name)))
    return ", ".join(f"{name} {figure(found[name])}" for name in names[:_SHOWN_METRICS])


def _code(details: Mapping[str, Any]) -> str:
    found = details.get("libraries")
    libraries = found if isinstance(found, Mapping) else {}
    parts = [f"{name} {libraries[name]}" for name in _CODE if name in libraries]
    if details.get("code_version"):
        parts.insert(0, f"code {details['code_version']}")
    return ", ".join(parts)


def _rows(details: Mapping[str, Any]) -> str:
    counts = [(details.get("train_rows"), "training"), (details.get("eval_rows"), "held out")]
    return ", ".join(f"{count} {what}" for count, what in counts if isinstance(count, int))


def _digest(node: LineageNode) -> str:
    return str(node.details.get("fingerprint") or node.details.get("digest") or "")


_DOT_STYLE: Final = {
    "version": 'style="rounded,filled", fillcolor="#eef2ff", color="#4f46e5"',
    "unknown": 'style="rounded,dashed", color="#b45309"',
    "base": 'style="rounded,filled", fillcolor="#f1f5f9", color="#475569"',
    "data": 'style="rounded,filled", fillcolor="#ecfdf5", color="#047857"',
}


def to_dot(graph: Lineage) -> str:
    """The graph in DOT (https://graphviz.org/doc/info/lang.html), for `dot -Tsvg` and others."""
    lines = [
        "digraph lineage {",
        "  rankdir=LR;",
        '  node [shape=box, fontname="Helvetica", fontsize=11];',
        '  edge [fontname="Helvetica", fontsize=10, color="#64748b"];',
    ]
    for node in graph.nodes:
        label = "\\n".join(_dot_escaped(line) for line in node_lines(node) if line)
        bold = ", penwidth=2" if node.id == graph.root else ""
        lines.append(f'  "{_dot_escaped(node.id)}" [label="{label}", {_DOT_STYLE[node.kind]}{bold}];')
    for edge in graph.edges:
        label = f' [label="{_dot_escaped(figure(edge.weight))}"]' if edge.weight is not None else ""
        dashed = " [style=dashed]" if edge.kind == "base" else label
        lines.append(f'  "{_dot_escaped(edge.source)}" -> "{_dot_escaped(edge.target)}"{dashed};')
    return "\n".join([*lines, "}"]) + "\n"


def _dot_escaped(text: str) -> str:
    """Inside of double quotes: backslashes begin escapes such as \\n and \\N there."""
    return plain_text(text, 400).replace("\\", "\\\\").replace('"', '\\"')
