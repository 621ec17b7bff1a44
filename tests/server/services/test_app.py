"""The server as a process and its phases: health, reflection, a used port, signals, draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serving_tools import Failure, Served, tiny_config
from zoo import Zoo

from adapterbay.registry.errors import InvalidArgument
from adapterbay.server.app import SERVICES, Server, serve
from adapterbay.server.engine import Engine
from adapterbay.server.services.gate import Phase
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc
from adapterbay.v1 import inference_pb2 as pb

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def check(channel: grpc.Channel, service: str = "") -> int:
    return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_health_knows_every_service(channel: grpc.Channel) -> None:
    for service in ("", *SERVICES):
        assert check(channel, service) == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(channel, "adapterbay.v1.NoService")
    assert Failure(caught.value).code is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_and_describes_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="adapterbay.v1.InferenceService"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listed.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == names
    assert described.file_descriptor_response.file_descriptor_proto


async def test_before_the_base_is_loaded_calls_are_refused_not_unknown(zoo: Zoo) -> None:
    server = Server(tiny_config(zoo))
    await server.open_port()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server._port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            for call in (
                inference_pb2_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest(base=True, prompt="a")),
                inference_pb2_grpc.InferenceServiceStub(channel).GenerateStream(pb.GenerateStreamRequest()).read(),
                adapters_pb2_grpc.AdapterServiceStub(channel).ListAdapters(adapters_pb2.ListAdaptersRequest()),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                found = Failure(caught.value)
                assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, Phase.STARTING.value)
    finally:
        await server.close()


def test_a_server_whose_engine_cannot_go_on_says_so(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits hears of it, who comes is refused, and whoever watches its health may restart it."""
    with Served(zoo) as served, grpc.insecure_channel(served.address) as channel:
        scheduler = served.engine._loop.scheduler

        def lose() -> None:
            scheduler._blocks.take(1)
            raise ZeroDivisionError("turns")

        monkeypatch.setattr(scheduler, "schedule", lose)
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        seen = []
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                inference.Generate(pb.GenerateRequest(base=True, prompt="a"), timeout=30)
            seen.append(Failure(caught.value).code)
        assert seen == [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE]
        until = time.monotonic() + 20
        while any(check(channel, service) != NOT_SERVING for service in ("", *SERVICES)):
            assert time.monotonic() < until


def test_draining_refuses_new_calls_and_finishes_old_ones(zoo: Zoo) -> None:
    with Served(zoo) as served, grpc.insecure_channel(served.address) as channel:
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        running = inference.GenerateStream(
            pb.GenerateStreamRequest(
                adapter="tales", prompt="go", sampling=pb.Sampling(max_tokens=500, ignore_end=True)
            )
        )
        next(running)
        watching = adapters_pb2_grpc.AdapterServiceStub(channel).WatchAdapters(
            adapters_pb2.WatchAdaptersRequest(snapshot=True)
        )
        next(watching)
        stopping = threading.Thread(target=served.stop)
        stopping.start()
        refused: Failure | None = None
        health: list[int] = []
        while refused is None:
            try:
                inference.Generate(pb.GenerateRequest(base=True, prompt="a", sampling=pb.Sampling(max_tokens=1)))
            except grpc.RpcError as error:
                refused = Failure(error)
                health.append(check(channel))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, Phase.DRAINING.value)
        assert health == [NOT_SERVING]
        pieces = list(running)
        assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
        with pytest.raises(grpc.RpcError) as caught:
            list(watching)
        assert Failure(caught.value).code is grpc.StatusCode.UNAVAILABLE
        stopping.join(30)
        assert not stopping.is_alive()


def test_a_drain_ends_at_its_limit(zoo: Zoo) -> None:
    with Served(zoo, drain_seconds=0.2) as served, grpc.insecure_channel(served.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [
            stub.GenerateStream(
                pb.GenerateStreamRequest(base=True, prompt="go", sampling=pb.Sampling(max_tokens=500, ignore_end=True))
            )
            for _ in range(32)
        ]
        for call in calls:
            next(call)
        served.stop()
        codes = set()
        for call in calls:
            try:
                list(call)
            except grpc.RpcError as error:
                codes.add(Failure(error).code)
        assert codes
        assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}


async def test_a_used_port_is_refused_before_anything_is_loaded(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "create", lambda *_: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgument, match=f"Port {port} on 127.0.0.1 is in use") as caught:
            await serve(tiny_config(zoo, port=port))
        assert caught.value.field == "port"


async def test_an_unknown_host_is_refused(zoo: Zoo) -> None:
    with pytest.raises(InvalidArgument, match=r"host\.invalid") as caught:
        await serve(tiny_config(zoo, host="host.invalid"))
    assert caught.value.field == "host"


async def test_a_stop_while_loading_ends_at_once(zoo: Zoo) -> None:
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(serve(tiny_config(zoo), stop=stop, ready=lambda _: pytest.fail("served")), 10)


def command(zoo: Zoo, *extra: str) -> list[str]:
    return [
        str(Path(sys.executable).parent / "server"),
        "start",
        *("--base", str(zoo.base), "--registry", str(zoo.registry.root), "--quantize", "none", "--dtype", "float32"),
        *extra,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class Process:
    """A server in a process of its own."""

    def __init__(self, zoo: Zoo, folder: Path, *extra: str) -> None:
        self._port_file = folder / "port"
        arguments = command(zoo, "--port", "0", "--port-file", str(self._port_file), "--device", "cpu", *extra)
        self.popen = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )

    def port(self) -> int:
        until = time.monotonic() + 90
        while not self._port_file.exists():
            assert self.popen.poll() is None, self.popen.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        return int(self._port_file.read_text())

    def finish(self, seconds: float = 30) -> tuple[int, str, str]:
        out, err = self.popen.communicate(timeout=seconds)
        return self.popen.returncode, out, err


@pytest.fixture
def process(zoo: Zoo, tmp_path: Path) -> Iterator[Process]:
    made = Process(zoo, tmp_path, "--json-ready", "--drain-seconds", "30")
    yield made
    if made.popen.poll() is None:
        made.popen.kill()
        made.popen.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0_while_a_stream_runs(process: Process, number: signal.Signals) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{process.port()}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateStreamRequest(
            adapter="tales", prompt="go", sampling=pb.Sampling(max_tokens=500, ignore_end=True)
        )
        stream = stub.GenerateStream(request)
        pieces = [next(stream)]
        process.popen.send_signal(number)
        pieces += stream
        assert pieces[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert sum(len(piece.token_ids) for piece in pieces) == 500
    code, out, err = process.finish()
    assert code == 0, err
    assert "Traceback" not in err
    held: dict[str, Any] = json.loads(out)
    assert held["port"] > 0
    assert held["parameters"] > 0
    assert held["bytes"] >= held["parameters"] * 4
    assert (held["dtype"], held["quantization"]) == ("float32", "none")
    assert held["fingerprint"].startswith("sha256:")
    assert 0 < held["start_seconds"] < 90


@pytest.mark.slow
def test_a_signal_while_the_base_loads_exits_0(zoo: Zoo, tmp_path: Path) -> None:
    """At several moments of loading: as soon as the port answers, and later."""
    for index, wait in enumerate((0.0, 0.3)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        popen = subprocess.Popen(
            command(zoo, "--port", str(port), "--device", "cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
            grpc.channel_ready_future(channel).result(60)
        time.sleep(wait)
        popen.send_signal(signal.SIGTERM)
        _, err = popen.communicate(timeout=30)
        assert popen.returncode == 0, (index, err)
        assert "Traceback" not in err


@pytest.mark.slow
def test_a_second_signal_cuts_the_drain_short(process: Process) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{process.port()}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        requests = [
            pb.GenerateStreamRequest(base=True, prompt="go", sampling=pb.Sampling(max_tokens=500, ignore_end=True))
        ] * 32
        for call in [stub.GenerateStream(request) for request in requests]:
            next(call)
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.popen.send_signal(signal.SIGTERM)
        code, _, err = process.finish(10)
    assert code == 0, err


@pytest.mark.slow
def test_settings_that_cannot_work_are_one_line_and_exit_2(zoo: Zoo, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            "is in use": command(zoo, "--port", port),
            "no-such-base": command(zoo, "--port", "0", "--base", str(tmp_path / "no-such-base")),
            "quant": command(zoo, "--port", "0", "--quantize", "int3"),
            "--max-batch 0": command(zoo, "--port", "0", "--max-batch", "0"),
            "log level": command(zoo, "--port", "0", "--log-level", "loud"),
        }
        running = {
            words: subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            )
            for words, arguments in cases.items()
        }
        for words, popen in running.items():
            out, err = popen.communicate(timeout=120)
            assert popen.returncode == 2, (words, err)
            assert words in err
            assert out == ""
            lines = [line for line in err.splitlines() if line.strip()]
            assert len(lines) == 1, lines
            assert lines[0].startswith("error: ")
