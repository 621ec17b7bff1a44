"""A row sees its own adapter only: never an old version, a reused slot, a neighbour's overflow."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from engine_tools import Harness, reference_greedy
from safetensors.torch import load_file, save_file
from tiny import TARGETS, make_adapter, make_base, peft_model
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import BaseMismatch, Corrupted, InvalidArgument, Rejected
from adapterbay.server.adapters.residency import Residency

PROMPT = list(range(20, 52))
MOST = 10


@pytest.fixture
def own(zoos: dict[str, Zoo], tmp_path: Path) -> Zoo:
    """A registry of the test's own over the session's base."""
    return Zoo(zoos["llama"].base, Registry.open(tmp_path / "registry"))


def expected(zoo: Zoo, folder: Path) -> tuple[int, ...]:
    return reference_greedy(peft_model(zoo.base, folder), PROMPT, MOST)


def alter_blob(registry: Registry, digest: str) -> Path:
    """Flips one byte in the middle of an adapter's stored weights."""
    path = registry.open_snapshot(digest).files["adapter_model.safetensors"]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))
    return path


def test_a_name_pushed_again_never_answers_with_the_old_weights(own: Zoo, tmp_path: Path) -> None:
    own.add("x", tmp_path / "one", targets=["q_proj", "v_proj"], seed=1)
    with Harness(own.base, own.registry) as harness:
        first = harness.generate("x", PROMPT, MOST).generated().token_ids
        running = harness.generate("x", PROMPT, 40)
        own.add("x", tmp_path / "two", targets=["q_proj", "v_proj"], seed=2)
        second = [harness.generate("x", PROMPT, MOST) for _ in range(4)]
        pinned = harness.generate("x@1", PROMPT, MOST)
        assert running.generated().token_ids[:MOST] == first, "a running row changed its adapter"
        assert first == expected(own, tmp_path / "one")
        assert pinned.generated().token_ids == first
        want = expected(own, tmp_path / "two")
        assert want != first
        assert all(answer.generated().token_ids == want for answer in second)


def test_unload_gives_the_bytes_back_and_reload_answers_the_same(own: Zoo, tmp_path: Path) -> None:
    own.add("x", tmp_path / "x", targets=["q_proj", "v_proj", "down_proj"], rank=16)
    with Harness(own.base, own.registry) as harness:
        before = harness.engine.stats()
        digest = harness.arm("x").parts[0].digest
        first = harness.generate("x", PROMPT, MOST).generated().token_ids
        harness.idle()
        assert harness.engine.adapters.residency(digest).state is Residency.DEVICE
        freed = harness.engine.adapters.unload(digest).result(10)
        assert freed > 0
        harness.generate(None, PROMPT, 1).wait()  # the slots are vacated before the next step
        after = harness.engine.stats()
        assert (after.host_bytes, after.device_bytes) == (before.host_bytes, before.device_bytes) == (0, 0)
        assert all(layer.pool is None or layer.pool.bytes == 0 for layer in harness.engine._model.layers.values())
        assert harness.engine.adapters.residency(digest).state is Residency.REGISTRY
        assert harness.generate("x", PROMPT, MOST).generated().token_ids == first


def test_unload_while_running_lets_rows_finish_and_new_ones_load_anew(own: Zoo, tmp_path: Path) -> None:
    own.add("x", tmp_path / "x", targets=["q_proj", "v_proj"])
    with Harness(own.base, own.registry) as harness:
        alone = harness.generate("x", PROMPT, 60).generated().token_ids
        running = harness.generate("x", PROMPT, 60)
        started = []
        running.on_delta = lambda answer: started.append(len(answer.deltas))
        while len(started) < 3:
            pass
        digest = harness.arm("x").parts[0].digest
        freed = harness.engine.adapters.unload(digest)
        assert not freed.done()
        again = harness.generate("x", PROMPT, 60)
        assert running.generated().token_ids == alone
        assert freed.result(10) > 0
        assert again.generated().token_ids == alone
        assert harness.engine.adapters.residency(digest).active_rows == 0


def test_a_pinned_adapter_is_not_unloaded(own: Zoo, tmp_path: Path) -> None:
    own.add("x", tmp_path / "x", targets=["q_proj"])
    with Harness(own.base, own.registry) as harness:
        digest = harness.arm("x").parts[0].digest
        harness.engine.adapters.pin(digest, True)
        harness.engine.adapters.load(digest).result(10)
        with pytest.raises(InvalidArgument, match="pinned"):
            harness.engine.adapters.unload(digest)
        harness.engine.adapters.pin(digest, False)
        assert harness.engine.adapters.unload(digest).result(10) > 0


@pytest.mark.parametrize("tier", ["device", "host"])
def test_slots_are_reused_under_eviction_without_a_trace(tier: str, zoos: dict[str, Zoo]) -> None:
    """Sixteen times more traffic than memory: every answer is the one of the adapter alone."""
    zoo = zoos["llama"]
    rng = random.Random(1)
    arms = [f"a{i}" for i in range(8)]
    with Harness(zoo.base, zoo.registry) as roomy:
        alone = {arm: roomy.generate(arm, PROMPT, MOST).generated().token_ids for arm in arms}
        sizes = [r.ready.bytes for r in roomy.engine.adapters.memory._table.values()]
    # room for the largest adapter and little else
    budget = {f"{tier}_bytes": max(max(sizes) + min(sizes), 1 << 20)}
    with Harness(zoo.base, zoo.registry, max_rows=4, **budget) as harness:
        if tier == "device":
            harness.engine._device._budget = max(sizes) + min(sizes)
        else:
            harness.engine.adapters.memory._budget = max(sizes) + 20_000  # files are larger than forms by their headers
        asked = [rng.choice(arms) for _ in range(64)]
        answers = [harness.generate(arm, PROMPT, MOST) for arm in asked]
        for arm, answer in zip(asked, answers, strict=True):
            assert answer.generated().token_ids == alone[arm]
        harness.idle()
        stats = harness.engine.stats()
        assert stats.device_bytes <= harness.engine._device.budget_bytes
        assert stats.host_bytes <= harness.engine.adapters.memory._budget


def test_two_fusions_of_one_set_with_other_weights_differ(zoos: dict[str, Zoo]) -> None:
    zoo = zoos["llama"]
    with Harness(zoo.base, zoo.registry) as harness:
        one = harness.generate({"a1": 0.9, "a4": 0.1}, PROMPT, 1)
        other = harness.generate({"a1": 0.1, "a4": 0.9}, PROMPT, 1)
        one.wait(), other.wait()
        ids = [answer.request.id for answer in (one, other)]  # type: ignore[union-attr]
        assert (harness.logits[ids[0]][0] - harness.logits[ids[1]][0]).abs().max() > 0.05


def test_an_adapter_that_overflows_fails_alone(own: Zoo, tmp_path: Path) -> None:
    make_adapter(own.base, tmp_path / "wild", targets=["gate_proj", "up_proj", "down_proj"], rank=4)
    weights = tmp_path / "wild" / "adapter_model.safetensors"
    save_file({k: v * 1e18 for k, v in load_file(weights).items()}, weights)
    own.registry.push(tmp_path / "wild", "wild", base=f"folder:{own.base}")
    own.add("calm", tmp_path / "calm", targets=["q_proj", "v_proj"])
    want = expected(own, tmp_path / "calm")
    with Harness(own.base, own.registry, kv_bytes=1 << 20) as harness:
        for _ in range(3):  # the wild rows' blocks are reused by the calm ones
            wild = [harness.generate("wild", PROMPT, MOST) for _ in range(3)]
            calm = [harness.generate("calm", PROMPT, MOST) for _ in range(3)]
            for answer in wild:
                with pytest.raises(Rejected) as caught:
                    answer.wait()
                assert caught.value.reason == "NOT_FINITE"
            for answer in calm:
                assert answer.generated().token_ids == want
        harness.idle()


def test_weights_altered_on_disk_are_refused_at_load_and_spare_the_others(own: Zoo, tmp_path: Path) -> None:
    own.add("bad", tmp_path / "bad", targets=["q_proj"], seed=1)
    own.add("good", tmp_path / "good", targets=["q_proj"], seed=2)
    with Harness(own.base, own.registry) as harness:
        good = harness.generate("good", PROMPT, MOST).generated().token_ids
        path = alter_blob(own.registry, harness.arm("bad").parts[0].digest)
        answers = [harness.generate(name, PROMPT, MOST) for name in ("bad", "good", "bad", "good")]
        for answer in answers[::2]:
            with pytest.raises(Corrupted, match="adapter_model"):
                answer.wait()
        assert all(answer.generated().token_ids == good for answer in answers[1::2])
        shutil.copyfile(tmp_path / "bad" / "adapter_model.safetensors", path)
        assert harness.generate("bad", PROMPT, MOST).generated().token_ids == expected(own, tmp_path / "bad")


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(own: Zoo, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "llama", seed=9)
    make_adapter(other, tmp_path / "x", targets=TARGETS["llama"][0])
    own.registry.push(tmp_path / "x", "x", base=f"folder:{other}")
    with Harness(own.base, own.registry) as harness:
        with pytest.raises(BaseMismatch) as caught:
            harness.generate("x", PROMPT, 1)
        ours = harness.engine.base.fingerprint
        assert caught.value.expected == ours
        assert caught.value.actual != ours
        assert ours in caught.value.message
        assert caught.value.actual in caught.value.message
        assert torch.tensor(harness.generate(None, PROMPT, 2).generated().token_ids).numel() == 2
