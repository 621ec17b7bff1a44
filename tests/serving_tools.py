"""Runs a real server, gRPC and engine and all, over a tiny random base, on a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2
from tiny import TARGETS, make_adapter, make_base
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.server.app import Serving, serve
from adapterbay.server.config import ServerConfig
from adapterbay.server.engine import Engine
from adapterbay.server.status import DETAILS_KEY

LABELS = ("no", "yes")


def make_small_zoo(root: Path) -> Zoo:
    """A Llama with two generators, two classifiers with the same labels, one with others, and one of another base."""
    zoo = Zoo(make_base(root / "base", "llama"), Registry.open(root / "registry"))
    targets = TARGETS["llama"]
    zoo.add("tales", root / "tales", targets=targets[1], rank=8, seed=1, scale=0.5)
    zoo.add("songs", root / "songs", targets=targets[0], rank=4, seed=2, scale=0.5)
    classifiers = {"sentiment": LABELS, "sentiment-b": LABELS, "stars": ("bad", "so-so", "good")}
    for index, (name, labels) in enumerate(classifiers.items()):
        folder = zoo.folders[name] = root / name
        settings: dict[str, Any] = {"targets": targets[index], "rank": 4, "seed": 9 + index, "scale": 0.5}
        make_adapter(zoo.base, folder, task="SEQ_CLS", labels=labels, **settings)
        zoo.registry.push(folder, name, base=f"folder:{zoo.base}", labels=labels)
    other = Zoo(make_base(root / "other", "llama", seed=7), zoo.registry)
    other.add("foreign", root / "foreign", targets=targets[0], rank=4, seed=3)
    zoo.registry.set_alias("sentiment", "champion", 1)
    return zoo


def tiny_config(zoo: Zoo, **settings: Any) -> ServerConfig:
    """A server over the zoo, in float32 on the CPU, on a free port."""
    chosen: dict[str, Any] = {
        "base": str(zoo.base),
        "registry": str(zoo.registry.root),
        "port": 0,
        "dtype": "float32",
        "quantize": "none",
        "device": "cpu",
        "kv_bytes": 64 << 20,
        "drain_seconds": 5.0,
    }
    return ServerConfig(**{**chosen, **settings})


class Served:
    """A server for the length of a `with` block."""

    def __init__(self, zoo: Zoo, **settings: Any) -> None:
        self.zoo = zoo
        self._config = tiny_config(zoo, **settings)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="test-server", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(120), "the server does not start"
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """As a signal would; returns when the server is gone."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not stop"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.serving.port}"

    @property
    def engine(self) -> Engine:
        return self.serving.engine

    def idle(self, seconds: float = 20) -> None:
        """Waits until no row runs or waits and every cache block is back."""
        until = time.monotonic() + seconds
        while True:
            stats = self.engine.stats()
            if stats.running == stats.waiting == 0 and stats.free_blocks == stats.blocks:
                return
            assert time.monotonic() < until, f"the engine is not idle: {stats}"
            time.sleep(0.005)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - carried to the test's thread
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def ready(serving: Serving) -> None:
            self.serving = serving
            self._ready.set()

        await serve(self._config, ready=ready, stop=self._stop)


class Failure:
    """A failed call, read the way any gRPC client may read it."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message = error.details() or ""
        self.reason, self.field, self.metadata, self.retry_after = "", "", dict[str, str](), None
        for key, value in error.trailing_metadata() or ():  # type: ignore[misc, attr-defined]
            if key == DETAILS_KEY:
                self._read(status_pb2.Status.FromString(value))

    def _read(self, status: Any) -> None:
        assert (status.code, status.message) == (self.code.value[0], self.message)
        for packed in status.details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if packed.Unpack(info):
                assert info.domain == "adapterbay"
                self.reason, self.metadata = info.reason, dict(info.metadata)
            elif packed.Unpack(bad):
                self.field = bad.field_violations[0].field
            elif packed.Unpack(retry):
                self.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
