"""Host memory and the engine: who tells whom that bytes are free, and that there is room."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import Harness, held
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import Cancelled, DeadlineExceeded, EngineFault, Unavailable
from adapterbay.registry.fusing import FusionSettings
from adapterbay.server.adapters.residency import Resident
from adapterbay.server.requests import GenerateTask, SamplingSpec

PROMPT = [30, 31, 32, 33]
NAMES = ("m0", "m1", "m2", "m3")
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def own(zoos: dict[str, Zoo], tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Adapters of one size."""
    folder: Path = tmp_path_factory.mktemp("memory")
    zoo = Zoo(zoos["llama"].base, Registry.open(folder / "registry"))
    for seed, name in enumerate(NAMES):
        zoo.add(name, folder / name, targets=EVERYWHERE, rank=4, seed=seed)
    return zoo


@pytest.fixture(scope="module")
def size(own: Zoo) -> int:
    with Harness(own.base, own.registry) as harness:
        harness.load("m0")
        return harness.engine.adapters.memory.used_bytes


@pytest.fixture
def two(own: Zoo, size: int) -> Iterator[Harness]:
    """An engine with host memory for two."""
    with Harness(own.base, own.registry, host_bytes=2 * size + 100, max_rows=4) as harness:
        yield harness


def digest(harness: Harness, name: str) -> str:
    return harness.engine.adapters.resolve(name).digest


@pytest.mark.parametrize("over", ["late", "cancelled"])
def test_what_nobody_waits_for_loads_nothing(two: Harness, over: str) -> None:
    two.load("m0", "m1")
    task = GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=2))
    answer, request = two.request("m2", task, deadline=time.monotonic() if over == "late" else None)
    request.cancelled = over == "cancelled"
    with pytest.raises(DeadlineExceeded if over == "late" else Cancelled):
        two.engine.submit([request])
    assert not answer.done.is_set()
    assert not two.engine._rows
    assert two.engine.adapters.memory.tally.misses.of() == two.engine.adapters.memory.tally.evictions.of() == 0
    assert set(two.engine.adapters.resident()) == {digest(two, "m0"), digest(two, "m1")}


def test_who_gives_way_in_host_memory_gives_way_on_the_device(two: Harness) -> None:
    """And is counted there; who was unloaded on demand is not."""
    two.generate("m0", PROMPT, 2).wait()
    two.engine.adapters.unload(digest(two, "m0")).result(20)
    assert two.engine.device_tally.evictions.of() == 0
    for name in ("m0", "m1", "m2"):
        two.generate(name, PROMPT, 2).wait()
    assert two.engine.adapters.memory.counts().on_device == 2
    assert two.engine.adapters.memory.tally.evictions.of() == two.engine.device_tally.evictions.of() == 1


def test_memory_is_free_when_that_is_said(two: Harness, size: int) -> None:
    """A step is under way: who is unloaded or gives way still has its bytes, and nobody gets them."""
    memory, device = two.engine.adapters.memory, two.engine._device
    for name in ("m0", "m1"):
        two.generate(name, PROMPT, 2).wait()
    two.idle()
    with held(two.engine):
        freed = two.engine.adapters.unload(digest(two, "m0"))
        loads = [two.engine.adapters.load(digest(two, name)) for name in ("m2", "m3")]
        assert not freed.done()
        assert not any(load.done() for load in loads)
        assert memory.used_bytes == 2 * size
        assert memory.counts().loading == 0
    assert freed.result(20) == 2 * size
    for load in loads:
        load.result(20)
    assert memory.used_bytes == 2 * size
    assert device.used_bytes == 0


def test_pins_that_fill_the_budget_stop_nobody(two: Harness) -> None:
    """Rows of the pinned run without pause, and others are answered meanwhile."""
    for name in ("m0", "m1"):
        two.engine.adapters.pin(digest(two, name), True)
        two.load(name)
    running = two.generate("m0", PROMPT, 300)
    answers = [two.generate(name, PROMPT, 2) for name in ("m2", "m3", "m2")]
    for answer in answers:
        assert len(answer.generated().token_ids) == 2
    assert not running.done.is_set()
    running.wait()
    two.idle()
    until = time.monotonic() + 20
    while two.engine.stats().host_bytes > two.engine.config.host_bytes:
        assert time.monotonic() < until


def test_arms_that_run_together_go_beyond_the_budget_together(two: Harness) -> None:
    for name in ("m0", "m1"):
        two.engine.adapters.pin(digest(two, name), True)
        two.load(name)
    task = GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=2))
    asked = [two.request(name, task) for name in ("m2", "m3")]
    two.engine.submit([request for _, request in asked])
    for answer, _ in asked:
        answer.wait(20)


def test_a_refused_request_has_the_engine_look_again(two: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing of it is held any more: what it held may have been all that others waited for."""
    first, second = (digest(two, name) for name in ("m0", "m1"))
    adapters, hold, held_then = two.engine.adapters, two.engine.adapters.hold, []

    def refuse(key: str, *others: Any) -> Resident:
        if key == second:
            raise Unavailable("no")
        return hold(key, *others)

    def post(_: object) -> None:
        held_then.append(adapters.residency(first).active_rows)

    task = GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=2))
    asked = [two.request(name, task)[1] for name in ("m0", "m1")]
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "hold", refuse)
        patch.setattr(two.engine._loop, "post", post)
        with pytest.raises(Unavailable):
            two.engine.submit(asked)
    assert held_then == [0]


def test_files_are_looked_at_once_and_by_nobody_who_has_others_wait(
    two: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, looks = two.engine.adapters, []
    paths, path = type(adapters.registry.blobs), type(adapters.registry.blobs).path

    def looked_at(*blob: Any) -> Path:
        if threading.current_thread() is threading.main_thread():
            looks.append(adapters._fusing.locked())
        return path(*blob)

    arms = [two.fused({"m0": 1.0, "m1": weight}, FusionSettings("cat")) for weight in (0.5, 1.0)]
    for name in ("m0", "m1"):
        adapters.check_base(digest(two, name))  # the manifests are known
    monkeypatch.setattr(paths, "path", looked_at)
    for arm in arms:
        two.generate(arm, PROMPT, 2).wait()
    assert looks == [False, False]


def test_an_engine_that_stopped_keeps_nobody_waiting(two: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    two.load("m0", "m1")

    def fail(*_: object) -> None:
        raise ZeroDivisionError("turns")

    monkeypatch.setattr(type(two.engine._loop), "_end_all", lambda *_: False)
    with held(two.engine):
        answer = two.generate("m0", PROMPT, 2)
        monkeypatch.setattr(two.engine._loop, "_turn", fail)
    with pytest.raises(EngineFault):
        answer.wait(20)
    two.engine._loop._thread.join(20)
    assert two.engine.adapters.unload(digest(two, "m0")).result(20) > 0
    with pytest.raises(Unavailable):
        two.engine.adapters.load(digest(two, "m2"))
