"""Run as a script without torch: pushes that are killed, and pushes at the same time. Prints one JSON object.

crash_worker.py kill REGISTRY ADAPTER COUNT SEED
crash_worker.py together REGISTRY ADAPTER PROCESSES
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from adapterbay.registry import Registry


def new_content(folder: Path, number: int) -> None:
    """Changes the last value of the weights, so that every push has a blob of its own."""
    weights = folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = (0x3C000000 + number).to_bytes(4, "little")
    weights.write_bytes(data)


def start_push(registry: Path, folder: Path, name: str) -> tuple[int, int]:
    """Forks a push. Returns its process and a pipe that says when it begins."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store = Registry.open(registry)
            os.write(writing, b"!")
            store.push(folder, name, aliases=["champion"])
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    os.read(reading, 1)
    return child, reading


def kill_pushes(registry: Path, folder: Path, count: int, seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    store = Registry.open(registry)
    number, durations = 0, []
    for _ in range(9):
        number += 1
        new_content(folder, number)
        child, reading = start_push(registry, folder, "warm/up")
        began = time.perf_counter()
        _, status = os.waitpid(child, 0)
        durations.append(time.perf_counter() - began)
        os.close(reading)
        assert status == 0
    duration = statistics.median(durations)
    instants: Counter[str] = Counter()
    landed = finished = 0
    while landed < count:
        name = f"team/x{landed // 20}"  # few versions each, so that verifying after every kill stays quick
        number += 1
        new_content(folder, number)
        versions = store.resolve(name).version if store.adapters(name) else 0
        before = on_disk(registry)
        child, reading = start_push(registry, folder, name)
        time.sleep(dice.uniform(0, 1.1 * duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        if not os.WIFSIGNALED(status):
            finished += 1
            continue
        landed += 1
        instants[check(registry, name, versions, before)] += 1
        if landed % 5 == 0:  # the very push that was killed works again
            again = store.push(folder, name, aliases=["champion"])
            assert again.version == len(store.versions(name))
            assert store.verify(name).leftovers == 0
            assert not list((registry / "tmp").iterdir())
    assert store.verify().ok
    return {
        "landed": landed,
        "finished_before_the_kill": finished,
        "push_milliseconds": round(1000 * duration, 1),
        "instants": dict(instants),
        "versions": sum(adapter.versions for adapter in store.adapters()),
    }


def on_disk(registry: Path) -> dict[str, set[tuple[str, int]]]:
    """What is there, with inodes: a leftover of an earlier kill is not taken for one of this kill."""
    return {
        kind: {(str(path), path.stat().st_ino) for path in (registry / kind).rglob("*")}
        for kind in ("tmp", "blobs", "adapters")
    }


def check(registry: Path, name: str, versions: int, before: dict[str, set[tuple[str, int]]]) -> str:
    """Everything that must hold after a kill; says at which stage of the push it struck."""
    store = Registry.open(registry, create=False)
    now = store.versions(name) if store.adapters(name) else []
    assert [record.version for record in now] == list(range(1, len(now) + 1))
    assert len(now) in (versions, versions + 1)
    if now:
        report = store.verify(name)
        assert report.ok, report.problems
        # The version and its alias came together or not at all.
        assert store.aliases(name) == {"champion": len(now)}
        store.open_snapshot(now[-1].digest)
    assert [event.sequence for event in store.events(limit=100_000)] == list(range(1, store.last_event() + 1))
    store.close()
    if len(now) > versions:
        return "after the commit"
    after = on_disk(registry)
    if after["adapters"] - before["adapters"]:
        return "between record and commit"
    if after["blobs"] - before["blobs"]:
        return "between blobs and record"
    return "staging" if after["tmp"] - before["tmp"] else "before staging"


def push_together(registry: Path, folder: Path, processes: int) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes)
    answers: Any = context.Queue()

    def work(number: int) -> None:
        own = folder.parent / f"own-{number}"
        shutil.copytree(folder, own)
        new_content(own, number % 4)  # some share their blobs
        barrier.wait()
        receipt = Registry.open(registry).push(own, "team/x", aliases=["champion"])
        answers.put(receipt.version)

    workers = [context.Process(target=work, args=(number,)) for number in range(processes)]
    for worker in workers:
        worker.start()
    versions = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    store = Registry.open(registry, create=False)
    report = store.verify()
    return {
        "versions": sorted(versions),
        "listed": [record.version for record in store.versions("team/x")],
        "aliases": store.aliases("team/x"),
        "digests": len({record.digest for record in store.versions("team/x")}),
        "problems": [str(problem) for problem in report.problems],
        "leftovers": report.leftovers,
        "temporary": len(list((registry / "tmp").iterdir())),
    }


def main() -> None:
    mode, registry, adapter, *rest = sys.argv[1:]
    folder = Path(registry).parent / "source"
    shutil.copytree(adapter, folder)
    if mode == "kill":
        answer = kill_pushes(Path(registry), folder, int(rest[0]), int(rest[1]))
    else:
        answer = push_together(Path(registry), folder, int(rest[0]))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
