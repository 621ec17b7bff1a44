"""Cold adapters on their way to the device: so much in a step while rows run, whole in the end, and all of it back."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from engine_tools import Answer, Harness, held
from tier_tools import PROMPT, never_waited, push_many, record_steps
from zoo import Zoo

from adapterbay.registry import Registry, durable
from adapterbay.server.adapters.alarm import Alarm
from adapterbay.server.adapters.device import SITE_BYTES
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.mix.pools import Layout, RankPool, Span, VectorPool
from adapterbay.server.trim import trim

COLD = 12


@pytest.fixture(scope="module")
def many(zoos: dict[str, Zoo], tmp_path_factory: pytest.TempPathFactory) -> Registry:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.os, "fsync", lambda _: None)
        return push_many(zoos["llama"].base, tmp_path_factory.mktemp("many"), COLD + 1)


@pytest.fixture
def harness(zoos: dict[str, Zoo], many: Registry) -> Iterator[Harness]:
    """Two modules in a step."""
    with Harness(zoos["llama"].base, many, max_rows=COLD + 2) as made:
        made.engine._device._step_bytes = 2 * SITE_BYTES
        yield made


def placed_in_steps(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many modules are placed before each step, from now on."""
    placed = [0]
    sites, runner = harness.engine._model.sites, harness.engine._loop._runner
    placing, run = sites.placing, runner.run

    def counted(_: object, key: str, form: ServingForm) -> Iterator[int]:
        for written in placing(key, form):
            placed[-1] += 1
            yield written

    def next_step(shares: object) -> object:
        placed.append(0)
        return run(shares)  # type: ignore[arg-type]

    monkeypatch.setattr(type(sites), "placing", counted)
    monkeypatch.setattr(runner, "run", next_step)
    return placed


def test_many_cold_adapters_do_not_stall_a_running_row(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{number}" for number in range(1, COLD + 1)]
    alone = [harness.generate(name, PROMPT, 6).generated().token_ids for name in names]
    for name in names:
        harness.engine.adapters.unload(harness.arm(name).parts[0].digest).result(20)
    harness.load("n0", *names)
    form = harness.engine.adapters.memory.form(harness.arm("n0").parts[0].digest)
    assert form is not None
    modules = len(form.layers)
    assert modules > 2, "an adapter that takes one step shows nothing"

    placed, steps = placed_in_steps(harness, monkeypatch), record_steps(harness)
    with held(harness.engine):
        running = harness.generate("n0", PROMPT, 100)
        cold = [harness.generate(name, PROMPT, 6) for name in names]
    assert len(running.generated().token_ids) == 100
    assert [answer.generated().token_ids for answer in cold] == alone
    assert never_waited(running, steps, 100)
    assert all(never_waited(answer, steps, 6) for answer in cold)
    assert placed[0] == modules, "the first one is alone and waits for nothing"
    assert max(placed[1:]) == 2
    assert sum(placed) == modules * (COLD + 1)
    began = [began_at(answer, steps) for answer in cold]
    assert began == sorted(began), "they overtook each other"


def test_who_is_there_does_not_wait_for_who_is_being_placed(harness: Harness) -> None:
    """A warm request behind a cold one starts at once."""
    harness.generate("n1", PROMPT, 1).wait()
    harness.load("n2")
    steps = record_steps(harness)
    with held(harness.engine):
        running, cold, warm = (
            harness.generate(arm, PROMPT, count) for arm, count in (("n1", 30), ("n2", 2), (None, 2))
        )
    for answer in (running, cold, warm):
        answer.wait()
    assert began_at(running, steps) == began_at(warm, steps) < began_at(cold, steps)


def test_an_adapter_that_is_placed_over_several_steps_is_a_miss(harness: Harness) -> None:
    """Two cold adapters in one row, one of which is whole before the other."""
    harness.load("n1", "n2", "n3")
    tally = harness.engine.device_tally
    with held(harness.engine):
        running = harness.generate("n1", PROMPT, 100)
        cold = harness.generate({"n2": 0.5, "n3": 0.5}, PROMPT, 2)
    for answer in (running, cold):
        answer.wait()
    assert (tally.hits.of(), tally.misses.of()) == (0, 3)
    harness.generate({"n2": 0.5, "n3": 0.5}, PROMPT, 2).wait()
    assert (tally.hits.of(), tally.misses.of()) == (2, 3)


@pytest.mark.parametrize("then", ["unload", "room for another"])
def test_what_is_half_there_leaves_nothing(harness: Harness, then: str) -> None:
    """A cold row is cancelled while its adapter's modules are being placed."""
    engine = harness.engine
    device = engine._device
    digests = {name: harness.arm(name).parts[0].digest for name in ("n1", "n2", "n3")}
    harness.load(*digests)
    device._step_bytes = 1
    with held(engine):
        running = harness.generate("n1", PROMPT, 200)
        cold = harness.generate("n2", PROMPT, 2)
        assert cold.request is not None
        running.on_delta = lambda answer: len(answer.deltas) == 3 and engine.cancel(cold.request)
    assert cold.done.wait(20)
    with held(engine):
        assert not running.done.is_set()
        assert [resident.digest for resident in device.placed()] == [digests["n1"]]
        assert len(device._placing) == 1, "it was never half there"
        one = device.size(next(iter(device.placed())))
        assert device.used_bytes == 2 * one
        if then == "unload":
            engine.adapters.unload(digests["n2"])
        else:
            device._budget = 2 * one
            device._step_bytes = 1 << 20
            other = harness.generate("n3", PROMPT, 2)
    if then != "unload":
        other.wait()
    with held(engine):
        assert not device._placing
        assert device.used_bytes == (one if then == "unload" else 2 * one)
        layers = [layer.site for layer in engine._model.sites.linears.values() if layer.site is not None]
        assert not [key for site in layers for key in site.pool.spans if key.startswith(digests["n2"])]
    running.wait()
    harness.idle()


def test_an_unload_gives_the_pools_back_without_another_step(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps keep for the next one must not keep the pools of an idle server; and then it goes to the system."""
    engine, trimmed = harness.engine, threading.Event()
    memory = engine.adapters.memory
    assert memory._trimming.call is trim
    monkeypatch.setattr(memory, "_trimming", Alarm(trimmed.set))
    harness.generate("n1", PROMPT, 3).wait()
    harness.idle()
    sites = [layer.site for layer in engine._model.sites.linears.values() if layer.site is not None]
    pools = [weakref.ref(tensor) for site in sites for tensor in (site.pool.a, site.pool.b)]
    assert any(tensor.numel() for pool in pools if (tensor := pool()) is not None)
    tensor = None
    engine.adapters.unload(harness.arm("n1").parts[0].digest).result(20)
    with held(engine):  # what was left for the engine's thread is done
        assert engine.stats().device_bytes == 0
    assert tensor is None
    assert not [pool for pool in pools if pool() is not None]
    assert trimmed.wait(20)


def test_layouts_are_shared_and_forgotten() -> None:
    """Pools that change alike get one layout; a layout that no pool has is gone, however it was come to."""
    first, second = Layout.of({}), Layout.of({})
    assert first is second
    one = first.moved("a", Span(0, 4, 1.0))
    assert second.moved("a", Span(0, 4, 1.0)) is one
    assert one.first_fit(2) == 4 == one.used
    two = one.moved("b", Span(4, 2, 1.0))
    left = two.moved("a", None)
    assert left.first_fit(4) == 0
    assert left.first_fit(5) == left.used == 6
    assert left is Layout.of({"b": Span(4, 2, 1.0)})
    assert two.moved("a", None) is left
    gone = [weakref.ref(layout) for layout in (one, two, left)]
    del one, two, left
    assert not [layout for layout in gone if layout() is not None]


@pytest.mark.parametrize("kind", ["ranks", "vectors"])
def test_pools_shrink_when_they_empty(kind: str) -> None:
    device = torch.device("cpu")
    pool = RankPool(8, 4, torch.float32, device) if kind == "ranks" else VectorPool(8, device)
    at_first = pool.bytes
    for number in range(40):
        if isinstance(pool, RankPool):
            pool.place(f"k{number}", torch.ones(2, 8), torch.ones(2, 4), 1.0)
        else:
            pool.place(f"k{number}", torch.ones(8))
    full = pool.bytes
    for number in range(39, 0, -1):
        pool.remove(f"k{number}")
    assert pool.bytes <= full // 4
    pool.remove("k0")
    assert pool.bytes == at_first == 0


def began_at(answer: Answer, steps: list[set[int]]) -> int:
    assert answer.request is not None
    return next(at for at, rows in enumerate(steps) if answer.request.id in rows)
