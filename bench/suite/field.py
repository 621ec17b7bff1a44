"""The field's workload (docs: the table of the field notes): base, one adapter and mixed batches, side by side with
transformers, PEFT and the peers that are installed; and how throughput falls with the number of adapters in a batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from suite.measure import Bench, Cell, Row, playing, say
from suite.peers import installed, start
from suite.process import SystemFailed
from suite.workloads import ALPHA, LLAMA_LINEARS, RANK, Selection, distinct, field

BATCH = 16
OURS = "adapterbay"
Rows = dict[tuple[str, str, int], Row]
assert ALPHA == 2 * RANK  # as `material` makes them


def material(bench: Bench) -> dict[str, str]:
    """Sixteen random adapters of rank 8 on all seven linear layers, as PEFT saves them; folders by name."""
    say("making sixteen adapters of rank 8")
    made: dict[str, str] = bench.material().call(
        "adapters", folder=str(bench.folder("field")), prefix="a", count=BATCH, rank=RANK, targets=LLAMA_LINEARS
    )
    return made


def run(bench: Bench) -> None:
    """Every system, interleaved."""
    folders = material(bench)
    names = list(folders)
    located = bench.material().call("base_folder", reference=None)
    base = located["folder"]
    tokens = bench.settings.tokens
    pairs: list[Selection] = [{names[i]: 0.5, names[(i + 1) % BATCH]: 0.5} for i in range(BATCH)]
    cells: list[Cell] = []

    def add(system: str, worker: Any, workload: str, selections: list[Selection], adapters: int) -> None:
        play = playing(worker, field(selections, tokens))
        cells.append(Cell(system, workload, len(selections), adapters, worker, play))

    with bench.workers() as launch, ExitStack() as stack:
        ours = launch(OURS, "suite.ours")
        held = bench.engine(ours, bench.folder("field") / "registry")
        say(f"{held['name']} is up")
        add(OURS, ours, "base", [None], 0)
        add(OURS, ours, "base", [None] * BATCH, 0)
        add(OURS, ours, "one adapter", names[:1], 1)
        add(OURS, ours, "one adapter", distinct(BATCH, names[:1]), 1)
        add(OURS, ours, "mixed", distinct(BATCH, names), BATCH)
        add(OURS, ours, "mixed fused pairs", pairs, BATCH)
        add(OURS, ours, "mixed and base", [*names[: BATCH // 2], *[None] * (BATCH // 2)], BATCH // 2)

        if "transformers" in bench.settings.peers:
            transformers = launch("transformers", "suite.plain")
            transformers.call("open", base=base, adapters={}, dtype="bfloat16")
            add("transformers", transformers, "base", [None], 0)
            add("transformers", transformers, "base", [None] * BATCH, 0)
        if "peft" in bench.settings.peers:
            peft = launch("peft", "suite.plain")
            bench.report.versions["peft"] = peft.call("open", base=base, adapters=folders, dtype="bfloat16")["versions"]
            add("peft", peft, "base", [None] * BATCH, 0)
            add("peft", peft, "one adapter", names[:1], 1)
            add("peft", peft, "mixed", distinct(BATCH, names), BATCH)

        for peer in installed(bench.settings.peers):
            for system, adapters in ((peer.name, {}), (f"{peer.name} lora", folders)):
                if adapters and not peer.mixes:
                    continue
                say(f"starting {system}")
                try:
                    worker = stack.enter_context(start(peer, system, bench.settings.work))
                    opened = worker.call("open", base=located[peer.weights], adapters=adapters)
                except SystemFailed as failure:
                    bench.report.failures[f"field: {system}"] = str(failure)
                    say(f"FAILED {system}: {str(failure).splitlines()[0]}")
                    continue
                bench.report.versions[peer.name] = opened["versions"]
                add(system, worker, "base", [None], 0)
                add(system, worker, "base", [None] * BATCH, 0)
                if adapters:
                    add(system, worker, "one adapter", names[:1], 1)
                    add(system, worker, "mixed", distinct(BATCH, names), BATCH)

        ratios(bench, bench_rows(bench, "field", cells))


def bench_rows(bench: Bench, suite: str, cells: list[Cell]) -> Rows:
    """`interleaved` with the run's rounds."""
    from suite.measure import interleaved

    return interleaved(suite, cells, bench.settings.rounds, bench.report)


def ratios(bench: Bench, rows: Rows) -> None:
    """What the issue asks of this workload."""
    note = bench.report.ratio

    def rate(system: str, workload: str, batch: int) -> float | None:
        row = rows.get((system, workload, batch))
        return row.tokens_per_second if row else None

    mixed, base, single = rate(OURS, "mixed", BATCH), rate(OURS, "base", BATCH), rate(OURS, "base", 1)
    one = rate(OURS, "one adapter", 1)
    note("mixed 16 over PEFT's mixed 16", mixed, rate("peft", "mixed", BATCH), floor=7.0)
    note("mixed 16 over vLLM-CPU's mixed 16", mixed, rate("vllm-cpu lora", "mixed", BATCH), floor=3.0)
    note("mixed 16 over vLLM-CPU's bare base 16", mixed, rate("vllm-cpu", "base", BATCH), mark=1.0)
    note("mixed 16 over our base 16", mixed, base, floor=0.80, mark=0.90)
    note("one adapter over our base, batch 1", one, single, mark=0.95)
    note("base 1 over vLLM-CPU's base 1", single, rate("vllm-cpu", "base", 1), floor=1.5)
    note("base 1 over llama.cpp's base 1", single, rate("llama-cpp", "base", 1), mark=1.0)
    note("base 16 over vLLM-CPU's base 16", base, rate("vllm-cpu", "base", BATCH), mark=1.3)
    note("one adapter 1 over vLLM-CPU's one adapter 1", one, rate("vllm-cpu lora", "one adapter", 1))
    note("base 16 over llama.cpp's base 16", base, rate("llama-cpp", "base", BATCH))
    note("base 1 over transformers' base 1", single, rate("transformers", "base", 1))
    note("base 16 over transformers' base 16", base, rate("transformers", "base", BATCH))
    note("base 16 over PEFT's base 16 (adapters disabled)", base, rate("peft", "base", BATCH))
    note("one adapter 1 over PEFT's one adapter 1", one, rate("peft", "one adapter", 1))


def adapters_sweep(bench: Bench) -> None:
    """16 rows over 0, 1, 2, 4, 8 and 16 adapters: what the first of the plot's lines shows."""
    names = list(material(bench))
    with bench.workers() as launch:
        ours = launch(OURS, "suite.ours")
        bench.engine(ours, bench.folder("field") / "registry")
        cells = []
        for count in (0, 1, 2, 4, 8, 16):
            chosen: list[Selection] = distinct(BATCH, names[:count]) if count else [None] * BATCH
            play = playing(ours, field(chosen, bench.settings.tokens))
            cells.append(Cell(OURS, f"{count} adapters", BATCH, count, ours, play))
        bench_rows(bench, "adapters", cells)
