"""Three tiers under zipf traffic: many adapters on disk, few in host memory, fewer on the device.

Correct, within the budgets, and without a step that a running row would have to wait for: by the order of steps, not by
the clock.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine_tools import Harness
from tier_tools import PROMPT, never_waited, push_many, record_steps
from tiny import greedy, peft_model
from zoo import Zoo

from adapterbay.registry import durable

TOKENS = 4


@pytest.mark.parametrize(
    ("on_disk", "in_host", "on_device", "requests"),
    [(300, 32, 8, 160), pytest.param(2000, 64, 16, 1500, marks=pytest.mark.slow)],
)
def test_zipf_traffic_over_three_tiers(
    on_disk: int,
    in_host: int,
    on_device: int,
    requests: int,
    zoos: dict[str, Zoo],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = zoos["llama"].base
    with monkeypatch.context() as patch:  # what survives a power cut is not asked here, and would take most of the time
        patch.setattr(durable.os, "fsync", lambda _: None)
        registry = push_many(base, tmp_path, on_disk)
    rng = random.Random(7)
    asked = rng.choices(range(on_disk), weights=[1 / (rank + 1) for rank in range(on_disk)], k=requests)
    with Harness(base, registry, max_rows=on_device, max_queue=requests, host_bytes=1 << 30) as harness:
        engine = harness.engine
        digest = harness.arm("n0").parts[0].digest
        engine.adapters.load(digest).result(20)
        size = engine.adapters.residency(digest).bytes
    settings = {"host_bytes": in_host * size + 4096, "device_bytes": on_device * size}
    with Harness(base, registry, max_rows=on_device, max_queue=requests, **settings) as harness:
        engine, steps = harness.engine, record_steps(harness)
        memory = engine.adapters.memory
        answers = []
        running = harness.generate(f"n{asked[0]}", PROMPT, 250)
        for number in asked:
            answers.append(harness.generate(f"n{number}", PROMPT, TOKENS))
            while engine.stats().waiting > 4 * on_device:
                answers[-2 * on_device].done.wait(0.01)
            stats, counts = engine.stats(), memory.counts()
            assert stats.host_bytes <= settings["host_bytes"]
            assert stats.device_bytes <= settings["device_bytes"]
            assert counts.loaded <= in_host
            assert counts.on_device <= on_device
        for answer in [running, *answers]:
            answer.wait()
        harness.idle()

        assert never_waited(running, steps, 250)
        assert all(never_waited(answer, steps, TOKENS) for answer in answers)
        wanted = len(set(asked))
        assert memory.tally.hits.of() + memory.tally.misses.of() == requests + 1
        assert sum(memory.tally.load_seconds.read()[0]) == memory.counts().loaded + memory.tally.evictions.of()
        assert wanted <= memory.tally.misses.of()
        assert memory.tally.evictions.of() >= wanted - in_host
        assert engine.device_tally.evictions.of() > memory.tally.evictions.of() // 2
        assert not memory.tally.failures.read()

        got = {number: answer.generated().token_ids for number, answer in zip(asked, answers, strict=True)}
        for number, answer in zip(asked, answers, strict=True):
            assert answer.generated().token_ids == got[number], f"n{number} gave two answers"
        assert len(set(got.values())) > len(got) // 2
        for number in rng.sample(sorted(got), 5):
            folder = tmp_path / f"pulled{number}"
            registry.pull(f"n{number}", folder)
            assert got[number] == greedy(peft_model(base, folder), PROMPT, TOKENS).tokens
