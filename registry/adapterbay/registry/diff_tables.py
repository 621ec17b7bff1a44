"""A comparison of two versions for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from adapterbay.registry.card_text import figure
from adapterbay.registry.diff import Change, VersionDiff, WeightDistance
from adapterbay.registry.markdown import plain_text

MAX_VALUE: Final = 100
_SIDES: Final = {"a": "only in A", "b": "only in B"}


def change_table(diff: VersionDiff, a: str, b: str) -> Table | None:
    """Everything that the two versions say differently of themselves; None if there is nothing."""
    groups = (("", diff.facts), ("config", diff.config), ("training", diff.training))
    rows = [(group, change) for group, changes in groups for change in changes]
    if not rows:
        return None
    table = Table("", "Setting", escape(f"A: {a}"), escape(f"B: {b}"))
    for group, change in rows:
        table.add_row(group, *_change_cells(change))
    return table


def metric_table(diff: VersionDiff) -> Table | None:
    """One row per metric; None if neither side has any."""
    if not diff.metrics:
        return None
    table = Table("Metric", "A", "B", "B − A")
    for metric in diff.metrics:
        difference = "" if metric.difference is None else f"{metric.difference:+.4g}"
        table.add_row(_text(metric.metric), _number(metric.a), _number(metric.b), difference)
    return table


def module_table(modules: Iterable[WeightDistance], what: str) -> Table:
    """One row per module: Frobenius norms of both deltas, and how far they lie apart."""
    table = Table(what, "‖A‖", "‖B‖", "‖A − B‖", "relative", "cosine", "")
    for module in modules:
        table.add_row(
            _text(module.module),
            _number(module.norm_a),
            _number(module.norm_b),
            _number(module.distance),
            f"{module.relative:.3f}",
            _cosine(module),
            _SIDES.get(module.only_in or "", ""),
        )
    return table


def summary_lines(diff: VersionDiff) -> list[str]:
    """What the whole comes to."""
    overall = diff.overall
    both = sum(module.only_in is None for module in diff.modules)
    lines = [
        f"all modules: ‖A‖ {_number(overall.norm_a)}, ‖B‖ {_number(overall.norm_b)}, "
        f"distance {_number(overall.distance)} (relative {overall.relative:.3f}), cosine {_cosine(overall) or 'none'}",
        f"{both} modules in both, {len(diff.only_a)} only in A, {len(diff.only_b)} only in B",
    ]
    lines += [f"not comparable: {plain_text(entry)}" for entry in diff.incomparable]
    if not diff.same_base:
        lines.append("The bases differ: distances compare numbers of two different models.")
    if diff.a == diff.b:
        lines.append("The two are the same content.")
    return lines


def _change_cells(change: Change) -> tuple[Text, Text, Text]:
    return _text(change.key), _text(_value(change.a)), _text(_value(change.b))


def _value(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: str) -> Text:
    """Text of strangers: no markup of rich and no control characters."""
    return Text(plain_text(value, MAX_VALUE))


def _number(value: float | None) -> str:
    return "" if value is None else figure(value)


def _cosine(distance: WeightDistance) -> str:
    return "" if distance.cosine is None else f"{distance.cosine:.4f}"
