"""Three tiers under zipf traffic: many adapters on disk, few in host memory, fewer on the device.

Correct, within the budgets, and without a step that a running row would have to wait for: by the order of steps, not by
the clock.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engine_tools import Answer, Harness, reference_greedy
from safetensors.torch import load_file, save_file
from tiny import make_adapter, peft_model
from zoo import Zoo

from adapterbay.registry import Registry, durable
from adapterbay.server.batch import Share
from adapterbay.server.runner import StepResult

PROMPT = list(range(40, 72))
TOKENS = 4
RANK = 4


def push_many(base: Path, root: Path, count: int) -> Registry:
    """Adapters n0, n1, … of one size and random weights, through the registry's own push."""
    registry = Registry.open(root / "registry")
    folder = make_adapter(base, root / "n", targets=["q_proj", "v_proj"], rank=RANK, scale=0.5)
    shapes = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for number in range(count):
        weights = {key: torch.randn(like.shape, generator=generator) * 0.2 for key, like in shapes.items()}
        save_file(weights, folder / "adapter_model.safetensors")
        registry.push(folder, f"n{number}", base=f"folder:{base}")
    return registry


def record_steps(harness: Harness) -> list[set[int]]:
    """Which rows take part in each step from now on."""
    steps: list[set[int]] = []
    runner = harness.engine._loop._runner
    run = runner.run

    def recording(shares: Sequence[Share]) -> StepResult:
        steps.append({share.row.request.id for share in shares})
        return run(shares)

    runner.run = recording  # type: ignore[method-assign]
    return steps


def never_waited(answer: Answer, steps: Sequence[set[int]], most: int) -> bool:
    """Whether a row was in every step from its first to its last, one token each."""
    assert answer.request is not None
    own = [index for index, rows in enumerate(steps) if answer.request.id in rows]
    return own == list(range(own[0], own[0] + most))


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
            assert got[number] == reference_greedy(peft_model(base, folder), PROMPT, TOKENS)
