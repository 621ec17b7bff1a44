"""What a single call pays: a cold adapter, a moved alias, gRPC, and the server's start."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.bare import bare_call
from suite.field import OURS, material
from suite.measure import Bench, Ratio, say
from suite.process import BENCH, SystemFailed
from suite.workloads import prompt, request

START_SECONDS = 600.0
WARM_CALLS = 5
SWAPPED, ALIAS = "swapped", "champion"


def milliseconds(seconds: Sequence[float]) -> float:
    """Their median."""
    return 1000 * statistics.median(seconds)


def run_cold(bench: Bench) -> None:
    """First token through an adapter that is not in memory, and through the same when it is; rank 8, local disk."""
    names = list(material(bench))
    with bench.workers() as launch:
        ours = launch(OURS, "suite.ours")
        bench.engine(ours, bench.folder("field") / "registry")
        ask = request(prompt(0), 1)
        for _ in range(3):
            ours.call("first_token", request=ask)  # the base's own first steps
        times: dict[str, list[float]] = {}
        for number in range(bench.settings.rounds):
            for name in names:
                mine = {**ask, "adapter": name}
                order = ("disk", "memory") if number % 2 == 0 else ("memory", "disk")
                for cold in order:
                    times.setdefault(cold, []).append(ours.call("first_token", request=mine, cold=cold))
                    times.setdefault(f"warm after {cold}", []).append(ours.call("first_token", request=mine))
            say(f"cold: round {number + 1} of {bench.settings.rounds}")
    facts = {f"first token, {kind}, ms": milliseconds(found) for kind, found in times.items()}
    for kind, title in (("disk", "read from the disk"), ("memory", "its files in the page cache")):
        pairs = zip(times[kind], times[f"warm after {kind}"], strict=True)
        extra = milliseconds([cold - warm for cold, warm in pairs])
        facts[f"cold over warm, {title}, ms"] = extra
        label = f"cold adapter's first token above a warm one, ms ({title})"
        bench.report.ratios.append(Ratio(label, extra, floor=50.0, lower=True))
    bench.report.facts["cold"] = facts


def run_swap(bench: Bench) -> None:
    """The first request after an alias moved between two warm versions, against one when nothing moved."""
    folder = bench.folder("swap")
    bench.material().call("adapters", folder=str(folder), prefix=SWAPPED, count=2, rank=8, targets=["q_proj", "v_proj"])
    name = f"{SWAPPED}0"
    bench.material().call("swapped", folder=str(folder), name=name, alias=ALIAS, other=f"{SWAPPED}1")
    with bench.workers() as launch:
        ours = launch(OURS, "suite.ours")
        bench.engine(ours, folder / "registry")
        ask = request(prompt(0), 1)
        for version in (1, 2, 1, 2):
            ours.call("swap", request=ask, name=name, alias=ALIAS, version=version)
        still, moved, moves = [], [], []
        for number in range(bench.settings.trials):
            still.append(ours.call("once", request={**ask, "adapter": f"{name}@{ALIAS}"}, from_text=True))
            found = ours.call("swap", request=ask, name=name, alias=ALIAS, version=number % 2 + 1)
            moved.append(found["next"])
            moves.append(found["move"])
    extra = milliseconds([after - before for after, before in zip(moved, still, strict=True)])
    bench.report.facts["swap"] = {
        "one token, alias unmoved, ms": milliseconds(still),
        "one token, alias just moved, ms": milliseconds(moved),
        "difference of pairs, ms": extra,
        "the move itself, ms": milliseconds(moves),
    }
    bench.report.ratios.append(Ratio("one token after an alias moved, above one before, ms", extra, lower=True))


def run_grpc(bench: Bench) -> None:
    """One request through gRPC from another process, and the same called in the server's process, turn by turn."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from adapterbay.client import Client

    names = list(material(bench))
    with bench.workers() as launch:
        ours = launch(OURS, "suite.ours")
        port = bench.engine(ours, bench.folder("field") / "registry", grpc=True)["port"]
        ask = request(prompt(0), 1, names[0])  # short: the noise of longer ones is more than the share
        alone = ours.call("bare", request=ask)
        with (
            Client(f"127.0.0.1:{port}") as client,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            grpc.insecure_channel(f"127.0.0.1:{alone}") as bare,
        ):
            health = health_pb2_grpc.HealthStub(channel)

            def timed(call: Callable[[], Any]) -> float:
                began = time.perf_counter()
                call()
                return time.perf_counter() - began

            def remote() -> Any:
                return client.generate(ask["prompt"], adapter=ask["adapter"], max_tokens=ask["tokens"], ignore_end=True)

            ways: dict[str, Callable[[], float]] = {
                "through gRPC": lambda: timed(remote),
                "through grpcio alone": lambda: timed(bare_call(bare)),
                "in process, from token ids": lambda: float(ours.call("once", request=ask, from_text=False)),
                "in process, from text and reference": lambda: float(ours.call("once", request=ask, from_text=True)),
                "a health check of the same server": lambda: timed(
                    lambda: health.Check(health_pb2.HealthCheckRequest())
                ),
            }
            times = in_turns(ways, bench.settings.trials)
    ours_, bare_, ids, text, _ = times.values()

    def share(there: Sequence[float], here: Sequence[float]) -> float:
        return milliseconds([one - other for one, other in zip(there, here, strict=True)])

    bench.report.facts["grpc"] = {
        **{f"{way}, ms": milliseconds(found) for way, found in times.items()},
        "share over token ids, median of pairs, ms": share(ours_, ids),
        "share over text and reference, median of pairs, ms": share(ours_, text),
        "grpcio's own share (over token ids), median of pairs, ms": share(bare_, ids),
    }
    bench.report.ratios += [
        Ratio("gRPC's share of a call, median, ms", share(ours_, text), floor=1.0, lower=True),
        Ratio("of that grpcio alone, before the same engine, ms", share(bare_, ids), lower=True),
    ]


def in_turns(ways: Mapping[str, Callable[[], float]], trials: int) -> dict[str, list[float]]:
    """What each way took, `trials` times; each comes after each other way equally often."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    for number in range(-WARM_CALLS, trials):
        for turn in range(len(names)):
            way = names[(turn * (1 if number % 2 else -1) + number) % len(names)]
            seconds = ways[way]()
            if number >= 0:
                times[way].append(seconds)
    return times


def run_start(bench: Bench) -> None:
    """From `server start` until it takes requests, and its first answer: with nothing compiled, then restarted."""
    folder = bench.folder("field") / "registry"
    material(bench)
    bench.rest()
    home = home_without_compiled(bench.folder("home"))
    starts = [started(bench, folder, home) for _ in range(bench.settings.rounds + 1)]
    again = starts[1:] or starts
    bench.report.facts["start"] = {
        "first start until ready, s": starts[0][0],
        "first start's first answer, s": starts[0][1],
        "restart until ready, s": statistics.median(ready for ready, _ in again),
        "restart's first answer, s": statistics.median(first for _, first in again),
    }


def home_without_compiled(home: Path) -> Path:
    """A fresh ADAPTERBAY_HOME that shares the converted bases and fingerprints, and nothing that was compiled."""
    import shutil

    from adapterbay.registry.base import home as real

    shutil.rmtree(home, ignore_errors=True)
    (home / "cache").mkdir(parents=True)
    for name in ("bases", "fingerprints", "gguf-digests"):
        if (real() / "cache" / name).is_dir():
            (home / "cache" / name).symlink_to(real() / "cache" / name)
    return home


def started(bench: Bench, registry: Path, home: Path) -> tuple[float, float]:
    """Seconds until a server took requests, and from then until its first answer to an adapter's request."""
    from adapterbay.client import Client

    port_file = home / "port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-c", "from adapterbay.cli.main import run_server; run_server()", "start"]
    command += ["--registry", str(registry), "--port", "0", "--port-file", str(port_file)]
    for key, value in bench.settings.engine.items():
        flag = {"max_rows": "max_batch"}.get(key, key)
        command += [f"--{flag.replace('_', '-')}", str(value)]
    compiled = {"ADAPTERBAY_HOME": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
    began = time.perf_counter()
    log = bench.settings.work / "logs" / "server-start.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=BENCH, env={**os.environ, **compiled})
    try:
        while not port_file.exists():
            if server.poll() is not None or time.perf_counter() - began > START_SECONDS:
                raise SystemFailed(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.005)
        ready = time.perf_counter() - began
        with Client(f"127.0.0.1:{port_file.read_text().strip()}") as client:
            client.generate(prompt(0), adapter="a0", max_tokens=4, ignore_end=True, timeout=START_SECONDS)
        return ready, time.perf_counter() - began - ready
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
