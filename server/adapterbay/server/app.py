"""A whole server: binds its port, loads the base, serves, and on a signal drains and stops.

The port is bound and health answers before the base is loaded, so a used port fails at once and a probe sees
NOT_SERVING, not silence. Our own services refuse calls as UNAVAILABLE until the engine runs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from adapterbay.registry.errors import InvalidArgument
from adapterbay.server.config import ServerConfig
from adapterbay.server.engine import Engine
from adapterbay.server.metrics import MetricsServer
from adapterbay.server.services import AdapterService, InferenceService
from adapterbay.server.services.gate import Gate, GatedServices, Phase
from adapterbay.server.watch import AdapterFeed
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

MEBIBYTE = 1 << 20
RECEIVE_BYTES = 64 * MEBIBYTE
SEND_BYTES = 256 * MEBIBYTE
SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
OVERALL = ""  # the health service's name for the server as a whole
OPTIONS = (
    ("grpc.so_reuseport", 0),  # a used port is an error, not a share of somebody else's traffic
    ("grpc.max_receive_message_length", RECEIVE_BYTES),
    ("grpc.max_send_message_length", SEND_BYTES),
    ("grpc.keepalive_time_ms", 60_000),  # finds dead peers that hold a stream
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)

BLOCKING_THREAD = "adapterbay-blocking"

_logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that takes requests."""

    engine: Engine
    host: str
    port: int
    metrics_port: int | None = None


async def serve(
    config: ServerConfig,
    *,
    ready: Callable[[Serving], None] = lambda _: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves until SIGTERM, SIGINT or `stop`, then drains for up to `config.drain_seconds`.

    `ready` is called once requests are taken. Raises InvalidArgument if the port is taken or the host unknown, and
    what loading the base raises. A second signal cuts the drain short.
    """
    stop, hurry = stop or asyncio.Event(), asyncio.Event()
    server = Server(config)
    with _signals(stop, hurry):
        try:
            await server.open_port()
            engine = await _before(stop, _on_daemon_thread(lambda: Engine.create(config)))
            if engine is not None:
                async with server.serving(engine) as serving:
                    ready(serving)
                    await stop.wait()
                    await server.drain(hurry)
        finally:
            await server.close()


class Server:
    """The gRPC side of a server and its phases: starting, serving, draining."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._gate = Gate()
        self._probes = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs leave asyncio out
        self._services = GatedServices(self._gate)
        self._server = grpc.aio.server(handlers=[self._services], options=OPTIONS)
        self._port = 0
        self._metrics: MetricsServer | None = None

    async def open_port(self) -> None:
        """Binds the ports and answers health (NOT_SERVING) and reflection."""
        self._port = _bind(self._server, self._config.host, self._config.port)
        if self._config.metrics_port is not None:
            self._metrics = MetricsServer(self._config.metrics_host, self._config.metrics_port)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        health_pb2_grpc.add_HealthServicer_to_server(self._probes, self._server)
        reflection.enable_server_reflection(names, self._server)
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    @contextlib.asynccontextmanager
    async def serving(self, engine: Engine) -> AsyncIterator[Serving]:
        """Runs the engine and takes requests inside the block."""
        engine.start()
        try:
            async with AdapterFeed(engine.adapters) as feed:
                late = cast(grpc.aio.Server, self._services)  # as far as these functions use a server
                inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(engine), late)
                adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(engine, feed), late)
                self._gate.phase = Phase.SERVING
                await self._report(health_pb2.HealthCheckResponse.SERVING)
                engine.on_fault(self._ill(asyncio.get_running_loop()))
                with self._shown(engine):
                    metrics_port = self._metrics.port if self._metrics is not None else None
                    yield Serving(engine=engine, host=self._config.host, port=self._port, metrics_port=metrics_port)
                self._gate.phase = Phase.DRAINING
            # Answers on their way out get a moment; what is left is cancelled, which frees its rows.
            await self._server.stop(grace=0.5)
        finally:
            await _on_daemon_thread(lambda: engine.stop(0.0))

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuses new requests and waits for those under way, up to `drain_seconds` or until `hurry`."""
        seconds = self._config.drain_seconds
        _logger.info("stopping: %d calls under way, up to %g s to finish", self._gate.under_way, seconds)
        self._gate.phase = Phase.DRAINING
        await self._probes.enter_graceful_shutdown()
        await _before(hurry, self._gate.idle(), timeout=seconds)
        if self._gate.under_way:
            _logger.warning("%d calls did not finish in time and are cancelled", self._gate.under_way)

    async def close(self) -> None:
        """Ends everything. Works in every phase."""
        await self._server.stop(grace=None)
        if self._metrics is not None:
            await _on_daemon_thread(self._metrics.close)

    @contextlib.contextmanager
    def _shown(self, engine: Engine) -> Iterator[None]:
        """Metrics tell of the engine inside the block."""
        hide = self._metrics.show(engine, self._gate.ended) if self._metrics is not None else lambda: None
        try:
            yield
        finally:
            hide()

    def _ill(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        """What says, from any thread, that this server answers no more requests: whoever watches it may restart it."""

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended before
                asyncio.run_coroutine_threadsafe(self._report(health_pb2.HealthCheckResponse.NOT_SERVING), loop)

        return tell

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in (OVERALL, *SERVICES):
            await self._probes.set(service, status)


async def _before(event: asyncio.Event, work: Awaitable[T], timeout: float | None = None) -> T | None:
    """The result of `work`, or None if `event` or the timeout came first; `work` is cancelled then."""
    task, signal_ = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, signal_}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        signal_.cancel()


def _on_daemon_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Runs blocking work on a thread that does not keep the process alive, as an executor's would."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name=BLOCKING_THREAD, daemon=True).start()
    return asyncio.wrap_future(future)


def left_behind() -> bool:
    """Whether a load still runs after its server was stopped: a thread inside torch cannot be ended."""
    return any(thread.name == BLOCKING_THREAD for thread in threading.enumerate())


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Binds and returns the real port. gRPC reports a failed bind in its own log only, so we look first."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found[:1]:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        return server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except socket.gaierror as error:
        raise InvalidArgument(f"The host {host!r} cannot be found: {error.strerror}.", field="host") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"Port {port} on {host} is in use; choose another one, or 0 for any free port."
        else:
            why = f"Port {port} on {host} cannot be bound: {error.strerror}."
        raise InvalidArgument(why, field="port") from error
    except RuntimeError as error:
        raise InvalidArgument(f"Port {port} on {host} cannot be bound.", field="port") from error


@contextlib.contextmanager
def _signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets `stop`, the second `hurry`. Only the main thread may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
