"""What each `--quantize` costs and gives: speed, perplexity of held-out text, and a trained classifier's accuracy."""

from __future__ import annotations

from typing import Any

from suite.field import BATCH, OURS, material
from suite.measure import Bench, Cell, interleaved, playing, say
from suite.process import SystemFailed
from suite.workloads import distinct, field

CONTEXT, WINDOW = 32, 128
"""Tokens of a window, and how many of them are given as the prompt; the rest is scored."""


def run(bench: Bench) -> None:
    """One engine for each way to hold the base, all in one run; float32 transformers as the reference."""
    options = bench.settings
    names = list(material(bench))
    windows = bench.material().call("held_out", count=options.windows, length=WINDOW)
    say(f"training the demo's classifier on {options.train_samples} reviews")
    trained = bench.material().call(
        "classifier",
        folder=str(bench.folder("field")),
        train_samples=options.train_samples,
        eval_samples=options.eval_samples,
    )
    base = bench.material().call("base_folder", reference=None)["folder"]
    facts: dict[str, Any] = {
        "tokens scored": len(windows) * (WINDOW - CONTEXT),
        "texts labelled": len(trained["texts"]),
    }
    cells: list[Cell] = []
    with bench.workers() as launch:
        for quantize in options.quantize:
            system = f"{OURS} {quantize}"
            worker = launch(system, "suite.ours")
            try:
                held = bench.engine(worker, bench.folder("field") / "registry", quantize=quantize)
                facts[f"{quantize}: base, MB"] = held["base_bytes"] / 1e6
                facts[f"{quantize}: perplexity"] = worker.call("perplexity", windows=windows, context=CONTEXT)
                labels = worker.call(
                    "label", texts=trained["texts"], adapter=trained["adapter"], max_length=trained["max_length"]
                )
            except SystemFailed as failure:
                bench.report.failures[f"quantize: {quantize}"] = str(failure)
                say(f"FAILED {quantize}: {str(failure).splitlines()[0]}")
                continue
            hits = sum(map(str.__eq__, labels, trained["labels"]))
            facts[f"{quantize}: accuracy"] = hits / len(labels)
            say(f"{quantize}: perplexity {facts[f'{quantize}: perplexity']:.2f}, accuracy {hits / len(labels):.3f}")
            for selections, workload, count in (
                ([None], "base", 0),
                ([None] * BATCH, "base", 0),
                (distinct(BATCH, names), "mixed", BATCH),
            ):
                play = playing(worker, field(selections, options.tokens))
                cells.append(Cell(system, workload, len(selections), count, worker, play))
        rows = interleaved("quantize", cells, options.rounds, bench.report)
    with bench.workers() as launch:
        reference = launch("transformers float32", "suite.plain")
        reference.call("open", base=base, adapters={}, dtype="float32")
        facts["transformers float32: perplexity"] = reference.call("perplexity", windows=windows, context=CONTEXT)
    for (system, workload, batch), row in rows.items():
        facts[f"{system.removeprefix(OURS + ' ')}: {workload} {batch}, tok/s"] = row.tokens_per_second
    bench.report.facts["quantize"] = dict(sorted(facts.items()))
