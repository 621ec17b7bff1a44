"""adapterbay's own engine for the suite: in this process, and as a real server behind gRPC."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_tools import Answer, Harness
from isolation.interface import EVERYTHING, Failed, Feature, Generated, Limits, Selection, Stats
from isolation.reference import until
from prometheus_client.parser import text_string_to_metric_families
from serving_tools import Served
from zoo import Zoo

from adapterbay.base.text import encode_text
from adapterbay.client import Client, GenerationPiece
from adapterbay.client.errors import ServerError
from adapterbay.registry import Registry
from adapterbay.registry.errors import AdapterbayError
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.blocks import BlockLedger
from adapterbay.server.engine import Engine
from adapterbay.server.requests import GenerateTask, SamplingSpec

CACHE_BYTES = 8 << 20
HEADER_BYTES = 8_192
"""A file of weights is larger than its tensors by its header, and room is made for the file."""


def settings(limits: Limits) -> dict[str, Any]:
    """The server's settings for these limits."""
    chosen: dict[str, Any] = {"max_rows": limits.rows, "kv_bytes": CACHE_BYTES}
    if limits.host_adapters is not None:
        chosen["host_bytes"] = limits.host_adapters * limits.adapter_bytes + HEADER_BYTES
    if limits.device_adapters is not None:
        chosen["device_bytes"] = limits.device_adapters * limits.adapter_bytes
    return chosen


def narrow(engine: Engine, limits: Limits) -> None:
    """Gives an idle engine fewer cache blocks, below what its settings allow."""
    if limits.cache_bytes is not None:
        blocks = limits.cache_bytes * engine._blocks.blocks // CACHE_BYTES
        engine._blocks.ledger = engine._loop.scheduler._blocks = BlockLedger(blocks)


class _Stored:
    """What both have in common: the registry is this machine's own."""

    features: frozenset[Feature] = EVERYTHING

    def __init__(self, base: Path, work: Path) -> None:
        self._base = base
        self.registry = Registry.open(work / "registry")

    def push(self, name: str, folder: Path, *, alias: str | None = None) -> None:
        try:
            self.registry.push(folder, name, base=f"folder:{self._base}", aliases=[alias] if alias else [])
        except AdapterbayError as error:
            raise Failed(error.message) from error

    def move_alias(self, name: str, alias: str, version: int) -> None:
        self.registry.set_alias(name, alias, version)

    def stored_weights(self, adapter: str) -> Path:
        path = self.registry.open_snapshot(self.registry.resolve(adapter).digest).files["adapter_model.safetensors"]
        path.chmod(0o644)
        return path

    @property
    def engine(self) -> Engine:
        """What is behind it."""
        raise NotImplementedError

    @contextmanager
    def hold_loads(self) -> Iterator[None]:
        memory, go_on = self.engine.adapters.memory, threading.Event()
        load = memory._load

        def slow(digest: str) -> ServingForm:
            go_on.wait(60)
            return load(digest)

        memory._load = slow
        try:
            yield
        finally:
            memory._load = load
            go_on.set()


@dataclass
class _RowJob:
    """A row of the engine in this process."""

    harness: Harness
    answer: Answer

    def tokens_so_far(self) -> int:
        return sum(len(delta.token_ids) for delta in self.answer.deltas)

    def wait(self, seconds: float = 60) -> Generated:
        assert self.answer.request is not None
        if not self.answer.done.wait(seconds):
            raise TimeoutError
        if isinstance(self.answer.final, AdapterbayError):
            raise Failed(self.answer.final.message) from self.answer.final
        result = self.answer.generated()
        return Generated(
            result.token_ids,
            tuple(position.chosen.log_probability for position in result.chances),
            torch.stack(self.harness.logits[self.answer.request.id]),
        )

    def cancel(self) -> None:
        assert self.answer.request is not None
        self.harness.engine.cancel(self.answer.request)


class InProcess(_Stored):
    """The engine without a server around it."""

    def __init__(self, base: Path, work: Path, limits: Limits) -> None:
        super().__init__(base, work)
        self.harness = Harness(base, self.registry, **settings(limits))
        narrow(self.engine, limits)
        self.engine.start()

    @property
    def engine(self) -> Engine:
        return self.harness.engine

    def generate(self, prompt: str, selection: Selection, tokens: int) -> _RowJob:
        ids = encode_text(self.harness.engine.tokenizer, prompt)
        sampling = SamplingSpec(max_tokens=tokens, ignore_end=True, top_log_probabilities=0)
        try:
            return _RowJob(self.harness, self.harness.submit(selection, GenerateTask(tuple(ids), sampling)))
        except AdapterbayError as error:
            raise Failed(error.message) from error

    def classify(self, text: str, adapter: str) -> Sequence[float]:
        ids = encode_text(self.harness.engine.tokenizer, text)
        try:
            return self.harness.classify(adapter, ids).classified().logits
        except AdapterbayError as error:
            raise Failed(error.message) from error

    def load(self, adapter: str) -> None:
        try:
            self.harness.engine.adapters.load(self._digest(adapter)).result(60)
        except AdapterbayError as error:
            raise Failed(error.message) from error

    def unload(self, adapter: str) -> None:
        self.harness.engine.adapters.unload(self._digest(adapter))

    def _digest(self, adapter: str) -> str:
        return self.registry.resolve(adapter).digest

    def stats(self) -> Stats:
        engine = self.harness.engine
        now, tally = engine.stats(), engine.adapters.memory.tally
        return Stats(
            host_bytes=now.host_bytes,
            device_bytes=now.device_bytes,
            host_budget=engine.config.host_bytes,
            device_budget=engine.config.device_bytes,
            rows=now.running + now.waiting,
            free_cache=now.free_blocks / now.blocks,
            hits={"host": tally.hits.of(), "device": engine.device_tally.hits.of()},
            misses={"host": tally.misses.of(), "device": engine.device_tally.misses.of()},
            evictions={"host": tally.evictions.of(), "device": engine.device_tally.evictions.of()},
            loads=sum(tally.load_seconds.read()[0]),
            failures=sum(tally.failures.read().values()),
            generated=engine.row_tally.generated_tokens.of(),
        )

    def close(self) -> None:
        self.harness.engine.stop()


class _StreamJob:
    """A streamed call, read on a thread of its own."""

    def __init__(self, client: Client, prompt: str, selection: Selection, tokens: int) -> None:
        chosen: dict[str, Any] = {"base": True}
        if selection is not None:
            chosen = {"adapter": selection} if isinstance(selection, str) else {"fusion": selection}
        self._pieces: list[GenerationPiece] = []
        self._error: Exception | None = None
        self._cancelled = threading.Event()
        self._stream = client.generate_stream(
            prompt, max_tokens=tokens, ignore_end=True, log_probabilities=0, timeout=60, **chosen
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for piece in self._stream:
                self._pieces.append(piece)
                if self._cancelled.is_set():
                    self._stream.close()
                    raise Failed("The caller left.")
        except (ServerError, Failed) as error:
            self._error = error

    def tokens_so_far(self) -> int:
        return sum(len(piece.token_ids) for piece in self._pieces)

    def wait(self, seconds: float = 60) -> Generated:
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError
        if self._error is not None:
            raise Failed(str(self._error)) from self._error
        return Generated(
            tuple(token for piece in self._pieces for token in piece.token_ids),
            tuple(each.chosen.log_probability for piece in self._pieces for each in piece.log_probabilities),
        )

    def cancel(self) -> None:
        self._cancelled.set()


class OverGrpc(_Stored):
    """The whole server on a port, its client, and its metrics."""

    def __init__(self, base: Path, work: Path, limits: Limits) -> None:
        super().__init__(base, work)
        self._served = Served(Zoo(base, self.registry), metrics_port=0, **settings(limits))
        self._served.__enter__()
        narrow(self.engine, limits)
        self._client = Client(self._served.address)

    @property
    def engine(self) -> Engine:
        return self._served.serving.engine

    def generate(self, prompt: str, selection: Selection, tokens: int) -> _StreamJob:
        return _StreamJob(self._client, prompt, selection, tokens)

    def classify(self, text: str, adapter: str) -> Sequence[float]:
        try:
            return [score.logit for score in self._client.classify([text], adapter=adapter)[0].scores]
        except ServerError as error:
            raise Failed(error.message) from error

    def load(self, adapter: str) -> None:
        try:
            self._client.load_adapter(adapter)
        except ServerError as error:
            raise Failed(error.message) from error

    def unload(self, adapter: str) -> None:
        """Returns when the server has taken it; the answer comes when the rows that run on it are over."""
        digest, table = self.registry.resolve(adapter).digest, self.engine.adapters.memory.books.table
        before = table.get(digest)
        call = threading.Thread(target=self._client.unload_adapter, args=(adapter,), daemon=True)
        call.start()
        until(lambda: not call.is_alive() or table.get(digest) is not before)

    def stats(self) -> Stats:
        found = self.metrics()
        tiers = ("host", "device")

        def by_tier(name: str) -> Mapping[str, int]:
            return {tier: round(found[name, (("tier", tier),)]) for tier in tiers}

        used, budget = by_tier("adapter_bytes"), by_tier("adapter_budget_bytes")
        free, taken = (found["cache_blocks", (("state", state),)] for state in ("free", "used"))
        return Stats(
            host_bytes=used["host"],
            device_bytes=used["device"],
            host_budget=budget["host"],
            device_budget=budget["device"],
            rows=round(sum(value for (name, _), value in found.items() if name == "rows")),
            free_cache=free / (free + taken),
            hits=by_tier("adapter_hits_total"),
            misses=by_tier("adapter_misses_total"),
            evictions=by_tier("adapter_evictions_total"),
            loads=round(found["adapter_load_seconds_count", ()]),
            failures=round(sum(v for (name, _), v in found.items() if name == "adapter_load_failures_total")),
            generated=round(found["generated_tokens_total", ()]),
        )

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """What the server tells Prometheus: values by name (without `adapterbay_`) and labels."""
        url = f"http://127.0.0.1:{self._served.serving.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        return {
            (sample.name.removeprefix("adapterbay_"), tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def close(self) -> None:
        self._client.close()
        self._served.stop()
