"""The engine's figures for Prometheus, read when they are asked for: a scrape costs the engine nothing between scrapes.

Every server has a registry of its own; nothing is registered globally. docs/operations.md tells what each is for.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from socketserver import BaseServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from adapterbay.registry.errors import InvalidArgument
from adapterbay.server.adapters.tally import Counts, Histogram
from adapterbay.server.engine import Engine

Label = tuple[str, ...]

PREFIX = "adapterbay_"
HOST: Label = ("host",)
DEVICE: Label = ("device",)

Family = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class EngineCollector(Collector):
    """Reads one engine at every scrape; `calls` are gRPC calls that ended, by method and status code."""

    def __init__(self, engine: Engine, calls: Counts) -> None:
        self._engine = engine
        self._calls = calls

    def collect(self) -> Iterator[Family]:
        """All metrics."""
        yield from self._of_server()
        yield from self._of_rows()
        yield from self._of_tiers()
        yield from self._of_loads()

    def _of_server(self) -> Iterator[Family]:
        base = self._engine.base
        yield _gauge(
            "base_info",
            "The base that is held; always 1.",
            {
                (base.reference, base.fingerprint, base.quantization, base.dtype, base.device): 1,
            },
            ("reference", "fingerprint", "quantization", "dtype", "device"),
        )
        yield _counter("calls", "gRPC calls that ended.", self._calls.read(), ("method", "code"))

    def _of_rows(self) -> Iterator[Family]:
        stats, tally = self._engine.stats(), self._engine.row_tally
        yield _gauge(
            "rows", "Rows in the engine now.", {("running",): stats.running, ("waiting",): stats.waiting}, ("state",)
        )
        yield _gauge(
            "cache_blocks",
            "Blocks of the key/value cache now.",
            {("free",): stats.free_blocks, ("used",): stats.blocks - stats.free_blocks},
            ("state",),
        )
        yield _counter("steps", "Steps of the engine.", {(): stats.steps})
        yield _counter("preemptions", "Rows that gave way to others and began again.", {(): stats.preemptions})
        yield _counter(
            "prefix_looked_up_tokens", "Tokens whose keys and values were looked for.", {(): stats.reusable_tokens}
        )
        yield _counter("prefix_reused_tokens", "Tokens whose keys and values were found.", {(): stats.reused_tokens})
        yield _counter("rows_ended", "Rows that ran and are over, whatever their end.", tally.rows.read())
        yield _counter(
            "rows_unstarted",
            "Rows that left the queue without a step: cancelled, late, or their adapter could not be loaded.",
            tally.unstarted.read(),
        )
        yield _counter("prompt_tokens", "Prompt tokens of rows that are over.", tally.prompt_tokens.read())
        yield _counter("generated_tokens", "Tokens that rows generated that are over.", tally.generated_tokens.read())
        yield _histogram("queue_seconds", "From a row's arrival to its first step.", tally.queue_seconds)
        yield _histogram("first_token_seconds", "From a row's arrival to the end of its prompt.", tally.first_seconds)

    def _of_tiers(self) -> Iterator[Family]:
        engine, stats = self._engine, self._engine.stats()
        memory = engine.adapters.memory
        counts, host, device = memory.counts(), memory.tally, engine.device_tally
        used = {HOST: stats.host_bytes, DEVICE: stats.device_bytes}
        budgets = {HOST: memory.budget_bytes, DEVICE: engine.config.device_bytes}
        yield _gauge("adapter_bytes", "Bytes that adapters take in a tier now.", used, ("tier",))
        yield _gauge("adapter_budget_bytes", "The most bytes that adapters may take in a tier.", budgets, ("tier",))
        loaded = {HOST: counts.loaded, DEVICE: counts.on_device}
        yield _gauge("adapters", "Adapters in a tier now.", loaded, ("tier",))
        yield _gauge("adapters_pinned", "Adapters that are pinned now.", {(): counts.pinned})
        yield _gauge("adapters_loading", "Adapters that are being loaded now.", {(): counts.loading})
        yield _gauge("adapters_queued", "Adapters that wait for room in host memory now.", {(): counts.queued})
        for name, what, in_host, on_device in (
            ("adapter_hits", "Rows that found their adapter in a tier.", host.hits, device.hits),
            ("adapter_misses", "Rows that did not find their adapter in a tier.", host.misses, device.misses),
            ("adapter_evictions", "Adapters that gave way to others in a tier.", host.evictions, device.evictions),
        ):
            yield _counter(name, what, {HOST: in_host.of(), DEVICE: on_device.of()}, ("tier",))

    def _of_loads(self) -> Iterator[Family]:
        tally = self._engine.adapters.memory.tally
        yield _histogram("adapter_load_seconds", "Reading, checking and preparing an adapter.", tally.load_seconds)
        yield _counter(
            "adapter_load_failures", "Loads that failed, by the error's reason.", tally.failures.read(), ("reason",)
        )
        yield _counter("adapter_unloads", "Adapters that were unloaded on demand.", tally.unloads.read())


def _gauge(name: str, what: str, values: Mapping[Label, float], labels: Iterable[str] = ()) -> Family:
    family = GaugeMetricFamily(PREFIX + name, what, labels=tuple(labels))
    for label, value in values.items():
        family.add_metric(label, value)
    return family


def _counter(name: str, what: str, values: Mapping[Label, float], labels: Iterable[str] = ()) -> Family:
    family = CounterMetricFamily(PREFIX + name, what, labels=tuple(labels))
    for label, value in values.items() or ([] if tuple(labels) else [((), 0)]):
        family.add_metric(label, value)
    return family


def _histogram(name: str, what: str, histogram: Histogram) -> Family:
    counts, total = histogram.read()
    bounds = [*map(str, histogram.bounds), "+Inf"]
    family = HistogramMetricFamily(PREFIX + name, what)
    family.add_metric((), list(zip(bounds, accumulate(counts), strict=True)), total)
    return family


class MetricsServer:
    """Answers HTTP on a port of its own. Before `show`, it tells of the process only."""

    def __init__(self, host: str, port: int) -> None:
        """Binds. Raises InvalidArgument for a host or port that cannot be had."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        try:
            server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is in use; choose another one, or 0 for any free port" if taken else f"cannot be bound: {error}"
            raise InvalidArgument(f"Metrics port {port} on {host} {why}.", field="metrics_port") from error
        self._server: BaseServer = server
        self.port: int = server.server_port

    def show(self, engine: Engine, calls: Counts) -> Callable[[], None]:
        """Tells of an engine from now on; returns what ends that."""
        collector = EngineCollector(engine, calls)
        self._registry.register(collector)
        return lambda: self._registry.unregister(collector)

    def close(self) -> None:
        """Ends it; the port is free afterwards."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
