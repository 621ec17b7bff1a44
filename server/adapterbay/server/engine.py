"""The engine as others see it: submit rows, cancel them, ask what is in memory. Its loop has a thread of its own."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from adapterbay.base.load import BaseInfo
from adapterbay.registry import Registry
from adapterbay.registry.errors import (
    AdapterbayError,
    Cancelled,
    EngineFault,
    InvalidArgument,
    QueueFull,
    TaskMismatch,
    Unavailable,
)
from adapterbay.registry.location import folder_of
from adapterbay.server.adapters.device import DeviceMemory
from adapterbay.server.adapters.fusing import check_fusable, check_fused_head
from adapterbay.server.adapters.manager import AdapterManager
from adapterbay.server.adapters.residency import Resident
from adapterbay.server.adapters.tally import CountedPlaces, RowTally, TierTally
from adapterbay.server.adapters.waiting import wait_all
from adapterbay.server.batch import Group, Row
from adapterbay.server.blocks import blocks_for
from adapterbay.server.config import ServerConfig
from adapterbay.server.generation import Generating, end_token_ids
from adapterbay.server.intake import fit_row, give_source
from adapterbay.server.kv import BlockPool
from adapterbay.server.loop import Loop
from adapterbay.server.model import ServingModel
from adapterbay.server.pooling import NO_HEAD, Heads, StatePooler, collector
from adapterbay.server.requests import ClassifyTask, ClassifyTokensTask, EmbedTask, GenerateTask, Request
from adapterbay.server.runner import Runner
from adapterbay.server.scheduler import Scheduler
from adapterbay.server.trim import trim
from adapterbay.server.trust import trusted_keys

DEFAULT_NEW_TOKENS = 256
RETRY_AFTER_SECONDS = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of the engine. Bytes are what adapters take in each tier.

    Since the start: `preemptions` counts rows that gave way and began again, `reusable_tokens` the tokens of rows that
    looked for key/value blocks which others had computed, `reused_tokens` those that they found.
    """

    waiting: int
    running: int
    blocks: int
    free_blocks: int
    host_bytes: int
    device_bytes: int
    steps: int
    preemptions: int
    reusable_tokens: int
    reused_tokens: int


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
        self._fault: EngineFault | None = None
        self._on_fault: Callable[[], None] = lambda: None
        self._rows: dict[int, Row] = {}
        self.row_tally = RowTally()
        self.device_tally = TierTally()
        self.end_ids = frozenset(end_token_ids(model.base))

        self._blocks = BlockPool(model.cache_shapes, config.kv_bytes, model.dtype, model.device)
        self._device = DeviceMemory(model.sites, config.device_bytes)
        self._heads = Heads(model.device, pooler=model.pooler is not None)
        scheduler = Scheduler(
            self._blocks.ledger,
            CountedPlaces(self._device, self.device_tally),
            max_rows=config.max_rows,
            step_tokens=config.step_tokens,
            chunked=model.causal and model.seq2seq is None,
        )
        self._loop = Loop(
            scheduler,
            Runner(model, self._blocks),
            left=self._left,
            stuck=lambda: self.adapters.memory.relieve(),
            broken=self._broken,
        )
        self.adapters = AdapterManager(
            registry,
            model,
            config,
            vacate=lambda r: self._loop.post(lambda: self._vacate(r)),
            wake=lambda: self._loop.post(lambda: None),
        )

    @classmethod
    def create(cls, config: ServerConfig) -> Engine:
        """Loads the base and opens the registry; blocks for as long as that takes.

        A folder that is not there becomes a registry; a bare word that is neither a folder nor a name is a slip of the
        pen. Raises what `folder_of`, `Registry.open` and loading the base raise.
        """
        registry = Registry.open(folder_of(config.registry, create=False))
        trusted_keys(config)  # a wrong key is told before the base is loaded

        def load() -> Engine:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            engine = cls(config, ServingModel.load(config), registry)
            trim()  # of what loading left behind
            return engine

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
        with ExitStack() as ending:
            ending.callback(self.adapters.memory.close)
            for row in list(self._rows.values()):  # submitted while the loop ended: nobody else will tell them
                ending.callback(row.request.listener, Cancelled("The server is stopping."))
                ending.callback(self._left, row)

    def on_fault(self, call: Callable[[], None]) -> None:
        """Has `call` called, on another thread, when the engine cannot go on; at once if that is already so."""
        with self._lock:
            self._on_fault = call
            late = self._fault is not None
        if late:
            call()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues rows that enter the batch in one step: one request, or one input's arms.

        From any thread; waits for no other row, but an adapter's manifest and sizes are read when it is first met.
        Raises Unavailable, QueueFull, InvalidArgument, TaskMismatch or BaseMismatch, or Cancelled or DeadlineExceeded
        for what nobody waits for, and then nothing was queued. Adapters that are not in memory begin to load; what goes
        wrong there comes to the listeners.
        """
        for request in requests:
            self._check(request)
        with self._lock:
            if self._fault is not None:
                raise Unavailable(f"The engine has stopped; restart the server. {self._fault.message}")
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
                for digest, _ in row.request.arm.key:
                    held.append(self.adapters.hold(digest, row.request.arm, row.claim))
                    row.residents = tuple(held)
        except Exception:
            with ExitStack() as ending:
                ending.callback(self._loop.post, lambda: None)  # it may have been stuck while these rows held adapters
                for row in group.rows:
                    ending.callback(self._left, row)
            raise
        self._loop.post(lambda: self._loop.scheduler.add(group))
        residents = [resident for row in group.rows for resident in row.residents]
        wait_all(residents, lambda error: self._loop.post(lambda: self._loaded(group, error)))

    def cancel(self, request: Request) -> None:
        """Frees a row within one step; its listener hears Cancelled, unless it was over already."""
        request.cancelled = True
        self._loop.post(lambda: None)

    @property
    def kernels(self) -> str:
        """Whether the CPU kernels are used, how long that took, and for how much of the base."""
        fast = self._model.fast
        fused = f", {fast.fused} of {len(fast.layers)} layers fused" if fast is not None else ", no layer fused"
        return f"{self._model.kernels}{fused if self._model.kernels.loaded else ''}"

    def stats(self) -> EngineStats:
        """What runs, waits and lies in memory."""
        scheduler = self._loop.scheduler
        running = len(scheduler.running)
        return EngineStats(
            waiting=max(len(self._rows) - running, 0),
            running=running,
            blocks=self._blocks.blocks,
            free_blocks=self._blocks.free_blocks,
            host_bytes=self.adapters.memory.used_bytes,
            device_bytes=self._device.used_bytes,
            steps=self._loop.steps,
            preemptions=scheduler.preemptions,
            reusable_tokens=scheduler.reusable_tokens,
            reused_tokens=scheduler.reused_tokens,
        )

    def new_tokens(self, request: Request) -> int:
        """How many tokens a request may produce: what it asked for, or the default within the context."""
        task = request.task
        if not isinstance(task, GenerateTask):
            return 0
        left = self.base.max_length - (len(task.prompt_ids) if self._model.seq2seq is None else 0)
        asked = task.sampling.max_tokens
        return min(DEFAULT_NEW_TOKENS, left) if asked is None else asked

    def _check(self, request: Request) -> None:
        """What can be told to be wrong before anything is loaded."""
        over = request.over(time.monotonic())
        if over is not None:
            raise over  # before it loads anything
        task = request.task
        ids = task.prompt_ids if isinstance(task, GenerateTask) else task.token_ids
        limit = self.base.max_length
        if not ids:
            raise InvalidArgument("The text has no tokens.", field="input")
        if isinstance(task, GenerateTask):
            if not self._model.causal:
                raise self._of_base(f"Base {self.base.reference} is an encoder; it labels and embeds, no more.")
            shared = self._model.seq2seq is None  # a context for the prompt and the answer, or one for each
            if max(self.new_tokens(request), 1) + (len(ids) if shared else 0) > limit or len(ids) > limit:
                raise InvalidArgument(
                    f"The prompt has {len(ids)} tokens and {max(self.new_tokens(request), 1)} more are asked for; this "
                    f"base takes {limit} in all.",
                    field="sampling.max_tokens" if len(ids) < limit else "input",
                )
        elif len(ids) > limit:
            raise InvalidArgument(f"The text has {len(ids)} tokens; this base takes {limit}.", field="texts")
        if isinstance(task, ClassifyTask | ClassifyTokensTask) and not request.arm.parts:
            raise self._of_base(NO_HEAD.format("The base has"))
        for part in request.arm.parts:
            self.adapters.check_base(part.digest)
        needed = blocks_for(len(ids) + max(self.new_tokens(request) - 1, 0))
        if self._model.seq2seq is not None:
            needed = blocks_for(len(ids)) + blocks_for(max(self.new_tokens(request), 1))
        if self._model.causal and needed > self._blocks.blocks:
            raise self._too_many_blocks("This request needs", needed, [request])

    def _row(self, request: Request, now: float) -> Row:
        request.id = next(self._ids)
        request.submitted_at = now
        task = request.task
        ids = task.prompt_ids if isinstance(task, GenerateTask) else task.token_ids
        row = Row(request, list(ids), len(ids), self.new_tokens(request), loaded_at=now)
        if self._model.seq2seq is not None:
            give_source(row, self._model.seq2seq.start_token)
        if isinstance(task, GenerateTask):
            row.output = Generating(row, self.tokenizer, self.end_ids)
        elif isinstance(task, EmbedTask):
            row.output = StatePooler(task.pooling)
        return row

    def _take_head(self, row: Row) -> None:
        """Gives a row that is to be labelled its head. Raises TaskMismatch."""
        task = row.request.task
        if isinstance(task, ClassifyTask | ClassifyTokensTask):
            check_fused_head(row.request.arm, [resident.ready for resident in row.residents])
            row.head = self._heads.of(row.residents, row.request.arm, task)
            row.output = collector(row, self._model.padding)

    def _loaded(self, group: Group, error: AdapterbayError | None) -> None:
        """On the engine's thread: the group's adapters are in host memory, or one could not be loaded."""
        if any(row.request.id not in self._rows for row in group.rows):
            return  # over already: cancelled, or its deadline passed
        if error is None:
            try:
                error = self._unfit(group)
            except Exception as mistake:
                log.exception("rows could not be made ready")
                error = EngineFault(f"The rows could not be made ready: {mistake!r}")
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
        try:
            for row in group.rows:
                if row.request.arm.fusion is None:  # a derived adapter was checked when it was made
                    check_fusable(row.request.arm, [resident.ready for resident in row.residents])
                self._take_head(row)
                shares_blocks = self._model.causal and self.config.prefix_cache and self._model.seq2seq is None
                fit_row(row, self._model.attention_shapes, self.base.max_length, shares_blocks=shares_blocks)
        except AdapterbayError as unfit:
            return unfit
        blocks = sum(blocks_for(row.most_tokens) + blocks_for(len(row.source)) for row in group.rows)
        if self._model.causal and blocks > self._blocks.blocks:
            return self._too_many_blocks(
                f"{len(group.rows)} rows that run together need", blocks, [row.request for row in group.rows]
            )
        residents = {r.key: r for row in group.rows for r in row.residents}
        needed = sum(map(self._device.size, residents.values()))
        if needed > self._device.budget_bytes:
            return InvalidArgument(
                f"The adapters of this request take {needed} bytes together; the device budget is "
                f"{self._device.budget_bytes}. Fuse fewer, or raise device_bytes.",
                field="selection",
            )
        return None

    def _too_many_blocks(self, who: str, needed: int, requests: Sequence[Request]) -> InvalidArgument:
        """The refusal of what the cache could never hold: generated tokens can be fewer, texts must be shorter."""
        generates = any(self.new_tokens(request) > 1 for request in requests)
        return InvalidArgument(
            f"{who} {needed} cache blocks and the server has {self._blocks.blocks}; "
            f"{'ask for fewer tokens' if generates else 'send less text'}, or raise kv_bytes.",
            field="sampling.max_tokens" if generates else _text_field(requests[0]),
        )

    def _of_base(self, message: str) -> TaskMismatch:
        """What the base cannot do, whatever adapters are named."""
        return TaskMismatch(message, metadata={"base_reference": self.base.reference})

    def _broken(self, fault: EngineFault) -> None:
        """On the engine's thread, which ends: nobody is left waiting, and nobody new is taken."""
        with self._lock:
            self._fault, self._accepting = fault, False
            tell = self._on_fault
        log.critical("the engine cannot go on: %s", fault.message)
        calls = [tell]
        for row in list(self._rows.values()):
            calls += [partial(row.request.listener, fault), partial(self._left, row)]
        calls.append(self.adapters.memory.close)  # who waits for a load or an unload hears of it, too
        for call in calls:  # each whatever became of the others
            try:
                call()
            except Exception:
                log.exception("not everybody could be told that the engine stopped")

    def _vacate(self, resident: Resident) -> None:
        if resident.on_device and not resident.unloaded:
            self.device_tally.evictions.add()
        with ExitStack() as ending:  # whatever fails: its bytes would count for ever
            ending.callback(self.adapters.memory.emptied, resident)
            self._device.vacate(resident)
            self._heads.drop(resident)
            self._loop.forget()

    def _left(self, row: Row) -> None:
        """A row is over: let go of its adapters and its place."""
        with self._lock:
            self._rows.pop(row.request.id, None)
        residents, row.residents = row.residents, ()  # who keeps the row for a while keeps no weights with it
        with ExitStack() as ending:  # all of it, even if a part fails, which is raised then
            for resident in residents:
                ending.callback(self.adapters.memory.release, resident, row.claim)
            self.row_tally.ended(row)


def _text_field(request: Request) -> str:
    return "input" if isinstance(request.task, GenerateTask) else "texts"
