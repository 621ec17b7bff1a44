"""Rows beside others: a row sees its own adapter only, whoever shares its batch, its prompt or its memory.

The reports behind it: peft 804 and 973 (`set_adapter` is global), vllm 51940 (fusions), 9280 (heads), 42125 (prefixes).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from isolation.interface import EngineUnderTest, Failed
from isolation.reference import LOGIT_TOLERANCE, METHODS, Alone, Folders, begin, idle, needs, same, until
from safetensors.torch import load_file, save_file

PROMPT = "A system prompt that everybody shares, long enough to be kept in blocks and found again by the next one. "
TOKENS, LONG = 8, 300


@pytest.fixture(scope="module")
def stocked(engine: EngineUnderTest, folders: Folders) -> EngineUnderTest:
    """The engine with a0 to a3, c0 of two labels and c1 of three."""
    for number in range(4):
        engine.push(f"a{number}", folders.generator(number))
    if "classify" in engine.features:
        engine.push("c0", folders.classifier(20))
        engine.push("c1", folders.classifier(21, 3))
    return engine


def test_one_prompt_under_many_adapters(stocked: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    """One after the other, so that each could find its predecessor's prefix, and then all in one batch."""
    arms = [("a0", folders.generator(0)), ("a1", folders.generator(1)), (None, None), ("a2", folders.generator(2))]
    for name, folder in arms * 2:
        same(stocked.generate(PROMPT, name, TOKENS).wait(), alone.generates(PROMPT, folder, TOKENS))
    jobs = [(folder, stocked.generate(PROMPT, name, TOKENS)) for name, folder in arms * 2]
    for folder, job in jobs:
        same(job.wait(), alone.generates(PROMPT, folder, TOKENS))


def test_a_prefix_that_grows_is_found_under_its_own_adapter_only(
    stocked: EngineUnderTest, folders: Folders, alone: Alone
) -> None:
    """A conversation's turns under one adapter, interleaved with the same turns under another and the base."""
    for turn in range(1, 4):
        text = PROMPT + "And then? " * turn
        for name, folder in (("a0", folders.generator(0)), (None, None), ("a1", folders.generator(1))):
            same(stocked.generate(text, name, 4).wait(), alone.generates(text, folder, 4))


def test_ranks_of_all_sizes_share_the_batch(stocked: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    """None is too large, and none is cut or filled up to another's (sglang 10266, vllm 11077)."""
    arms = {f"rank-{rank}": folders.generator(5, rank) for rank in (1, 3, 16, 64)}
    for name, folder in arms.items():
        stocked.push(name, folder)
    jobs = [(folder, stocked.generate(PROMPT, name, TOKENS)) for name, folder in [*arms.items(), *arms.items()]]
    for folder, job in jobs:
        same(job.wait(), alone.generates(PROMPT, folder, TOKENS))


def test_other_methods_share_the_batch(stocked: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    """Over one prompt, so that a row could take another's place, vectors or prefix for its own (peft 759)."""
    needs(stocked, "methods")
    arms: list[tuple[str | None, Path | None]] = [(method, folders.of_method(method)) for method in METHODS]
    for name, folder in arms:
        assert name is not None
        assert folder is not None
        stocked.push(name, folder)
    arms += [("a0", folders.generator(0)), (None, None)]
    for _ in range(2):
        jobs = [(folder, stocked.generate(PROMPT, name, TOKENS)) for name, folder in arms]
        for folder, job in jobs:
            same(job.wait(), alone.generates(PROMPT, folder, TOKENS))


def test_fusions_of_one_set_with_other_weights(stocked: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    """One after the other over one prompt, and in one batch with their parts."""
    needs(stocked, "fusion")
    a, b = folders.generator(0), folders.generator(1)
    arms = [
        ({"a0": 0.9, "a1": 0.1}, {a: 0.9, b: 0.1}),
        ({"a0": 0.1, "a1": 0.9}, {a: 0.1, b: 0.9}),
        ({"a0": 0.5, "a1": 0.5}, {a: 0.5, b: 0.5}),
    ]
    wanted = [alone.generates(PROMPT, reference, TOKENS) for _, reference in arms]
    assert len({want.tokens for want in wanted}) > 1
    for (selection, _), want in zip(arms, wanted, strict=True):
        same(stocked.generate(PROMPT, selection, TOKENS).wait(), want)
    jobs = [stocked.generate(PROMPT, selection, TOKENS) for selection, _ in arms]
    parts = [stocked.generate(PROMPT, name, TOKENS) for name in ("a0", "a1")]
    for job, want in zip(jobs, wanted, strict=True):
        same(job.wait(), want)
    for job, folder in zip(parts, (a, b), strict=True):
        same(job.wait(), alone.generates(PROMPT, folder, TOKENS))


def test_a_cancelled_row_leaves_its_neighbours_alone(stocked: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    """Its cache goes to others at once, and what they compute there is theirs."""
    needs(stocked, "cancel")
    before = idle(stocked).generated if "stats" in stocked.features else 0
    stays = stocked.generate(PROMPT, "a1", 40)
    leaving = [stocked.generate(PROMPT, name, LONG) for name in ("a0", "a2", None)]
    until(lambda: all(job.tokens_so_far() >= 2 for job in leaving))
    for job in leaving:
        job.cancel()
    follow = [stocked.generate(PROMPT, "a3", TOKENS) for _ in range(3)]
    for job in leaving:
        with pytest.raises(Failed):
            job.wait()
    same(stays.wait(), alone.generates(PROMPT, folders.generator(1), 40))
    for job in follow:
        same(job.wait(), alone.generates(PROMPT, folders.generator(3), TOKENS))
    if "stats" in stocked.features:  # those who stayed said all; those who left did not, whatever their callers saw
        rest = 40 + len(follow) * TOKENS
        assert rest + len(leaving) <= idle(stocked).generated - before < rest + 2 * LONG


def test_weights_altered_in_the_store_fail_alone_and_by_name(
    stocked: EngineUnderTest, folders: Folders, alone: Alone
) -> None:
    """One bit of one tensor: the load fails whenever it is tried, until the file is whole again."""
    needs(stocked, "tamper")
    stocked.push("bent", folders.generator(4))
    file = stocked.stored_weights("bent")
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    before = idle(stocked).host_bytes if "stats" in stocked.features else 0
    for _ in range(2):
        jobs = [begin(stocked, PROMPT, name, TOKENS) for name in ("bent", "a0", "bent", None)]
        for job in jobs[::2]:
            with pytest.raises(Failed, match="adapter_model"):
                job.wait()
        same(jobs[1].wait(), alone.generates(PROMPT, folders.generator(0), TOKENS))
        same(jobs[3].wait(), alone.generates(PROMPT, None, TOKENS))
    with pytest.raises(Failed):
        stocked.load("bent")
    if "stats" in stocked.features:
        assert idle(stocked).host_bytes == before, "a load that failed left its bytes behind"
    file.write_bytes(whole)
    same(stocked.generate(PROMPT, "bent", TOKENS).wait(), alone.generates(PROMPT, folders.generator(4), TOKENS))


def test_adapters_that_overflow_fail_alone_and_by_name(
    stocked: EngineUnderTest, folders: Folders, alone: Alone, tmp_path: Path
) -> None:
    """Their weights are finite, what they compute is not: for `wild` in its own rows, for `wilder` with anybody's x, if
    it is multiplied by a neighbour's. The wild rows' cache is used by calm ones afterwards."""
    for name, a, b in (("wild", 1e18, 1e18), ("wilder", 3e38, 0.02)):
        folder = tmp_path / name
        folder.mkdir()
        for file in folders.generator(0).iterdir():
            if file.suffix == ".json":
                (folder / file.name).write_bytes(file.read_bytes())
        weights = load_file(folders.generator(0) / "adapter_model.safetensors")
        grown = {key: value / value.abs().max() * (a if "lora_A" in key else b) for key, value in weights.items()}
        save_file(grown, folder / "adapter_model.safetensors")
        stocked.push(name, folder)
    for prompt in (PROMPT, "Short. ", PROMPT):
        running = stocked.generate(prompt, "a2", 40)
        until(lambda: running.tokens_so_far() >= 2)  # noqa: B023
        wild = [(name, begin(stocked, prompt, name, TOKENS)) for name in ("wild", "wilder", "wild")]
        calm = [stocked.generate(prompt, "a1", TOKENS) for _ in range(3)]
        for name, job in wild:
            with pytest.raises(Failed, match=rf"(?s)finite.*{name}\b|{name}\b.*finite"):
                job.wait()
        for job in calm:
            same(job.wait(), alone.generates(prompt, folders.generator(1), TOKENS))
        same(running.wait(), alone.generates(prompt, folders.generator(2), 40))


def test_labels_beside_text(stocked: EngineUnderTest, folders: Folders, alone: Alone) -> None:
    """Heads of two sizes in the batch of generators: each row has its own, and the generators none."""
    needs(stocked, "classify")
    running = stocked.generate(PROMPT, "a0", 60)
    want = [alone.classifies(PROMPT, folders.classifier(20 + more, 2 + more), 2 + more) for more in (0, 1)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            labels = [pool.submit(stocked.classify, PROMPT, f"c{index % 2}") for index in range(8)]
            for index, found in enumerate(labels):
                assert found.result() == pytest.approx(want[index % 2], abs=LOGIT_TOLERANCE)
    with pytest.raises(Failed, match="head"):
        stocked.classify(PROMPT, "a0")
    assert stocked.classify(PROMPT, "c0") == pytest.approx(want[0], abs=LOGIT_TOLERANCE)
    same(running.wait(), alone.generates(PROMPT, folders.generator(0), 60))
