"""What a run is told as: tables for people, ratios first, and one JSON file with everything and where it came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.measure import Report, Row
from suite.process import BENCH

HEAD = (
    "suite", "system", "workload", "batch", "adapters", "tok/s", "req/s", "first p50", "p99 ms", "all p50", "p99 ms",
    "peak MB",
)  # fmt: skip
PACKAGES = ("adapterbay", "torch", "transformers", "peft", "bitsandbytes", "grpcio", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and how busy it was when the run began."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": named[0] if named else platform.processor(),
        "cores": os.cpu_count(),
        "features": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gb": round(pages / 2**30, 1),
        "system": platform.platform(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
        "threads": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ},
    }


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def commit() -> str | None:
    """The commit that was measured, with "+changes" when the tree had any; None outside of a clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(BENCH), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Everything that a reader of the figures must know."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "bench/serving.py", *sys.argv[1:]]),
    }


def show(report: Report) -> None:
    """Prints ratios, then rows, then facts, then what failed."""
    if report.ratios:
        print(f"\n{'ratio':>8}{'floor':>8}{'mark':>8}   what")
    for ratio in report.ratios:
        bounds = "".join(f"{bound:>8.2f}" if bound is not None else " " * 8 for bound in (ratio.floor, ratio.mark))
        verdict = f"   [{ratio.verdict}]" if ratio.verdict else ""
        print(f"{ratio.value:>8.2f}{bounds}   {ratio.label}{verdict}")
    if report.rows:
        print()
        table(HEAD, [cells(row) for row in report.rows], left=3)
    for suite, facts in report.facts.items():
        print(f"\n{suite}")
        for name, value in facts.items():
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            print(f"  {name:<60}{shown:>12}")
    for what, message in report.failures.items():
        print(f"\nFAILED {what}\n{message}", file=sys.stderr)


def cells(row: Row) -> list[object]:
    """A row as the table shows it, under HEAD."""
    return [
        row.suite,
        row.system,
        row.workload,
        row.batch or "–",
        row.adapters,
        f"{row.tokens_per_second:.1f}",
        f"{row.extra.get('requests_per_second', 0):.2f}",
        _ms(row.first_ms, "p50"),
        _ms(row.first_ms, "p99"),
        _ms(row.latency_ms, "p50"),
        _ms(row.latency_ms, "p99"),
        f"{row.peak_memory_mb:.0f}",
    ]


def _ms(found: dict[str, float], key: str) -> str:
    return f"{found[key]:.0f}" if key in found else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, left: int) -> None:
    """Columns as wide as they need; the first `left` to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def write(path: Path, report: Report, circumstances: dict[str, Any]) -> None:
    """One JSON file, ratios first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report.as_json(), **circumstances}, indent=2) + "\n")
