"""Rows come and go: cancelled, late, refused, failed, drained. Whatever happens, everything is given back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import pytest
from engine_tools import Answer, Harness, held
from zoo import Zoo

from adapterbay.registry.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFault,
    InvalidArgument,
    QueueFull,
    TaskMismatch,
    Unavailable,
)
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.batch import Share
from adapterbay.server.requests import (
    ClassifyTask,
    Delta,
    Event,
    FinishReason,
    GenerateTask,
    PositionChances,
    Request,
    SamplingSpec,
)
from adapterbay.server.runner import StepResult

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def zoo(zoos: dict[str, Zoo]) -> Zoo:
    return zoos["llama"]


def after(answer: Answer, deltas: int) -> None:
    """Waits until so many tokens came."""
    until = time.monotonic() + 20
    while len(answer.deltas) < deltas and not answer.done.is_set():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_cancelling_frees_the_row_within_one_step(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        answer = harness.generate("a0", PROMPT, 400)
        other = harness.generate("a1", PROMPT, 60)
        after(answer, 3)
        assert answer.request is not None
        steps = harness.engine.stats().steps
        harness.engine.cancel(answer.request)
        with pytest.raises(Cancelled):
            answer.wait()
        assert answer.steps_at_end <= steps + 1
        assert len(other.generated().token_ids) == 60
        harness.idle()
        assert answer.events_after_end == 0


def test_a_deadline_frees_the_row(zoo: Zoo) -> None:
    """The deadline passes while the row runs, whatever the machine's speed: it is set once the first tokens are out."""
    with Harness(zoo.base, zoo.registry) as harness:
        answer = harness.generate("a0", PROMPT, 480)
        after(answer, 3)
        assert answer.request is not None
        answer.request.deadline = time.monotonic()
        steps = harness.engine.stats().steps
        with pytest.raises(DeadlineExceeded):
            answer.wait()
        assert answer.steps_at_end <= steps + 1
        assert 3 <= len(answer.deltas) < 480
        harness.idle()


def test_a_deadline_in_the_queue_is_kept_while_nothing_runs(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row waits for an adapter that takes long to load."""
    with Harness(zoo.base, zoo.registry) as harness:
        memory, gate = harness.engine.adapters.memory, threading.Event()
        load = memory._load
        monkeypatch.setattr(memory, "_load", lambda digest: (gate.wait(10), load(digest))[1])
        answer = harness.submit(
            "a0", GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=2)), deadline=time.monotonic() + 0.1
        )
        with pytest.raises(DeadlineExceeded):
            answer.wait(3)
        gate.set()
        harness.idle()


def test_loading_one_adapter_stalls_nobody(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with Harness(zoo.base, zoo.registry, load_threads=1) as harness:
        harness.generate("a1", PROMPT, 1).wait()
        memory, gate = harness.engine.adapters.memory, threading.Event()
        load = memory._load

        def slow(digest: str) -> ServingForm:
            assert gate.wait(20)
            return load(digest)

        monkeypatch.setattr(memory, "_load", slow)
        cold = harness.generate("a2", PROMPT, 3)
        warm = harness.generate("a1", PROMPT, 50)
        bare = harness.generate(None, PROMPT, 50)
        assert len(warm.generated().token_ids) == len(bare.generated().token_ids) == 50
        assert not cold.done.is_set()
        gate.set()
        result = cold.generated()
        assert result.timings.load > 0
        assert result.timings.queue >= result.timings.load


def test_a_full_queue_refuses_at_once_and_starts_nothing(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry, max_rows=2, max_queue=3) as harness:
        with held(harness.engine):  # and refuses without waiting for it
            taken = [harness.generate(None, PROMPT, 200) for _ in range(5)]
            with pytest.raises(QueueFull) as caught:
                harness.generate("a0", PROMPT, 1)
        assert caught.value.retry_after_seconds > 0
        for answer in taken:
            assert len(answer.generated().token_ids) == 200
        harness.idle()


@pytest.mark.parametrize("end", ["whole", "deadline", "cancel", "waiting"])
def test_a_place_is_free_before_its_caller_hears_of_the_end(zoo: Zoo, end: str) -> None:
    """Whoever hears that a row ended may submit the next one at once, however few rows the server takes."""
    with Harness(zoo.base, zoo.registry, max_rows=1, max_queue=1) as harness:
        ending, request = harness.request("a1", GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=300)))
        if end == "whole":
            request.task = GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=3))
        follow, following = harness.request("a1", GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=1)))
        refused: list[Exception] = []

        def at_end(event: Event) -> None:
            if not isinstance(event, Delta):
                try:
                    harness.engine.submit([following])
                except QueueFull as error:
                    refused.append(error)
            ending(event)

        request.listener = at_end
        if end == "waiting":  # behind one that runs
            other = harness.generate("a0", PROMPT, 400)
            after(other, 1)
            harness.engine.submit([request])
        else:  # with one behind it
            harness.engine.submit([request])
            other = harness.generate("a0", PROMPT, 400)
        if end == "deadline":
            after(ending, 1)
            request.deadline = time.monotonic()
        elif end in ("cancel", "waiting"):
            harness.engine.cancel(request)
        assert ending.done.wait(20)
        assert not refused
        assert other.request is not None
        harness.engine.cancel(other.request)
        assert len(follow.generated().token_ids) == 1
        harness.idle()


def test_a_failed_step_fails_its_rows_and_the_engine_goes_on(zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        good = harness.generate("a0", PROMPT, 5).generated().token_ids
        runner = harness.engine._loop._runner
        run = runner.run

        def broken(shares: Sequence[Share]) -> StepResult:
            raise ZeroDivisionError(len(shares))

        runner.run = broken  # type: ignore[method-assign]
        with pytest.raises(EngineFault):
            harness.generate("a0", PROMPT, 5).wait()
        runner.run = run  # type: ignore[method-assign]
        harness.idle()
        assert harness.generate("a0", PROMPT, 5).generated().token_ids == good
        assert "a step failed" in caplog.text


def test_stopping_lets_running_rows_finish_and_refuses_new_ones(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        answers = [harness.generate(arm, PROMPT, 60) for arm in ("a0", "a1")]
        after(answers[0], 1)
        stopper = threading.Thread(target=harness.engine.stop, args=(60.0,))
        stopper.start()
        while harness.engine._accepting:
            time.sleep(0.001)
        with pytest.raises(Unavailable):
            harness.generate(None, PROMPT, 1)
        assert all(len(answer.generated().token_ids) == 60 for answer in answers)
        stopper.join(20)
        assert not stopper.is_alive()


def test_stopping_cancels_what_outlasts_the_drain(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry, max_rows=1) as harness:
        running = harness.generate("a1", PROMPT, 480)
        after(running, 1)
        waiting = harness.generate("a0", PROMPT, 480)
        harness.engine.stop(0.0)
        for answer in (running, waiting):
            with pytest.raises(Cancelled):
                answer.wait(1)


def test_chaos_returns_everything(zoo: Zoo) -> None:
    """Three hundred rows, cancelled and late at random: each hears exactly one end, and all that was held is back."""
    rng = random.Random(4)
    with Harness(zoo.base, zoo.registry, max_rows=8, max_queue=1000, step_tokens=64) as harness:
        answers = []
        for index in range(300):
            arm = rng.choice([None, "a0", "a1", "a5", {"a2": 0.5, "a3": 0.5}, "c0"])
            text = [rng.randrange(6, 262) for _ in range(rng.randint(1, 120))]
            deadline = time.monotonic() + rng.random() * 2 if rng.random() < 0.3 else None
            task = (
                ClassifyTask(tuple(text))
                if arm == "c0"
                else GenerateTask(tuple(text), SamplingSpec(max_tokens=rng.randint(1, 60), ignore_end=True))
            )
            answers.append(harness.submit(arm, task, deadline=deadline))
            if rng.random() < 0.4:
                victim = rng.choice(answers)
                assert victim.request is not None
                harness.engine.cancel(victim.request)
            if index % 20 == 0:
                time.sleep(0.01)
        for answer in answers:
            assert answer.done.wait(60)
        harness.idle()
        assert all(answer.events_after_end == 0 for answer in answers)
        assert {type(a.final).__name__ for a in answers} >= {"GenerateResult", "ClassifyResult", "Cancelled"}
        memory = harness.engine.adapters.memory
        assert all(resident.holds == resident.seats == 0 for resident in memory.books.table.values())
        assert not harness.engine._rows


def test_the_arms_of_a_comparison_share_their_steps(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry, max_rows=4) as harness:
        for _ in range(3):
            harness.generate(None, PROMPT, 30)
        pairs = [
            harness.request(arm, GenerateTask(tuple(PROMPT), SamplingSpec(max_tokens=8, ignore_end=True)))
            for arm in ("a0", "a1", None)
        ]
        harness.engine.submit([request for _, request in pairs])
        for answer, _ in pairs:
            answer.wait()
        began = {request.id: len(harness.logits[request.id]) for _, request in pairs}
        assert set(began.values()) == {8}
        starts = {answer.final.timings.queue + request.submitted_at for answer, request in pairs}
        assert max(starts) - min(starts) < 1e-6


def test_seeds_repeat_and_differ(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:

        def sampled(seed: int | None, company: int = 0) -> tuple[int, ...]:
            others = [harness.generate("a3", PROMPT, 30, temperature=1.0) for _ in range(company)]
            tokens = harness.generate("a0", PROMPT, 20, temperature=1.5, seed=seed).generated().token_ids
            for other in others:
                other.wait()
            return tokens

        assert sampled(7) == sampled(7) == sampled(7, company=5)
        assert sampled(7) != sampled(8)
        assert sampled(None) != sampled(None)


def test_stop_strings_end_tokens_and_lengths(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        free = harness.generate("a0", PROMPT, 60).generated()
        assert free.finish_reason is FinishReason.LENGTH
        assert len(free.token_ids) == 60
        stop = free.text[10:13]
        at = free.text.find(stop)
        stopped = harness.generate("a0", PROMPT, 60, stop=(stop,)).generated()
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.stop == stop
        assert stopped.text == free.text[:at]
        harness.engine.end_ids = frozenset({free.token_ids[5]})
        first_end = free.token_ids.index(free.token_ids[5])
        ended = harness.generate("a0", PROMPT, 60, ignore_end=False).generated()
        assert ended.finish_reason is FinishReason.END
        assert ended.token_ids == free.token_ids[: first_end + 1]


def test_log_probabilities_come_for_every_token(zoo: Zoo) -> None:
    with Harness(zoo.base, zoo.registry) as harness:
        result = harness.generate("a0", PROMPT, 6, top_log_probabilities=3).generated()
        assert len(result.chances) == 6
        for position, token in zip(result.chances, result.token_ids, strict=True):
            assert isinstance(position, PositionChances)
            assert position.chosen.token_id == token == position.top[0].token_id
            assert [chance.log_probability for chance in position.top] == sorted(
                (chance.log_probability for chance in position.top), reverse=True
            )


def test_what_cannot_be_done_is_told_at_once(zoo: Zoo, zoos: dict[str, Zoo]) -> None:
    with Harness(zoo.base, zoo.registry, max_rows=2) as harness:
        limit = harness.engine.base.max_length
        for prompt, most, field in (
            ([], 1, "input"),
            ([9] * (limit + 5), 1, "input"),
            ([9] * 10, limit, "sampling.max_tokens"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                harness.generate(None, prompt, most)
            assert caught.value.field == field
        with pytest.raises(TaskMismatch, match="base has no classification head"):
            harness.classify(None, PROMPT)
        with pytest.raises(TaskMismatch, match="no classification head"):
            harness.classify("a0", PROMPT).wait()
        with pytest.raises(TaskMismatch, match="different labels"):
            harness.classify({"c0": 0.5, "c2": 0.5}, PROMPT).wait()
        pairs = [harness.request(None, GenerateTask((9,), SamplingSpec(max_tokens=2))) for _ in range(3)]
        harness.engine.submit([request for _, request in pairs])
        with pytest.raises(InvalidArgument, match="3 rows must run together"):
            pairs[0][0].wait()
        harness.idle()
    with (
        Harness(zoos["bert"].base, zoos["bert"].registry) as encoder,
        pytest.raises(TaskMismatch, match="is an encoder"),
    ):
        encoder.engine.submit([Request(encoder.arm(None), GenerateTask((9,), SamplingSpec()), print)])
