"""Host memory by itself: its budget, who gives way, pins, and loads that fail or turn out larger than their files."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from engine_tools import Harness
from memory_tools import SECONDS, Make, Memory, memories
from tiny import TARGETS, make_adapter, make_base
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import BaseMismatch, Corrupted, InvalidArgument, Unavailable
from adapterbay.server.adapters.claims import Claim
from adapterbay.server.adapters.loaders import beside, loading_threads
from adapterbay.server.adapters.residency import Residency
from adapterbay.server.adapters.tally import Histogram
from adapterbay.server.trim import trim


@pytest.fixture
def make(zoos: dict[str, Zoo]) -> Iterator[Make]:
    with memories(zoos["llama"].registry) as memory:
        yield memory


def test_the_least_recently_used_gives_way(make: Make) -> None:
    memory = make(300, dict.fromkeys("abcd", 100))
    memory.touched("a", "b", "c", "a", "d")
    assert memory.host.resident() == ("c", "a", "d")
    assert memory.vacated == ["b"]
    assert (memory.host.tally.hits.of(), memory.host.tally.misses.of()) == (1, 4)
    assert memory.host.tally.evictions.of() == 1
    assert sum(memory.host.tally.load_seconds.read()[0]) == 4


def test_nobody_gives_way_for_what_would_not_fit_anyway(make: Make) -> None:
    memory = make(300, {"a": 100, "b": 100, "large": 250})
    memory.touched("a")
    held = memory.used("b")
    large = memory.hold("large")
    assert memory.host.resident() == ("a", "b")
    assert memory.host.counts().queued == 1
    memory.release(held)
    large.loading.result(SECONDS)
    assert memory.host.resident() == ("large",)


def test_the_pinned_and_the_held_stay(make: Make) -> None:
    memory = make(300, dict.fromkeys("abcde", 100))
    memory.host.pin("a", True)
    held = memory.used("b")
    memory.touched("c", "d", "e")
    assert set(memory.host.resident()) == {"a", "b", "e"}
    memory.release(held)
    memory.host.pin("a", False)
    memory.touched("c", "d")
    assert memory.host.resident() == ("e", "c", "d")


def test_pins_stop_at_the_budget(make: Make) -> None:
    memory = make(250, dict.fromkeys("abc", 100))
    for digest in "aba":
        memory.host.pin(digest, True)
    with pytest.raises(InvalidArgument, match="cannot be pinned"):
        memory.host.pin("c", True)
    memory.host.load("a").result(SECONDS)
    with pytest.raises(InvalidArgument, match="pinned"):
        memory.host.unload("a")
    assert memory.host.counts().pinned == 2


def test_a_form_that_is_larger_than_its_files_keeps_to_the_budget(make: Make) -> None:
    """It is known by its size from then on; it waits for the one that is held, and takes the place of the idle one."""
    memory = make(300, dict.fromkeys(("a", "b", "grows"), 100), grows=252)
    memory.touched("a")
    held = memory.used("b")
    grows = memory.hold("grows")
    while not memory.host.counts().queued:
        assert not grows.loading.done()
    assert memory.host.used_bytes == 200
    assert memory.host.resident() == ("a", "b")
    memory.release(held)
    grows.loading.result(SECONDS)
    assert memory.loads.count("grows") == 2
    assert memory.host.used_bytes == 252
    memory.release(grows)
    memory.touched("a")
    memory.touched("grows")
    assert memory.loads.count("grows") == 3, "its size was forgotten"


def test_what_is_larger_than_everything_is_refused(make: Make) -> None:
    memory = make(200, {"file": 500, "form": 100, "a": 100}, form=300)
    with pytest.raises(InvalidArgument, match=r"500 bytes.*200"):
        memory.hold("file")
    with pytest.raises(InvalidArgument, match=r"300 bytes.*200"):
        memory.used("form")
    with pytest.raises(InvalidArgument, match=r"300 bytes.*200"):
        memory.hold("form")  # its size is known, and it is not read again
    assert memory.loads == ["form"]
    assert memory.host.used_bytes == 0
    memory.touched("a")
    assert memory.host.tally.failures.read() == {("INVALID_ARGUMENT",): 1}


def test_a_file_that_is_larger_than_the_budget_is_read_if_its_form_may_fit(make: Make) -> None:
    memory = make(200, {"file": 300, "a": 100}, file=80)
    memory.touched("a", "file", "a")
    assert memory.host.used_bytes == 180
    assert memory.host.resident() == ("file", "a")


def test_relief_goes_beyond_the_budget_and_comes_back(make: Make) -> None:
    """Two requests hold one adapter each and wait for another: nobody would ever let go."""
    memory = make(200, dict.fromkeys("abcd", 100))
    claims = [Claim(), Claim()]
    first = [memory.used("a", claims[0])]
    second = [memory.used("b", claims[1])]
    first.append(memory.hold("c", claims[0]))
    second.append(memory.hold("d", claims[1]))
    assert memory.host.used_bytes == 200
    memory.host.relieve()
    first[1].loading.result(SECONDS)
    memory.host.relieve()
    assert memory.host.used_bytes == 300
    for resident in first:
        memory.release(resident)
    second[1].loading.result(SECONDS)
    assert memory.host.used_bytes <= 200
    for resident in second:
        memory.release(resident)


def test_one_load_that_fails_fails_its_own_rows_and_may_be_tried_again(make: Make) -> None:
    memory = make(300, dict.fromkeys(("bad", "good"), 100))
    memory.gates["bad"] = threading.Event()
    waiting = [memory.hold("bad") for _ in range(3)]
    assert waiting[0] is waiting[1] is waiting[2]
    good = memory.used("good")
    memory.gates["bad"].set()
    with pytest.raises(Corrupted):
        waiting[0].loading.result(SECONDS)
    for resident in waiting:
        memory.release(resident)
    assert memory.host.used_bytes == good.size == 100
    with pytest.raises(Corrupted):
        memory.used("bad")
    assert memory.loads.count("bad") == 2
    assert memory.host.tally.failures.read() == {("CORRUPTED",): 2}


def test_unloaded_while_it_loads(make: Make) -> None:
    memory = make(300, {"a": 100})
    memory.gates["a"] = threading.Event()
    old = memory.hold("a")
    freed: Future[int] = memory.host.unload("a")
    new = memory.hold("a")
    assert new is not old
    assert new.key != old.key
    memory.gates["a"].set()
    for resident in (old, new):
        resident.loading.result(SECONDS)
    assert not freed.done()
    memory.release(old)
    assert freed.result(SECONDS) == 100
    assert memory.host.used_bytes == 100
    assert memory.host.residency("a").state is Residency.HOST
    memory.release(new)


def test_closing_fails_every_load_that_has_not_begun(make: Make) -> None:
    memory = make(300, dict.fromkeys("abcd", 100))
    for digest in "abcd":
        memory.gates[digest] = threading.Event()
    residents = [memory.hold(digest) for digest in "abcd"]  # two load, one waits for a thread, one for room
    while len(memory.loads) < 2:
        pass
    closing = threading.Thread(target=memory.host.close)
    closing.start()
    while not memory.host._closed:
        pass
    for gate in memory.gates.values():
        gate.set()
    closing.join(SECONDS)
    for resident in residents[:2]:
        resident.loading.result(SECONDS)
    for resident in residents[2:]:
        with pytest.raises(Unavailable):
            resident.loading.result(SECONDS)


def test_loading_threads_compute_alone_and_take_no_cores_from_others() -> None:
    """In a process of its own, with four threads."""
    code = """
import threading, torch
from adapterbay.server.adapters.loaders import loading_threads
torch.set_num_threads(4)
for _ in range(2):
    executor = loading_threads(3)
    assert {executor.submit(torch.get_num_threads).result() for _ in range(12)} == {1}
    assert torch.get_num_threads() == 4, "who makes them lost its threads"
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start(), thread.join()
    assert later == [4], "who begins after them has too few"
    executor.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def unload_eight_hundred(registry: Path) -> None:
    """What `test_what_is_unloaded_goes_back_to_the_system` measures, in a process of its own."""

    def process_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size, many = 64 << 10, [f"d{number}" for number in range(800)]  # too small for malloc to have them mapped singly
    known = Registry.open(registry)
    memory = Memory(known.manifest(known.resolve("a0").digest), len(many) * size, dict.fromkeys(many, size), {})
    trim()
    at_first = process_bytes()
    residents = [memory.used(digest) for digest in many]
    kept = [resident.ready for resident in residents[-4:]]
    grown = process_bytes() - at_first
    assert grown > len(many) * size * 3 // 4
    for resident in residents:
        memory.release(resident)
        memory.host.unload(resident.digest).result(SECONDS)
    until = time.monotonic() + SECONDS
    while process_bytes() - at_first > grown // 4:
        assert time.monotonic() < until, "the process did not shrink"
    assert [form.bytes for form in kept] == [size] * 4
    assert all(resident.form is None for resident in residents)
    memory.host.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give back by themselves")
def test_what_is_unloaded_goes_back_to_the_system(zoos: dict[str, Zoo]) -> None:
    """And not into the allocator's own store, from which the last ones loaded keep it. In a process of its own: in this
    one other tests' memory comes and goes."""
    code = f"from test_residency import *; unload_eight_hundred(Path({str(zoos['llama'].registry.root)!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr


def test_histograms_count_each_duration_once() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.2, 5.0):
        histogram.add(seconds)
    assert histogram.read() == ((2, 1, 1), pytest.approx(5.35))


@pytest.fixture
def own(zoos: dict[str, Zoo], tmp_path: Path) -> Zoo:
    """A registry of the test's own over the session's base."""
    return Zoo(zoos["llama"].base, Registry.open(tmp_path / "registry"))


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(own: Zoo, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "llama", seed=9)
    make_adapter(other, tmp_path / "x", targets=TARGETS["llama"][0])
    own.registry.push(tmp_path / "x", "x", base=f"folder:{other}")
    with Harness(own.base, own.registry) as harness:
        with pytest.raises(BaseMismatch) as caught:
            harness.generate("x", [30, 31, 32], 1)
        ours = harness.engine.base.fingerprint
        assert caught.value.expected == ours
        assert caught.value.actual != ours
        assert ours in caught.value.message
        assert caught.value.actual in caught.value.message
        assert f"--base {other}" in caught.value.message or "--base folder:" in caught.value.message
        assert len(harness.generate(None, [30, 31, 32], 2).generated().token_ids) == 2


def test_what_is_unloaded_is_gone_at_once(own: Zoo, tmp_path: Path) -> None:
    """By its last reference: if circles held weights, megabytes would lie about until a full garbage collection."""
    own.add("x", tmp_path / "x", targets=TARGETS["llama"][1])
    with Harness(own.base, own.registry) as harness:
        digest = harness.arm("x").parts[0].digest
        harness.generate(None, [30, 31, 32], 1).wait()
        gc.collect()
        gc.disable()
        try:
            harness.generate("x", [30, 31, 32], 2).wait()
            harness.idle()
            form = harness.engine.adapters.memory.books.table[digest].form
            assert form is not None
            tensors = [weakref.ref(tensor) for tensor in form.tensors()]
            assert tensors
            del form
            harness.engine.adapters.unload(digest).result(10)
            harness.generate(None, [30, 31, 32], 1).wait()  # the slots are vacated before the next step
            harness.idle()
            assert not [tensor for tensor in tensors if tensor() is not None]
        finally:
            gc.enable()


def test_work_beside_a_load_is_done_wherever_there_is_a_thread() -> None:
    """On a free thread, on the asking one when all are busy or the executor is closing; errors reach who waits."""
    with loading_threads(2) as executor:
        finish = beside(executor, seen := Seen())
        assert seen.called.wait(SECONDS)
        finish()
        assert len(seen.threads) == 1
        assert seen.threads != [threading.current_thread().name]
        busy, go_on = threading.Barrier(3), threading.Event()
        for _ in range(2):
            executor.submit(lambda: (busy.wait(SECONDS), go_on.wait(SECONDS)))
        busy.wait(SECONDS)
        finish = beside(executor, alone := Seen())
        finish()
        assert alone.threads == [threading.current_thread().name]
        go_on.set()

        def fail() -> None:
            raise Corrupted("altered")

        with pytest.raises(Corrupted, match="altered"):
            beside(executor, fail)()
    beside(executor, late := Seen())()
    assert late.threads == [threading.current_thread().name]


class Seen:
    """Which threads have called it."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.called = threading.Event()

    def __call__(self) -> None:
        self.threads.append(threading.current_thread().name)
        self.called.set()
