"""The engine of this project as a system under test: in this process, as the gRPC service calls it, or behind gRPC.

Runs as a process of its own (`python -m suite.ours`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapterbay.base.text import encode_text
from adapterbay.registry import Registry
from adapterbay.server.config import ServerConfig
from adapterbay.server.engine import Engine
from adapterbay.server.requests import (
    ArmSpec,
    ClassifyTask,
    Delta,
    EmbedTask,
    GenerateTask,
    Part,
    Request,
    SamplingSpec,
    Task,
)
from suite.bare import serve_bare
from suite.process import answer, peak_mb, reset_peak

READY_SECONDS = 600.0


class Heard:
    """What one request heard, and when: seconds since `began`."""

    def __init__(self, began: float, done: threading.Semaphore) -> None:
        self.began = began
        self.first = 0.0
        self.total = 0.0
        self.tokens = 0
        self.final: Any = None
        self._done = done

    def __call__(self, event: object) -> None:
        now = time.perf_counter()
        if isinstance(event, Delta):
            self.first = self.first or now - self.began
            self.tokens += len(event.token_ids)
            return
        self.final = event
        self.total = now - self.began
        self._done.release()


class Ours:
    """One engine over one registry."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._registry: Any = None
        self._stop: Any = None
        self._loop: Any = None
        self._bare: Any = None
        self._thread: threading.Thread | None = None

    def open(self, registry: str, settings: dict[str, Any], grpc: bool = False) -> dict[str, Any]:
        """Starts an engine with ServerConfig's `settings`, behind gRPC on a free port if asked; what it holds."""
        self.close()
        began = time.perf_counter()
        config = ServerConfig(registry=registry, **{"max_queue": 100_000, **settings})
        self._registry = Registry.open(registry)
        port = 0
        if grpc:
            port = self._serve(config)
        else:
            self._engine = Engine.create(config)
            self._engine.start()
        info = self._engine.base
        return {
            "name": f"adapterbay {info.quantization} {info.dtype}",
            "seconds": time.perf_counter() - began,
            "base_bytes": info.bytes,
            "port": port,
            "versions": {n: importlib.metadata.version(n) for n in ("adapterbay", "torch", "transformers", "peft")},
        }

    def close(self) -> None:
        """Stops the engine."""
        if self._thread is not None:
            if self._bare is not None:
                asyncio.run_coroutine_threadsafe(self._bare.stop(None), self._loop).result()
                self._bare = None
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None
        elif self._engine is not None:
            self._engine.stop()
        self._engine = None

    def play(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Submits every request when it is due and waits for all. Latencies count from the time it was due."""
        prepared = [(self._generation(r), r["at"]) for r in sorted(requests, key=lambda r: r["at"])]
        done = threading.Semaphore(0)
        began = time.perf_counter()
        heard = []
        for (arm, task), at in prepared:
            if (wait := began + at - time.perf_counter()) > 0:
                time.sleep(wait)
            heard.append(Heard(began + at, done))
            self._engine.submit([Request(arm, task, heard[-1])])
        self._wait(done, heard)
        return {
            "tokens": sum(h.tokens for h in heard),
            "requests": len(heard),
            "seconds": time.perf_counter() - began,
            "first": [h.first for h in heard],
            "total": [h.total for h in heard],
        }

    def classify(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """All rows at once, each under its adapter's head; a row of the base is embedded, for it has no head."""
        tasks: list[tuple[ArmSpec, Task]] = []
        for row in rows:
            ids = tuple(row["ids"])
            task = EmbedTask(ids) if row["adapter"] is None else ClassifyTask(ids)
            tasks.append((self._arm(row["adapter"]), task))
        done = threading.Semaphore(0)
        began = time.perf_counter()
        heard = [Heard(began, done) for _ in tasks]
        for (arm, task), listener in zip(tasks, heard, strict=True):
            self._engine.submit([Request(arm, task, listener)])
        self._wait(done, heard)
        labels = [
            h.final.labels[max(range(len(h.final.logits)), key=h.final.logits.__getitem__)]
            if hasattr(h.final, "logits")
            else ""
            for h in heard
        ]
        return {"seconds": time.perf_counter() - began, "labels": labels}

    def label(self, texts: list[str], adapter: str, max_length: int) -> list[str]:
        """The label of each text, cut as in training."""
        rows = [
            {"ids": encode_text(self._engine.tokenizer, text, max_length=max_length), "adapter": adapter}
            for text in texts
        ]
        found: list[str] = self.classify(rows)["labels"]
        return found

    def once(self, request: dict[str, Any], from_text: bool) -> float:
        """Seconds of one request called in this process: from its token ids, or from its text and reference on."""
        prepared = None if from_text else self._generation(request)
        done = threading.Semaphore(0)
        began = time.perf_counter()
        if prepared is None:
            self._arm.cache_clear()
            ids = tuple(encode_text(self._engine.tokenizer, request["prompt"]))
            prepared = self._arm(request["adapter"]), self._greedy(ids, request["tokens"])
        heard = Heard(began, done)
        self._engine.submit([Request(*prepared, heard)])
        self._wait(done, [heard])
        return heard.total

    def bare(self, request: dict[str, Any]) -> int:
        """The port of a server that runs just this request, with nothing but grpcio before the engine."""
        arm, task = self._generation(request)

        def submit(told: Callable[[object], None]) -> None:
            self._engine.submit([Request(arm, task, lambda event: None if isinstance(event, Delta) else told(event))])

        self._bare, port = asyncio.run_coroutine_threadsafe(serve_bare(submit), self._loop).result()
        return port

    def first_token(self, request: dict[str, Any], cold: str | None = None) -> float:
        """Seconds to the first token of one request. `cold` "memory": its adapter is unloaded first; "disk": and its
        files leave the system's page cache."""
        name = request["adapter"]
        if cold is not None:
            resolved = self._registry.resolve(name)
            self._engine.adapters.unload(resolved.digest).result()
            if cold == "disk":
                drop_pages(Path(self._registry.root), resolved.digest, self._registry)
        return float(self.play([{**request, "tokens": 1, "at": 0.0}])["first"][0])

    def load(self, names: list[str]) -> None:
        """Brings adapters into host memory, as their first requests do."""
        for name in names:
            self._engine.adapters.load(self._registry.resolve(name).digest).result()

    def swap(self, request: dict[str, Any], name: str, alias: str, version: int) -> dict[str, float]:
        """Moves an alias and asks through it: seconds of the move, and of the next request, its resolving included."""
        began = time.perf_counter()
        self._registry.set_alias(name, alias, version)
        moved = time.perf_counter() - began
        return {"move": moved, "next": self.once({**request, "adapter": f"{name}@{alias}"}, from_text=True)}

    def perplexity(self, windows: list[list[int]], context: int) -> float:
        """See `suite.quality`."""
        from suite.quality import served_perplexity

        return served_perplexity(self._engine, windows, context)

    def device_bytes(self) -> int:
        """What adapters take on the device now."""
        return int(self._engine.stats().device_bytes)

    def reset_peak(self) -> None:
        """Begins to watch memory anew."""
        reset_peak()

    def peak_mb(self) -> float:
        """Peak memory of this process."""
        return peak_mb()

    def _generation(self, request: dict[str, Any]) -> tuple[ArmSpec, Task]:
        prompt = request["prompt"]
        ids = self._encoded(prompt) if isinstance(prompt, str) else tuple(prompt)
        chosen = request["adapter"]
        key = tuple(chosen.items()) if isinstance(chosen, dict) else chosen
        return self._arm(key), self._greedy(ids, request["tokens"])

    @staticmethod
    def _greedy(ids: tuple[int, ...], tokens: int) -> GenerateTask:
        return GenerateTask(ids, SamplingSpec(max_tokens=tokens, ignore_end=True))

    @lru_cache(maxsize=1024)  # noqa: B019 - one object for the process's life
    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(encode_text(self._engine.tokenizer, text))

    @lru_cache(maxsize=4096)  # noqa: B019
    def _arm(self, chosen: str | tuple[tuple[str, float], ...] | None) -> ArmSpec:
        if chosen is None:
            return ArmSpec()
        parts = []
        for reference, weight in ((chosen, 1.0),) if isinstance(chosen, str) else chosen:
            found = self._engine.adapters.resolve(reference)
            parts.append(Part(reference, found.name, found.version, found.digest, weight))
        return ArmSpec(tuple(parts))

    @staticmethod
    def _wait(done: threading.Semaphore, heard: list[Heard]) -> None:
        for _ in heard:
            done.acquire()
        for each in heard:
            if isinstance(each.final, BaseException):
                raise each.final

    def _serve(self, config: ServerConfig) -> int:
        from adapterbay.server.app import Serving, serve

        ready: dict[str, Any] = {}
        up = threading.Event()

        def is_ready(serving: Serving) -> None:
            ready["serving"] = serving
            up.set()

        async def main() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            await serve(config.model_copy(update={"port": 0}), ready=is_ready, stop=self._stop)

        def run() -> None:
            try:
                asyncio.run(main())
            except BaseException as error:
                ready["error"] = error
                raise
            finally:
                up.set()

        self._thread = threading.Thread(target=run, name="server")
        self._thread.start()
        up.wait(READY_SECONDS)
        if "serving" not in ready:
            raise RuntimeError(f"the server did not come up: {ready.get('error')!r}")
        self._engine = ready["serving"].engine
        return int(ready["serving"].port)


def drop_pages(root: Path, digest: str, registry: Registry) -> None:
    """Takes a version's files out of the system's page cache, so that the next read comes from the disk (Linux)."""
    for entry in registry.manifest(digest).files:
        path = registry.blobs.path(entry.digest)
        with contextlib.suppress(OSError):
            descriptor = os.open(path if path.is_absolute() else root / path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


if __name__ == "__main__":
    answer(Ours())
