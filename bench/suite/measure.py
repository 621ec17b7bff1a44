"""Rounds that interleave systems, medians over them, and the rows and ratios that come of it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.process import SystemFailed, Worker, python_worker

PERCENTILES = (50, 90, 99)


@dataclass
class Settings:
    """What the command line says. `engine` are ServerConfig's settings for every engine of ours."""

    work: Path
    rounds: int
    tokens: int
    quantize: list[str]
    engine: dict[str, Any]
    registered: list[int]
    scale: float
    rate: float
    duration: float
    cv: float
    alpha: float
    large: int
    windows: int
    train_samples: int
    eval_samples: int
    trials: int
    peers: list[str]


@dataclass
class Row:
    """One line of a table. Times in milliseconds; `rounds` are the single rounds' tokens per second."""

    suite: str
    system: str
    workload: str
    batch: int
    adapters: int
    tokens_per_second: float
    first_ms: dict[str, float]
    latency_ms: dict[str, float]
    peak_memory_mb: float
    rounds: list[float]
    extra: dict[str, float] = field(default_factory=dict)


@dataclass
class Ratio:
    """Two figures of one run, one over the other. `floor` and `mark` are the issue's, None where it names none.
    `lower` figures are better small (milliseconds, not ratios of speed)."""

    label: str
    value: float
    floor: float | None = None
    mark: float | None = None
    lower: bool = False

    @property
    def verdict(self) -> str:
        """How it stands to floor and mark."""
        if self.floor is None and self.mark is None:
            return ""

        def reached(bound: float | None) -> bool:
            return bound is not None and (self.value <= bound if self.lower else self.value >= bound)

        if reached(self.mark):
            return "mark"
        if reached(self.floor):
            return "floor" if self.mark is not None else "ok"
        return "missed" if self.floor is not None else "mark missed"


@dataclass
class Report:
    """What a run found, suite by suite. `facts` are figures that are no throughput: times, perplexities, accuracies."""

    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, label: str, top: float | None, bottom: float | None, **bounds: Any) -> None:
        """Notes a ratio, if both its sides were measured."""
        if top and bottom:
            self.ratios.append(Ratio(label, top / bottom, **bounds))

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "ratios": [{**asdict(ratio), "verdict": ratio.verdict} for ratio in self.ratios],
            "results": [asdict(row) for row in self.rows],
            "facts": self.facts,
            "peer_versions": self.versions,
            "failures": self.failures,
        }


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


Play = Callable[[int], dict[str, Any]]
"""One round of a workload, given its number (0 is the warm-up): tokens, requests, seconds, first and total latencies. A
system that tells whole batches has one latency for all of its requests."""


@dataclass
class Cell:
    """A system and a workload: what one row is measured from."""

    system: str
    workload: str
    batch: int
    adapters: int
    worker: Worker
    play: Play
    warmups: int = 1


def playing(worker: Worker, requests: Sequence[dict[str, Any]]) -> Play:
    """The same requests in every round."""
    return lambda _: worker.call("play", requests=list(requests))  # type: ignore[no-any-return]


def interleaved(suite: str, cells: Sequence[Cell], rounds: int, report: Report) -> dict[tuple[str, str, int], Row]:
    """Warms every cell up, then plays all of them in each round, every other round backwards. The rows by system,
    workload and batch. A cell that fails is reported and left out."""
    played: dict[int, list[dict[str, Any]]] = {index: [] for index in range(len(cells))}
    peaks: dict[int, float] = {}
    for number in range(rounds + 1):
        order = list(enumerate(cells))
        for index, cell in order if number % 2 == 0 else reversed(order):
            if index not in played:
                continue
            try:
                cell.worker.call("reset_peak")
                for _ in range(cell.warmups if number == 0 else 1):
                    found = cell.play(number)
                if number:
                    played[index].append(found)
                    peaks[index] = max(peaks.get(index, 0.0), cell.worker.call("peak_mb"))
            except SystemFailed as failure:
                del played[index]
                report.failures[f"{suite}: {cell.system}, {cell.workload}"] = str(failure)
                say(f"FAILED {cell.system}, {cell.workload}: {str(failure).splitlines()[0]}")
        say(f"{suite}: {'warmed up' if number == 0 else f'round {number} of {rounds}'}")
    rows = {}
    for index, cell in enumerate(cells):
        if played.get(index):
            row = row_of(suite, cell, played[index], peaks[index])
            rows[cell.system, cell.workload, cell.batch] = row
            report.rows.append(row)
    return rows


def row_of(suite: str, cell: Cell, played: Sequence[dict[str, Any]], peak: float) -> Row:
    """Medians over rounds; percentiles over all requests of all rounds."""
    rates = [each["tokens"] / each["seconds"] for each in played]
    requests = [each["requests"] / each["seconds"] for each in played]
    return Row(
        suite,
        cell.system,
        cell.workload,
        cell.batch,
        cell.adapters,
        statistics.median(rates),
        percentiles([value for each in played for value in each["first"]]),
        percentiles([value for each in played for value in each["total"]]),
        peak,
        rates,
        {"requests_per_second": statistics.median(requests)},
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds, nearest rank; empty for nothing."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": 1000 * ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES}


class Bench:
    """What suites are given: settings, the report, and processes that end with the run."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.settings = settings
        self.report = report
        self._material: Worker | None = None

    def material(self) -> Worker:
        """The process that makes adapters; see `suite.material`."""
        if self._material is None:
            self._material = python_worker("material", "suite.material", self.settings.work)
        return self._material

    def rest(self) -> None:
        """Ends the process that makes adapters, so that nothing runs beside what is measured."""
        if self._material is not None:
            self._material.close()
            self._material = None

    @contextmanager
    def workers(self) -> Iterator[Callable[[str, str], Worker]]:
        """A function that starts this project's or PEFT's process by name and module; all end with the context."""
        self.rest()
        with ExitStack() as stack:
            yield lambda name, module: stack.enter_context(python_worker(name, module, self.settings.work))

    def engine(self, worker: Worker, registry: Path | str, grpc: bool = False, **settings: Any) -> dict[str, Any]:
        """Opens an engine in a `suite.ours` process; what it holds."""
        found: dict[str, Any] = worker.call(
            "open", registry=str(registry), settings={**settings_over(self.settings.engine, settings)}, grpc=grpc
        )
        self.report.versions.setdefault("adapterbay", found["versions"])
        return found

    def folder(self, name: str) -> Path:
        """A folder for material."""
        folder = self.settings.work / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def settings_over(engine: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The command line's settings of the engine, with what a workload itself is about on top."""
    return {**engine, **wanted}
