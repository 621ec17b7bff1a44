"""One picture of a run: throughput against the number of adapters, and latency percentiles. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LINES = {
    "adapters": "16 rows at once, so many adapters among them",
    "slora": "S-LoRA's trace, so many adapters registered",
    "registered": "Zipf 1.5, so many adapters registered",
    "punica": "Punica, 32 rows (rank 16)",
}
BARS = ("field", "punica", "thrash", "slora", "registered")


def draw(path: Path, results: Sequence[Mapping[str, Any]], title: str) -> None:
    """Writes a PNG from the `results` of a run's JSON. Raises ValueError when nothing in them can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [row for row in results if str(row["system"]).startswith("adapterbay")]
    lines = {suite: _line(ours, suite) for suite in LINES}
    lines = {suite: points for suite, points in lines.items() if points}
    timed = [row for row in ours if row["first_ms"]]
    bars = [row for row in timed if row["suite"] in BARS] or timed
    if not lines and not bars:
        raise ValueError("nothing to draw: run one of the suites field, adapters, punica, slora, registered or thrash")
    height = max(4.5, 1.5 + 0.3 * len(bars))
    figure, (left, first, whole) = pyplot.subplots(1, 3, figsize=(17, height), width_ratios=(1.3, 1, 1))
    for suite, points in lines.items():
        left.plot([x for x, _ in points], [y for _, y in points], marker="o", label=LINES[suite])
    peers = [row for row in results if row["suite"] == "field" and row["system"] not in {r["system"] for r in ours}]
    for row in peers:
        if row["workload"] == "mixed":
            left.axhline(row["tokens_per_second"], linestyle=":", color="grey")
            text = f"{row['system']}, {row['adapters']} adapters at once"
            place = (0.55, row["tokens_per_second"])
            left.annotate(text, place, xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    left.set_xscale("symlog", linthresh=1)
    counts = sorted({x for points in lines.values() for x, _ in points})
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    left.set_ylim(bottom=0)
    left.set_xlabel("adapters")
    left.set_ylabel("output tokens per second")
    left.set_title("throughput against the number of adapters")
    left.grid(alpha=0.3)
    if lines:
        left.legend(fontsize=8)
    for axes, key, name in ((first, "first_ms", "first token"), (whole, "latency_ms", "whole request")):
        _percentiles(axes, bars, key)
        axes.set_title(f"latency of the {name}, p50 p90 p99")
        axes.set_xlabel("milliseconds")
    whole.set_yticklabels([])
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(rows: Sequence[Mapping[str, Any]], suite: str) -> list[tuple[int, float]]:
    return sorted((row["adapters"], row["tokens_per_second"]) for row in rows if row["suite"] == suite)


def _percentiles(axes: Any, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """Nested bars: the widest is p50, the longest p99."""
    labels = [row["workload"] + (f", {row['batch']} rows" if row["batch"] else "") for row in rows]
    places = range(len(rows))
    for percentile, thickness, color in (("p99", 0.25, "#c6dbef"), ("p90", 0.45, "#6baed6"), ("p50", 0.7, "#08519c")):
        axes.barh(places, [row[key].get(percentile, 0.0) for row in rows], height=thickness, color=color)
    axes.set_yticks(list(places), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
