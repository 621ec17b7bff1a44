"""Rows that give way when the cache is full go on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from engine_tools import Answer, Harness, Selection, held
from zoo import Zoo

from adapterbay.registry.errors import Cancelled, DeadlineExceeded, InvalidArgument
from adapterbay.server.blocks import BlockLedger
from adapterbay.server.requests import Delta, FinishReason, GenerateTask, Pooling, SamplingSpec

PROMPTS = [[20 + index + 3 * at for at in range(30)] for index in range(6)]
MOST = 40
BLOCKS = 13
"""A row has 2 blocks at first and 5 in the end: four start, two can end together."""
ARMS = (None, "a0", "a1", {"a2": 0.5, "a3": 0.5}, "a5", "a0")


@pytest.fixture(scope="module")
def zoo(zoos: dict[str, Zoo]) -> Zoo:
    return zoos["llama"]


@pytest.fixture(scope="module")
def roomy(zoo: Zoo) -> Iterator[Harness]:
    with Harness(zoo.base, zoo.registry, prefix_cache=False) as harness:
        yield harness


def shrink(harness: Harness, blocks: int) -> None:
    """Leaves the engine a cache of so few blocks."""
    ledger = BlockLedger(blocks)
    harness.engine._blocks.ledger = harness.engine._loop.scheduler._blocks = ledger


def warm(harness: Harness, *arms: Selection) -> None:
    """Has adapters in memory, so that rows which are submitted together start together."""
    for part in (part for arm in arms for part in harness.arm(arm).parts):
        harness.engine.adapters.load(part.digest).result(20)


def preempted(harness: Harness) -> int:
    return harness.engine.stats().preemptions


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_rows_that_gave_way_answer_the_same(zoo: Zoo, roomy: Harness, prefix_cache: bool) -> None:
    settings = [{}, {"temperature": 1.2, "seed": 3}, {"top_log_probabilities": 2}, {}, {"temperature": 0.7, "seed": 9}]
    settings.append({"temperature": 1.0, "seed": 5, "top_log_probabilities": 3})
    cases = list(zip(ARMS, PROMPTS, settings, strict=True))
    want = [roomy.generate(arm, prompt, MOST, **case).generated() for arm, prompt, case in cases]
    with Harness(zoo.base, zoo.registry, prefix_cache=prefix_cache) as harness:
        shrink(harness, BLOCKS)
        warm(harness, *ARMS)
        with held(harness.engine):
            answers = [harness.generate(arm, prompt, MOST, **case) for arm, prompt, case in cases]
        got = [answer.generated() for answer in answers]
        assert preempted(harness) >= 2
        assert answers[0].steps_at_end == min(answer.steps_at_end for answer in answers), "the oldest never waits"
        for mine, theirs, answer in zip(got, want, answers, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert mine.text == theirs.text
            assert len(answer.deltas) == MOST
            assert len(mine.chances) == len(theirs.chances)
            for one, other in zip(mine.chances, theirs.chances, strict=True):
                assert one.chosen.token_id == other.chosen.token_id
                assert one.chosen.log_probability == pytest.approx(other.chosen.log_probability, abs=1e-3)
        harness.idle()


def test_a_stop_string_that_began_before_is_seen_whole(zoo: Zoo, roomy: Harness) -> None:
    free = roomy.generate("a5", PROMPTS[4], MOST).generated()
    stop = free.text[12:28]
    with Harness(zoo.base, zoo.registry) as harness:
        shrink(harness, 7)
        warm(harness, "a5")
        with held(harness.engine):
            first = harness.generate(None, PROMPTS[0], MOST)
            second = harness.generate("a5", PROMPTS[4], MOST, stop=(stop,))
        first.wait()
        result = second.generated()
        assert preempted(harness) == 1
        assert result.finish_reason is FinishReason.STOP
        assert result.text == free.text[: free.text.find(stop)]


def test_the_arms_of_a_comparison_give_way_together(zoo: Zoo, roomy: Harness) -> None:
    arms = ("a0", "a1")
    want = [roomy.generate(arm, PROMPTS[1], MOST).generated().token_ids for arm in arms]
    with Harness(zoo.base, zoo.registry) as harness:
        shrink(harness, 11)
        warm(harness, *arms)
        gone: list[int] = []
        preempt = harness.engine._loop.scheduler._preempt
        harness.engine._loop.scheduler._preempt = lambda group: (gone.append(len(group.rows)), preempt(group))[1]  # type: ignore[method-assign, func-returns-value]
        task = GenerateTask(tuple(PROMPTS[1]), SamplingSpec(max_tokens=MOST, ignore_end=True))
        with held(harness.engine):
            first = harness.generate(None, PROMPTS[0], MOST + 20)
            pairs = [harness.request(arm, task) for arm in arms]
            harness.engine.submit([request for _, request in pairs])
        assert [answer.generated().token_ids for answer, _ in pairs] == want
        first.wait()
        assert gone == [2]
        assert preempted(harness) == 2


def test_a_pooled_row_begins_its_mean_again(zoo: Zoo, roomy: Harness) -> None:
    text = [20 + at % 200 for at in range(300)]
    want = torch.tensor(roomy.embed("a1", text, pooling=Pooling.MEAN).wait().values)
    for prefix_cache in (False, True):
        with Harness(zoo.base, zoo.registry, step_tokens=16, prefix_cache=prefix_cache) as harness:
            shrink(harness, 26)
            warm(harness, "a0", "a1")
            with held(harness.engine):
                olds = [harness.generate(arm, prompt, 50) for arm, prompt in zip((None, "a0"), PROMPTS, strict=False)]
                embedded = harness.embed("a1", text, pooling=Pooling.MEAN)  # 19 blocks, 22 steps
            got = torch.tensor(embedded.wait().values)
            for old in olds:
                old.wait()
            assert preempted(harness) == 1
            assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("end", ["cancel", "deadline", "stop"])
def test_a_row_that_has_given_way_can_still_be_ended(zoo: Zoo, end: str) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        shrink(harness, 10)
        warm(harness, "a0")
        heard: list[int] = []

        def watch(answer: Answer) -> None:
            if preempted(harness) and not heard:
                heard.append(len(young.deltas))
                assert young.request is not None
                if end == "cancel":
                    harness.engine.cancel(young.request)
                elif end == "deadline":
                    young.request.deadline = time.monotonic()

        with held(harness.engine):
            old = harness.generate(None, PROMPTS[0], 120)
            young = harness.generate("a0", PROMPTS[1], 100)
            old.on_delta = watch
        if end == "stop":
            while not heard:
                time.sleep(0.002)
            harness.engine.stop()
        with pytest.raises(DeadlineExceeded if end == "deadline" else Cancelled):
            young.wait()
        assert 0 < len(young.deltas) == heard[0] < 100
        assert young.events_after_end == 0
        if end != "stop":
            assert len(old.generated().token_ids) == 120
            harness.idle()
            assert not harness.engine._rows
        memory = harness.engine.adapters.memory
        assert all(resident.holds == resident.seats == 0 for resident in memory.books.table.values())


def test_what_can_never_fit_is_refused_at_once(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        shrink(harness, 6)
        with pytest.raises(InvalidArgument, match="needs 7 cache blocks and the server has 6"):
            harness.generate(None, PROMPTS[0], 68)
        task = GenerateTask(tuple(PROMPTS[0]), SamplingSpec(max_tokens=40))
        pairs = [harness.request(None, task) for _ in range(2)]
        harness.engine.submit([request for _, request in pairs])
        with pytest.raises(InvalidArgument, match="together need 10 cache blocks"):
            pairs[0][0].wait()
        assert len(harness.generate(None, PROMPTS[0], 67).generated().token_ids) == 67


def test_every_row_ends_under_endless_pressure(zoo: Zoo) -> None:
    """While others keep coming, whoever came first ends first, give or take who was in the batch with it."""
    with Harness(zoo.base, zoo.registry, max_rows=6) as harness:
        shrink(harness, 9)
        warm(harness, "a0", "a1")
        ends: list[int] = []

        def listener(index: int, answer: Answer) -> None:
            hear = answer.request.listener  # type: ignore[union-attr]

            def told(event: object) -> None:
                if not isinstance(event, Delta):
                    ends.append(index)
                hear(event)  # type: ignore[arg-type]

            answer.request.listener = told  # type: ignore[union-attr]

        with held(harness.engine):
            answers = []
            for index in range(9):
                answers.append(harness.generate(("a0", "a1", None)[index % 3], PROMPTS[index % 6], MOST))
                listener(index, answers[-1])
        for answer in answers:
            assert len(answer.generated().token_ids) == MOST
        assert preempted(harness) >= 1
        assert max(abs(index - place) for place, index in enumerate(ends)) <= 3, ends
