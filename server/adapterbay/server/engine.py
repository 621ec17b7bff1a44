"""The engine as others see it: submit rows, cancel them, ask what is in memory. Its loop has a thread of its own."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from adapterbay.base.load import BaseInfo
from adapterbay.registry import Registry, Resolved
from adapterbay.registry.errors import (
    AdapterbayError,
    BaseMismatch,
    Cancelled,
    InvalidArgument,
    QueueFull,
    TaskMismatch,
    Unavailable,
)
from adapterbay.registry.manifest import Manifest
from adapterbay.server.adapters.device import DeviceMemory
from adapterbay.server.adapters.forms import ServingForm, build_form
from adapterbay.server.adapters.residency import AdapterEvent, HostMemory, ResidencyInfo, wait_all
from adapterbay.server.batch import Group, Row
from adapterbay.server.config import ServerConfig
from adapterbay.server.generation import Generating
from adapterbay.server.kv import BlockPool, blocks_for
from adapterbay.server.layers import RankPool
from adapterbay.server.loop import Loop
from adapterbay.server.model import ServingModel
from adapterbay.server.pooling import StatePooler, blend_heads
from adapterbay.server.requests import ClassifyTask, EmbedTask, GenerateTask, Pooling, Request
from adapterbay.server.runner import Runner
from adapterbay.server.scheduler import Scheduler
from adapterbay.server.trust import trusted_keys

DEFAULT_NEW_TOKENS = 256
RETRY_AFTER_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of the engine. Bytes are what adapters take in each tier."""

    waiting: int
    running: int
    blocks: int
    free_blocks: int
    host_bytes: int
    device_bytes: int
    steps: int


class AdapterManager:
    """The engine's adapters: what the registry has, and what of it is in memory. Thread-safe."""

    def __init__(
        self, registry: Registry, model: ServingModel, config: ServerConfig, vacate: Callable[[Any], None]
    ) -> None:
        self.registry = registry
        self._model = model
        self._trust = trusted_keys(config)
        self._sites = {path: (layer.in_features, layer.out_features) for path, layer in model.layers.items()}
        self.manifest = lru_cache(maxsize=4096)(registry.manifest)
        self.memory = HostMemory(
            self._load,
            self._size_of,
            budget_bytes=config.host_bytes,
            threads=config.load_threads,
            vacate=vacate,
        )

    def resolve(self, reference: str) -> Resolved:
        """What a reference means now; see `Registry.resolve`."""
        return self.registry.resolve(reference)

    def load(self, digest: str) -> Future[float]:
        """Begins to load; see `HostMemory.load`."""
        self.check_base(digest)
        return self.memory.load(digest)

    def unload(self, digest: str) -> Future[int]:
        """Gives memory back; see `HostMemory.unload`."""
        return self.memory.unload(digest)

    def pin(self, digest: str, pinned: bool) -> None:
        """Keeps in memory, or lets go; see `HostMemory.pin`."""
        if pinned:
            self.check_base(digest)
        self.memory.pin(digest, pinned)

    def residency(self, digest: str) -> ResidencyInfo:
        """What of a digest is in memory."""
        return self.memory.residency(digest)

    def resident(self) -> tuple[str, ...]:
        """The digests in memory."""
        return self.memory.resident()

    def subscribe(self, listener: Callable[[AdapterEvent], None]) -> Callable[[], None]:
        """Tells of loads and unloads; see `HostMemory.subscribe`."""
        return self.memory.subscribe(listener)

    def servable(self, digest: str) -> bool:
        """Whether the adapter was made for the base at hand."""
        return self.manifest(digest).base_fingerprint == self._model.base.info.fingerprint

    def check_base(self, digest: str) -> Manifest:
        """The manifest. Raises BaseMismatch for an adapter of another base."""
        manifest = self.manifest(digest)
        ours = self._model.base.info.fingerprint
        if manifest.base_fingerprint != ours:
            raise BaseMismatch(
                f"The adapter was trained on base {manifest.base_reference} ({manifest.base_fingerprint}); this server "
                f"holds {self._model.base.info.reference} ({ours}).",
                expected=ours,
                actual=manifest.base_fingerprint,
            )
        return manifest

    def _size_of(self, digest: str) -> int:
        return sum(file.size for file in self.manifest(digest).files if file.path.endswith(".safetensors"))

    def _load(self, digest: str) -> ServingForm:
        manifest = self.check_base(digest)
        snapshot = self.registry.open_snapshot(digest)
        if self._trust is not None:
            self._trust.check(snapshot, snapshot.signature)
        files = {entry.path: snapshot.read(entry.path) for entry in manifest.files}
        return build_form(manifest, files, self._model.base.files, self._sites)


class Engine:
    """One base, many adapters, one mixed batch."""

    def __init__(self, config: ServerConfig, model: ServingModel, registry: Registry) -> None:
        self.config = config
        self.base: BaseInfo = model.base.info
        self.tokenizer = model.base.tokenizer
        self._model = model
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._accepting = False
        self._rows: dict[int, Row] = {}
        self.end_ids = frozenset(end_token_ids(model.base))

        self._blocks = BlockPool(model.cache_shapes, config.kv_bytes, model.dtype, model.device)
        pools = {
            path: RankPool(layer.in_features, layer.out_features, model.dtype, model.device)
            for path, layer in model.layers.items()
        }
        self._device = DeviceMemory(model.layers, pools, config.device_bytes, model.dtype)
        scheduler = Scheduler(
            self._blocks,
            self._device,
            max_rows=config.max_rows,
            step_tokens=config.step_tokens,
            chunked=model.causal,
        )
        self._loop = Loop(
            scheduler,
            Runner(model, self._blocks),
            pooler=model.pooler is not None,
            encoder=not model.causal,
            left=self._left,
            stuck=lambda: self.adapters.memory.relieve(),
        )
        self.adapters = AdapterManager(
            registry, model, config, vacate=lambda r: self._loop.post(lambda: self._device.vacate(r))
        )

    @classmethod
    def create(cls, config: ServerConfig) -> Engine:
        """Loads the base and opens the registry; blocks for as long as that takes."""
        registry = Registry.open(config.registry)
        trusted_keys(config)  # a wrong key is told before the base is loaded

        def load() -> Engine:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            return cls(config, ServingModel.load(config), registry)

        # In a thread that ends: each thread that computes keeps OpenMP workers for as long as it lives, and with more
        # of them than cores libgomp puts the workers of all to sleep between any two products. The engine's thread is
        # to be the only one that computes; 16 mixed rows ran at 95 tokens per second beside the loader's idle workers,
        # at 155 without.
        with ThreadPoolExecutor(1, thread_name_prefix="base-load") as thread:
            return thread.submit(load).result()

    def start(self) -> None:
        """Begins to answer."""
        self._accepting = True
        self._loop.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuses new rows, lets the others finish for so long, cancels what is left, and ends the threads."""
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + drain_seconds
        while self._rows and time.monotonic() < deadline:
            time.sleep(0.01)
        self._loop.stop()
        for row in list(self._rows.values()):  # submitted while the loop ended: nobody else will tell them
            self._left(row)
            row.request.listener(Cancelled("The server is stopping."))
        self.adapters.memory.close()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues rows that enter the batch in one step: one request, or one input's arms.

        From any thread; never blocks. Raises Unavailable, QueueFull, InvalidArgument, TaskMismatch or BaseMismatch,
        and then nothing was queued. Adapters that are not in memory begin to load; what goes wrong there comes to
        the listeners.
        """
        for request in requests:
            self._check(request)
        with self._lock:
            if not self._accepting:
                raise Unavailable("The server is starting or stopping; it takes no requests now.")
            waiting = len(self._rows)
            if waiting + len(requests) > self.config.max_queue + self.config.max_rows:
                raise QueueFull(
                    f"{waiting} rows run or wait, as many as this server takes; try again.",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            now = time.monotonic()
            group = Group([self._row(request, now) for request in requests])
            self._rows.update((row.request.id, row) for row in group.rows)
        try:
            for row in group.rows:
                held = []
                for part in row.request.arm.parts:
                    held.append(self.adapters.memory.hold(part.digest))
                    row.residents = tuple(held)
        except AdapterbayError:
            for row in group.rows:
                self._left(row)
            raise
        self._loop.post(lambda: self._loop.scheduler.add(group))
        residents = [resident for row in group.rows for resident in row.residents]
        wait_all(residents, lambda error: self._loop.post(lambda: self._loaded(group, error)))

    def cancel(self, request: Request) -> None:
        """Frees a row within one step; its listener hears Cancelled, unless it was over already."""
        request.cancelled = True
        self._loop.post(lambda: None)

    def stats(self) -> EngineStats:
        """What runs, waits and lies in memory."""
        running = len(self._loop.scheduler.running)
        return EngineStats(
            waiting=max(len(self._rows) - running, 0),
            running=running,
            blocks=self._blocks.blocks,
            free_blocks=self._blocks.free_blocks,
            host_bytes=self.adapters.memory.used_bytes,
            device_bytes=self._device.used_bytes,
            steps=self._loop.steps,
        )

    def new_tokens(self, request: Request) -> int:
        """How many tokens a request may produce: what it asked for, or the default within the context."""
        task = request.task
        if not isinstance(task, GenerateTask):
            return 0
        left = self.base.max_length - len(task.prompt_ids)
        asked = task.sampling.max_tokens
        return min(DEFAULT_NEW_TOKENS, left) if asked is None else asked

    def _check(self, request: Request) -> None:
        """What can be told to be wrong before anything is loaded."""
        task = request.task
        ids = task.prompt_ids if isinstance(task, GenerateTask) else task.token_ids
        limit = self.base.max_length
        if not ids:
            raise InvalidArgument("The text has no tokens.", field="input")
        if isinstance(task, GenerateTask):
            if not self._model.causal:
                raise TaskMismatch(
                    f"Base {self.base.reference} is an encoder; it labels and embeds, it does not generate."
                )
            if len(ids) + max(self.new_tokens(request), 1) > limit:
                raise InvalidArgument(
                    f"The prompt has {len(ids)} tokens and {self.new_tokens(request)} more are asked for; this base "
                    f"takes {limit} in all.",
                    field="sampling.max_tokens" if len(ids) < limit else "input",
                )
        elif len(ids) > limit:
            raise InvalidArgument(f"The text has {len(ids)} tokens; this base takes {limit}.", field="texts")
        if isinstance(task, ClassifyTask):
            if not request.arm.parts:
                blend_heads((), ())
            if not self._model.causal and self._model.pooler is None:
                raise TaskMismatch(f"Classification on base {self.base.reference} needs a pooler, which it has not.")
        for part in request.arm.parts:
            self.adapters.check_base(part.digest)
        needed = blocks_for(len(ids) + max(self.new_tokens(request) - 1, 0))
        if self._model.causal and needed > self._blocks.blocks:
            raise InvalidArgument(
                f"This request needs {needed} cache blocks and the server has {self._blocks.blocks}; ask for fewer "
                "tokens, or raise kv_bytes.",
                field="sampling.max_tokens",
            )

    def _row(self, request: Request, now: float) -> Row:
        request.id = next(self._ids)
        request.submitted_at = now
        task = request.task
        ids = task.prompt_ids if isinstance(task, GenerateTask) else task.token_ids
        row = Row(request, list(ids), len(ids), self.new_tokens(request), loaded_at=now)
        if isinstance(task, GenerateTask):
            row.output = Generating(row, self.tokenizer, self.end_ids)
        else:
            row.output = StatePooler(self._pooling(task))
        return row

    def _pooling(self, task: ClassifyTask | EmbedTask) -> Pooling:
        """A decoder is labelled by its last token's state, an encoder through its pooler by the first one's."""
        if isinstance(task, EmbedTask):
            return task.pooling
        return Pooling.LAST if self._model.causal else Pooling.FIRST

    def _loaded(self, group: Group, error: AdapterbayError | None) -> None:
        """On the engine's thread: the group's adapters are in host memory, or one could not be loaded."""
        if any(row.request.id not in self._rows for row in group.rows):
            return  # over already: cancelled, or its deadline passed
        if error is None:
            error = self._unfit(group)
        if error is not None:
            self._loop.fail_group(group, error)
            return
        now = time.monotonic()
        for row in group.rows:
            row.loaded_at = now if row.residents else row.request.submitted_at
        group.ready = True

    def _unfit(self, group: Group) -> AdapterbayError | None:
        """What loaded adapters show to be impossible."""
        if len(group.rows) > self.config.max_rows:
            return InvalidArgument(
                f"{len(group.rows)} rows must run together and the server runs {self.config.max_rows}.", field="arms"
            )
        blocks = sum(blocks_for(row.most_tokens) for row in group.rows)
        if self._model.causal and blocks > self._blocks.blocks:
            return InvalidArgument(
                f"{len(group.rows)} rows that run together need {blocks} cache blocks and the server has "
                f"{self._blocks.blocks}; ask for fewer tokens, or raise kv_bytes.",
                field="sampling.max_tokens",
            )
        residents = {r.key: r for row in group.rows for r in row.residents}
        needed = sum(map(self._device.size, residents.values()))
        if needed > self._device.budget_bytes:
            return InvalidArgument(
                f"The adapters of this request take {needed} bytes together; the device budget is "
                f"{self._device.budget_bytes}. Fuse fewer, or raise device_bytes.",
                field="selection",
            )
        try:
            for row in group.rows:
                if isinstance(row.request.task, ClassifyTask):
                    blend_heads([r.ready for r in row.residents], [p.weight for p in row.request.arm.parts])
        except TaskMismatch as mismatch:
            return mismatch
        return None

    def _left(self, row: Row) -> None:
        """A row is over: let go of its adapters and its place."""
        with self._lock:
            self._rows.pop(row.request.id, None)
        for resident in row.residents:
            self.adapters.memory.release(resident)


def end_token_ids(base: Any) -> set[int]:
    """Every token that ends a generation: the generation config's, else the config's, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(base.model, "generation_config", None), base.model.config):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    if base.tokenizer.eos_token_id is not None:
        found.add(base.tokenizer.eos_token_id)
    return found
