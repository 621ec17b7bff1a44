"""Who is asked for how often: Punica's popularities, S-LoRA's traces, SGLang's thrash, a thousand registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suite.field import OURS, bench_rows
from suite.measure import Bench, Cell, playing, say
from suite.process import Worker
from suite.workloads import ATTENTION, LLAMA_LINEARS, distinct, field, punica, punica_batch, slora_trace, zipf_requests

PUNICA_BATCH, PUNICA_RANK = 32, 16
TRACE_RANK = 8
ROWS = 32
"""Rows that run at once in the suites thrash and registered."""
SLOTS, THRASHED, THRASH_EACH = 8, 16, 3
SLO_SECONDS = 6.0
"""S-LoRA's objective for the first token (arXiv:2311.03285, section 7.1)."""
ZIPF, FEW, ZIPF_REQUESTS, ZIPF_TOKENS = 1.5, 16, 96, 32


def run_punica(bench: Bench) -> None:
    """A batch of 32 under each popularity, rank 16 on all seven linear layers, and the base alone."""
    say(f"making {PUNICA_BATCH} adapters of rank {PUNICA_RANK}")
    folder = bench.folder("punica")
    names = list(
        bench.material().call(
            "adapters",
            folder=str(folder),
            prefix="p",
            count=PUNICA_BATCH,
            rank=PUNICA_RANK,
            targets=LLAMA_LINEARS,
            dtype="bfloat16",
            keep=False,
        )
    )
    tokens = bench.settings.tokens
    with bench.workers() as launch:
        ours = launch(OURS, "suite.ours")
        bench.engine(ours, folder / "registry", max_rows=PUNICA_BATCH)
        cells = [Cell(OURS, "base", PUNICA_BATCH, 0, ours, playing(ours, field([None] * PUNICA_BATCH, tokens)))]
        for popularity in ("identical", "skewed", "uniform", "distinct"):
            batch = punica_batch(PUNICA_BATCH, popularity, names, tokens)
            count = len(punica(PUNICA_BATCH, popularity))
            cells.append(Cell(OURS, popularity, PUNICA_BATCH, count, ours, playing(ours, batch)))
        rows = bench_rows(bench, "punica", cells)
    speed = {workload: row.tokens_per_second for (_, workload, _), row in rows.items()}
    for popularity in ("distinct", "uniform", "skewed"):
        bench.report.ratio(f"Punica {popularity} over identical", speed.get(popularity), speed.get("identical"))
    bench.report.ratio("Punica distinct over the base", speed.get("distinct"), speed.get("base"))


def trace_material(bench: Bench, count: int) -> list[str]:
    """`count` adapters of rank 8 on the attention's four linear layers, in bfloat16: 1.8 MB each."""
    say(f"making {count} adapters of rank {TRACE_RANK} on the attention's layers")
    return list(
        bench.material().call(
            "adapters",
            folder=str(bench.folder(f"registered-{count}")),
            prefix="t",
            count=count,
            rank=TRACE_RANK,
            targets=ATTENTION,
            dtype="bfloat16",
            keep=False,
        )
    )


def run_slora(bench: Bench) -> None:
    """S-LoRA's trace over ever more adapters, on one engine; lengths scaled to what two cores can do."""
    options = bench.settings
    names = trace_material(bench, max(options.registered))
    lengths = max(round(8 * options.scale), 1), max(round(512 * options.scale), 2)
    with bench.workers() as launch:
        ours = launch(OURS, "suite.ours")
        bench.engine(ours, bench.folder(f"registered-{len(names)}") / "registry")
        firsts: dict[int, list[float]] = {count: [] for count in options.registered}

        def traced(count: int) -> Cell:
            def play(number: int) -> dict[str, Any]:
                trace = slora_trace(
                    names[:count],
                    alpha=options.alpha,
                    rate=options.rate,
                    cv=options.cv,
                    duration=options.duration,
                    lengths=lengths,
                    seed=number,
                )
                found: dict[str, Any] = ours.call("play", requests=trace)
                firsts[count] += found["first"] if number else []
                return found

            return Cell(OURS, f"S-LoRA trace, n={count}", 0, count, ours, play)

        rows = bench_rows(bench, "slora", [traced(count) for count in options.registered])
    bench.report.facts["slora"] = {
        "rate": options.rate,
        "cv": options.cv,
        "alpha": options.alpha,
        "duration": options.duration,
        "lengths": list(lengths),
        **{
            f"n={count}: share of first tokens within {SLO_SECONDS:.0f} s": sum(s <= SLO_SECONDS for s in found)
            / len(found)
            for count, found in firsts.items()
            if found
        },
    }
    by_count = {row.adapters: row for row in rows.values()}
    most, least = max(options.registered), min(options.registered)
    if most in by_count and least in by_count:
        top, bottom = (by_count[count].tokens_per_second for count in (most, least))
        bench.report.ratio(f"S-LoRA trace, {most} adapters over {least}", top, bottom)


def run_thrash(bench: Bench) -> None:
    """SGLang's case: 16 adapters over 8 slots on the device, against the same requests with 16 slots.

    48 requests come at once, three for each adapter, in turn: a0, a1, … a15, a0, … At most 32 run at a time, and with 8
    slots those of 8 adapters at most, so that adapters give way to others and come back for their next request.
    """
    from suite.field import material

    names = list(material(bench))
    registry = bench.folder("field") / "registry"
    requests = field(distinct(THRASHED * THRASH_EACH, names), bench.settings.tokens)
    with bench.workers() as launch:
        size = adapter_bytes(bench, launch("probe", "suite.ours"), registry, names[0])
        cells = []
        for slots in (SLOTS, THRASHED):
            worker = launch(f"{slots} slots", "suite.ours")
            bench.engine(worker, registry, max_rows=ROWS, device_bytes=round(size * (slots + 0.5)))
            play = playing(worker, requests)
            cells.append(Cell(OURS, thrash_title(slots), ROWS, THRASHED, worker, play))
        rows = bench_rows(bench, "thrash", cells)
    speed = [rows.get((OURS, thrash_title(slots), ROWS)) for slots in (SLOTS, THRASHED)]
    bench.report.ratio("16 adapters over 8 slots, against 16 slots", *(row and row.tokens_per_second for row in speed))


def thrash_title(slots: int) -> str:
    """The workload's name."""
    return f"48 requests, 16 adapters, {slots} slots"


def adapter_bytes(bench: Bench, worker: Worker, registry: Path, name: str) -> int:
    """What one adapter takes on the device; the worker is closed."""
    bench.engine(worker, registry)
    worker.call("play", requests=field([name], 1))
    size = int(worker.call("device_bytes"))
    worker.close()
    if size <= 0:
        raise RuntimeError("the engine says that an adapter it served takes no bytes")
    return size


def run_registered(bench: Bench) -> None:
    """The same traffic, Zipf 1.5, over 16 adapters and over `--large` registered ones, servers side by side.

    Each round draws anew, all by the same seed, after one that warms up. A server that has run for a while has had
    every adapter once: that one is asked for the ratio. Beside it one that has not, for which a round brings adapters
    for the first time (some 14 of 96 requests).
    """
    few, large = FEW, bench.settings.large
    workloads = {
        f"zipf 1.5 over {few}": (few, False),
        f"zipf 1.5 over {large}": (large, True),
        f"zipf 1.5 over {large}, some for the first time": (large, False),
    }
    named = {count: trace_material(bench, count) for count in (few, large)}
    with bench.workers() as launch:
        cells = []
        for workload, (count, all_loaded) in workloads.items():
            worker = launch(workload, "suite.ours")
            bench.engine(worker, bench.folder(f"registered-{count}") / "registry", max_rows=ROWS)
            if all_loaded:
                say(f"loading {count} adapters")
                worker.call("load", names=named[count])

            def play(number: int, worker: Worker = worker, names: list[str] = named[count]) -> dict[str, Any]:
                drawn = zipf_requests(names, ZIPF_REQUESTS, ZIPF, ZIPF_TOKENS, number)
                found: dict[str, Any] = worker.call("play", requests=drawn)
                return found

            cells.append(Cell(OURS, workload, ROWS, count, worker, play))
        rows = bench_rows(bench, "registered", cells)
    speed = [row.tokens_per_second if (row := rows.get((OURS, workload, ROWS))) else None for workload in workloads]
    title = f"{large} adapters registered over {few}, Zipf 1.5"
    bench.report.ratio(f"{title}, once warm", speed[1], speed[0], floor=0.9)
    bench.report.ratio(f"{title}, some for the first time", speed[2], speed[0])
