"""Memory that is too small, given back, or shared: the answers stay those of PEFT alone, and the bytes add up.

The reports behind it: vllm 54839 and 42207 (an unload frees nothing), 8559, sglang 13349 (a load stalls everybody),
sglang 10266 and vllm 11077 (hard caps), SGLang's case of 16 adapters over 8 slots.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from isolation.conftest import Start
from isolation.interface import EngineUnderTest, Limits
from isolation.reference import Alone, Folders, idle, needs, same, until

PROMPT = "A prompt of some length, the same for all of them: "
TOKENS = 6


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
