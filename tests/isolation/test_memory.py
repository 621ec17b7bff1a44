"""Memory that is too small, given back, or shared: the answers stay those of PEFT alone, and the bytes add up.

The reports behind it: vllm 54839 and 42207 (an unload frees nothing), 8559, sglang 13349 (a load stalls everybody),
sglang 10266 and vllm 11077 (hard caps), SGLang's case of 16 adapters over 8 slots.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from isolation.conftest import Start
from isolation.interface import EngineUnderTest, Failed, Limits
from isolation.reference import Alone, Folders, begin, idle, needs, same, until

PROMPT = "A prompt of some length, the same for all of them: "
TOKENS, LONG = 6, 40


def push_all(engine: EngineUnderTest, folders: Folders, count: int) -> None:
    for number in range(count):
        engine.push(f"a{number}", folders.generator(number))


def test_a_reused_slot_holds_nothing_of_who_was_there(start: Start, folders: Folders, alone: Alone) -> None:
    """One slot: A leaves it for B, B for A. B is exact in A's place, and A when it comes back."""
    engine = start(Limits(device_adapters=1, adapter_bytes=folders.bytes))
    push_all(engine, folders, 3)
    for number in (0, 1, 0, 2, 1, 0):
        same(
            engine.generate(PROMPT, f"a{number}", TOKENS).wait(),
            alone.generates(PROMPT, folders.generator(number), TOKENS),
        )
    if "stats" in engine.features:
        assert engine.stats().evictions["device"] >= 4


def test_a_small_one_in_a_large_ones_place(start: Start, folders: Folders, alone: Alone) -> None:
    """Room for one of rank 8, or for four of rank 2: those that come into its place find nothing of it."""
    engine = start(Limits(device_adapters=1, adapter_bytes=folders.bytes))
    arms = {"large": folders.generator(0)} | {f"small-{number}": folders.generator(number, 2) for number in range(1, 5)}
    for name, folder in arms.items():
        engine.push(name, folder)
    names = list(arms)
    for each in [names[:1], names[1:], names[2:], names[:1], names[3:], names[1:]]:
        jobs = [(name, engine.generate(PROMPT, name, TOKENS)) for name in each]
        for name, job in jobs:
            same(job.wait(), alone.generates(PROMPT, arms[name], TOKENS))


def test_a_small_cache_that_is_written_over_and_over(start: Start, folders: Folders, alone: Alone) -> None:
    """Prefixes are pushed out of it, and rows give way and begin again: nobody finds another's keys and values."""
    engine = start(Limits(rows=4, cache_bytes=alone.cache_bytes(192)))
    push_all(engine, folders, 2)
    arms = [(f"{PROMPT}{text}", number) for text in ("one.", "two.", "three.") for number in (0, 1)]
    asked = arms + random.Random(3).choices(arms, k=12)
    jobs = [(text, number, engine.generate(text, f"a{number}", LONG)) for text, number in asked]
    for text, number, job in jobs:
        same(job.wait(), alone.generates(text, folders.generator(number), LONG))


def test_a_slow_load_holds_up_nobody_else(start: Start, folders: Folders, alone: Alone) -> None:
    """Those who run go on and those who can run begin; one of those who wait for it leaves."""
    engine = start(Limits())
    needs(engine, "slow-loads")
    push_all(engine, folders, 2)
    engine.load("a0")
    running = engine.generate(PROMPT, "a0", LONG)
    with engine.hold_loads():
        waiting = [begin(engine, PROMPT, "a1", TOKENS) for _ in range(2)]
        same(running.wait(20), alone.generates(PROMPT, folders.generator(0), LONG))
        for name, folder in (("a0", folders.generator(0)), (None, None)):
            same(engine.generate(PROMPT, name, TOKENS).wait(20), alone.generates(PROMPT, folder, TOKENS))
        if "cancel" in engine.features:
            waiting[0].cancel()
        assert not any(job.tokens_so_far() for job in waiting)
    same(waiting[1].wait(), alone.generates(PROMPT, folders.generator(1), TOKENS))
    if "stats" in engine.features:
        assert idle(engine).loads == 2


@pytest.mark.parametrize(("host", "device"), [(None, 3), (3, None), (4, 2)])
def test_eviction_under_load(
    host: int | None, device: int | None, start: Start, folders: Folders, alone: Alone
) -> None:
    """Eight adapters over few slots, popularity zipf 1.5, more rows waiting than run."""
    engine = start(Limits(rows=4, host_adapters=host, device_adapters=device, adapter_bytes=folders.bytes))
    push_all(engine, folders, 8)
    rng = random.Random(5)
    asked = rng.choices(range(8), weights=[1 / (rank + 1) ** 1.5 for rank in range(8)], k=40)
    jobs = [(number, engine.generate(PROMPT, f"a{number}", TOKENS)) for number in asked]
    for number, job in jobs:
        if "stats" in engine.features:
            stats = engine.stats()
            assert stats.host_bytes <= stats.host_budget
            assert stats.device_bytes <= stats.device_budget
        same(job.wait(), alone.generates(PROMPT, folders.generator(number), TOKENS))
    if "stats" in engine.features:
        stats = idle(engine)
        assert sum(stats.evictions.values()) > 0
        if stats.host_budget:  # an engine with one tier has no host memory
            assert stats.hits["host"] + stats.misses["host"] == len(asked)
        assert stats.loads >= len(set(asked))
        assert stats.failures == 0


def test_an_unload_gives_the_bytes_back(start: Start, folders: Folders, alone: Alone) -> None:
    engine = start(Limits())
    needs(engine, "unload", "stats")
    push_all(engine, folders, 2)
    before = engine.stats()
    for number in (0, 1):
        same(
            engine.generate(PROMPT, f"a{number}", TOKENS).wait(),
            alone.generates(PROMPT, folders.generator(number), TOKENS),
        )
    both = idle(engine)
    assert both.device_bytes - before.device_bytes >= 2 * folders.bytes
    for number, left in ((0, 1), (1, 0)):
        engine.unload(f"a{number}")
        until(lambda: engine.stats().device_bytes == before.device_bytes + left * both.device_bytes // 2)  # noqa: B023
        assert engine.stats().host_bytes == before.host_bytes + left * both.host_bytes // 2
    assert engine.stats().loads == 2
    same(engine.generate(PROMPT, "a0", TOKENS).wait(), alone.generates(PROMPT, folders.generator(0), TOKENS))
    assert engine.stats().loads == 3


def test_an_unload_while_rows_run_waits_for_them(start: Start, folders: Folders, alone: Alone) -> None:
    """The row finishes on the weights it began with; who comes later loads anew; all bytes come back in the end."""
    engine = start(Limits())
    needs(engine, "unload", "stats")
    push_all(engine, folders, 1)
    want = alone.generates(PROMPT, folders.generator(0), 60)
    running = engine.generate(PROMPT, "a0", 60)
    until(lambda: running.tokens_so_far() >= 2)
    engine.unload("a0")
    later = engine.generate(PROMPT, "a0", 60)
    same(running.wait(), want)
    same(later.wait(), want)
    idle(engine)
    engine.unload("a0")
    until(lambda: engine.stats().device_bytes == engine.stats().host_bytes == 0)
    assert engine.stats().loads == 2, "who came later was served by what had been unloaded"


def test_rows_that_are_cancelled_hold_no_adapter(start: Start, folders: Folders) -> None:
    """Neither one that ran nor one whose adapter was still loading."""
    engine = start(Limits())
    needs(engine, "cancel", "unload", "stats", "slow-loads")
    push_all(engine, folders, 2)
    running = engine.generate(PROMPT, "a0", 300)
    until(lambda: running.tokens_so_far() >= 2)
    with engine.hold_loads():
        waiting = begin(engine, PROMPT, "a1", 300)
        for job in (running, waiting):
            job.cancel()
        with pytest.raises(Failed):
            running.wait()
    with pytest.raises(Failed):
        waiting.wait()
    idle(engine)
    engine.load("a1")
    for number in (0, 1):
        engine.unload(f"a{number}")
    until(lambda: engine.stats().device_bytes == engine.stats().host_bytes == 0)


def test_many_loads_of_one_adapter_are_one(start: Start, folders: Folders, alone: Alone) -> None:
    engine = start(Limits(rows=16))
    push_all(engine, folders, 1)
    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(engine.load, "a0") for _ in range(8)]
        jobs = [engine.generate(PROMPT, "a0", TOKENS) for _ in range(8)]
        for load in loads:
            load.result()
    for job in jobs:
        same(job.wait(), alone.generates(PROMPT, folders.generator(0), TOKENS))
    if "stats" in engine.features:
        stats = idle(engine)
        assert stats.device_bytes < 2 * folders.bytes
        assert stats.loads == 1
