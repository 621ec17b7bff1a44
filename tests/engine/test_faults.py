"""Our own mistakes: they end the rows that they concern, in words, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import Answer, Harness, held
from tiny import TARGETS
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.registry.errors import EngineFault, InvalidArgument, Rejected, Unavailable
from adapterbay.server.adapters.forms import ServingForm
from adapterbay.server.batch import Row, Share
from adapterbay.server.blocks import BLOCK_TOKENS
from adapterbay.server.requests import ClassifyTask, EmbedTask, GenerateTask, SamplingSpec

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def zoo(zoos: dict[str, Zoo]) -> Zoo:
    return zoos["llama"]


@pytest.fixture
def harness(zoo: Zoo) -> Iterator[Harness]:
    with Harness(zoo.base, zoo.registry, max_rows=2) as made:
        yield made


def row_of(harness: Harness, answer: Answer) -> Row:
    assert answer.request is not None
    return harness.engine._rows[answer.request.id]


def once(real: Any, error: Exception) -> Any:
    """Fails the first time, and is `real` from then on."""
    left = [error]

    def call(*arguments: Any, **settings: Any) -> Any:
        if left:
            raise left.pop()
        return real(*arguments, **settings)

    return call


def test_what_one_row_gave_and_cannot_be_taken_ends_that_row_only(harness: Harness) -> None:
    with held(harness.engine):
        bad, good = (harness.generate(name, PROMPT, 5) for name in ("a0", "a1"))
        row_of(harness, bad).output.push = once(None, ZeroDivisionError("in the tokenizer"))
    with pytest.raises(EngineFault, match="in the tokenizer"):
        bad.wait(20)
    assert len(good.generated().token_ids) == 5
    harness.idle()


@pytest.mark.parametrize("task", [EmbedTask(tuple(PROMPT)), ClassifyTask(tuple(PROMPT))])
def test_a_pooled_row_that_cannot_be_taken_ends_alone(harness: Harness, task: EmbedTask | ClassifyTask) -> None:
    harness.load("c0")
    with held(harness.engine):
        bad = harness.submit("c0" if isinstance(task, ClassifyTask) else "a0", task)
        good = harness.embed(None, PROMPT)
        harness.engine._loop.post(lambda: setattr(row_of(harness, bad).output, "push", once(None, KeyError("state"))))
    with pytest.raises(EngineFault, match="state"):
        bad.wait(20)
    assert good.wait(20).values
    harness.idle()


def test_a_step_whose_results_cannot_be_taken_at_all_ends_its_rows(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = harness.engine._loop
    good = harness.generate("a0", PROMPT, 5).generated().token_ids
    monkeypatch.setattr(loop, "_take_tokens", once(loop._take_tokens, ZeroDivisionError("drawing")))
    with pytest.raises(EngineFault, match="drawing"):
        harness.generate("a0", PROMPT, 5).wait(20)
    harness.idle()
    assert harness.generate("a0", PROMPT, 5).generated().token_ids == good


def test_a_scheduler_that_fails_ends_everybody_and_goes_on(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = harness.engine._loop.scheduler
    with held(harness.engine):
        answers = [harness.generate(name, PROMPT, 5) for name in ("a0", "a1", "a2")]
        monkeypatch.setattr(scheduler, "schedule", once(scheduler.schedule, ZeroDivisionError("turns")))
    for answer in answers:
        with pytest.raises(EngineFault, match="turns"):
            answer.wait(20)
    harness.idle()
    assert len(harness.generate("a0", PROMPT, 5).generated().token_ids) == 5


def test_an_engine_that_lost_a_block_stops_in_words(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that nobody gives back may be somebody's: to go on would be to guess."""
    scheduler, heard = harness.engine._loop.scheduler, threading.Event()
    harness.engine.on_fault(heard.set)

    def lose() -> list[Share]:
        scheduler._blocks.take(1)
        raise ZeroDivisionError("turns")

    with held(harness.engine):
        answers = [harness.generate(name, PROMPT, 5) for name in ("a0", "a1", "a2")]
        monkeypatch.setattr(scheduler, "schedule", lose)
    for answer in answers:
        with pytest.raises(EngineFault, match="turns"):
            answer.wait(20)
    assert heard.wait(20)
    with pytest.raises(Unavailable, match="restart the server"):
        harness.generate("a0", PROMPT, 5)
    late = threading.Event()
    harness.engine.on_fault(late.set)
    assert late.is_set()
    assert not harness.engine._rows


@pytest.mark.parametrize("failing", ["tell", "listener", "release"])
def test_everybody_hears_that_the_engine_stopped_whatever_fails(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    engine, told = harness.engine, threading.Event()

    def tell() -> None:
        told.set()
        if failing == "tell":
            raise OSError("nobody is there")

    engine.on_fault(tell)
    harness.load("a0", "a1", "a2")
    with held(engine):
        answers = [harness.generate(name, PROMPT, 5) for name in ("a0", "a1", "a2")]
        residents = [resident for row in engine._rows.values() for resident in row.residents]
        if failing == "listener":
            broken = answers.pop(0)
            assert broken.request is not None
            broken.request.listener = once(None, OSError("nobody is there"))
        if failing == "release":
            release = engine.adapters.memory.release
            monkeypatch.setattr(engine.adapters.memory, "release", once(release, OSError("nobody is there")))
        engine._loop.post(lambda: monkeypatch.setattr(engine._loop, "_turn", once(None, ZeroDivisionError("turns"))))
        monkeypatch.setattr(type(engine._loop), "_end_all", lambda *_: False)
    for answer in answers:
        with pytest.raises(EngineFault, match="turns"):
            answer.wait(20)
    assert told.wait(20)
    engine._loop._thread.join(20)
    assert not engine._rows
    assert sum(resident.holds for resident in residents) == (1 if failing == "release" else 0)


@pytest.mark.parametrize("when", ["cancelled while it waits", "at its end"])
def test_a_release_that_fails_keeps_no_other_hold(harness: Harness, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    engine, pair = harness.engine, {"a0": 0.5, "a1": 0.5}
    harness.load("a0", "a1")
    memory = engine.adapters.memory
    with held(engine):
        answer = harness.generate(pair, PROMPT, 2)
        residents = row_of(harness, answer).residents
        assert [resident.holds for resident in residents] == [1, 1]
        monkeypatch.setattr(memory, "release", once(memory.release, OSError("nobody is there")))
        if when == "cancelled while it waits":
            assert answer.request is not None
            engine.cancel(answer.request)
    assert answer.done.wait(20)
    harness.idle()
    assert sorted(resident.holds for resident in residents) == [0, 1]
    assert len(harness.generate("a0", PROMPT, 2).generated().token_ids) == 2


def test_who_cannot_even_be_ended_hears_of_it(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = harness.engine._loop.scheduler

    def fail(*_: object) -> list[Share]:
        raise ZeroDivisionError("turns")

    with held(harness.engine):
        answers = [harness.generate(name, PROMPT, 5) for name in ("a0", "a1", "a2")]
        monkeypatch.setattr(scheduler, "schedule", fail)
        monkeypatch.setattr(scheduler, "drop", fail)
    for answer in answers:
        with pytest.raises(EngineFault, match="turns"):
            answer.wait(20)


def test_an_adapter_that_cannot_be_placed_fails_its_own_rows(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = harness.engine
    sites, digest = engine._model.sites, harness.arm("a0").parts[0].digest
    placing = sites.placing

    def breaks(key: str, form: ServingForm) -> Iterator[int]:
        for written in placing(key, form):
            yield written
            if form.digest == digest:
                raise MemoryError("half of it is there")

    monkeypatch.setattr(type(sites), "placing", lambda _, key, form: breaks(key, form))
    harness.load("a0", "a1")
    with held(engine):
        bad, good = harness.generate("a0", PROMPT, 5), harness.generate("a1", PROMPT, 5)
    with pytest.raises(EngineFault, match="half of it is there"):
        bad.wait(20)
    assert len(good.generated().token_ids) == 5
    harness.idle()
    device, other = engine._device, harness.arm("a1").parts[0].digest
    assert not device._placing
    assert [resident.digest for resident in device.placed()] == [other]
    assert device.used_bytes == device.size(next(iter(device.placed())))
    spans = {key for layer in sites.linears.values() if layer.site is not None for key in layer.site.pool.spans}
    assert spans
    assert not [key for key in spans if key.startswith(digest)]
    monkeypatch.undo()
    assert len(harness.generate("a0", PROMPT, 5).generated().token_ids) == 5


def test_rows_that_cannot_be_made_ready_hear_of_it(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.engine, "_take_head", once(None, KeyError("a head")))
    with pytest.raises(EngineFault, match="a head"):
        harness.generate("a0", PROMPT, 5).wait(20)
    harness.idle()


def test_an_embedding_that_is_no_number_is_no_answer(zoo: Zoo, tmp_path: Path) -> None:
    own = Zoo(zoo.base, Registry.open(tmp_path / "registry"))
    own.add("huge", tmp_path / "huge", targets=TARGETS["llama"][1], rank=8, scale=5e18)
    with Harness(own.base, own.registry) as harness:
        for normalize in (True, False):
            with pytest.raises(Rejected, match=r"values of this row are not finite: huge@1") as caught:
                harness.embed("huge", PROMPT, normalize=normalize).wait(20)
            assert caught.value.reason == "NOT_FINITE"
        assert harness.embed(None, PROMPT).wait(20).values


def test_what_the_cache_can_never_hold_is_told_by_its_field(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.engine._blocks.ledger, "blocks", 8)
    long = tuple(30 + at % 100 for at in range(8 * BLOCK_TOKENS + 20))
    for task, field, words in (
        (GenerateTask(long[:20], SamplingSpec(max_tokens=8 * BLOCK_TOKENS)), "sampling.max_tokens", "ask for fewer"),
        (GenerateTask(long, SamplingSpec(max_tokens=1)), "input", "send less text"),
        (ClassifyTask(long), "texts", "send less text"),
        (EmbedTask(long), "texts", "send less text"),
    ):
        with pytest.raises(InvalidArgument, match=words) as caught:
            harness.submit("c0" if isinstance(task, ClassifyTask) else None, task)
        assert caught.value.field == field


def test_a_prompt_that_is_too_long_asks_for_no_negative_number(harness: Harness) -> None:
    limit = harness.engine.base.max_length
    with pytest.raises(InvalidArgument, match=f"{limit + 5} tokens and 1 more are asked for") as caught:
        harness.submit(None, GenerateTask((9,) * (limit + 5), SamplingSpec()))
    assert caught.value.field == "input"


def test_all_groups_whose_adapters_cannot_be_placed_are_told(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of one adapter stand in one queue; nothing else runs that would wake the engine."""
    harness.generate("a0", [30, 31], 1).wait()
    harness.idle()
    device = harness.engine._loop.scheduler._slots

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room for a pool")

    monkeypatch.setattr(type(device), "seat", fails)
    with held(harness.engine):
        answers = [harness.generate("a0", [30, 31, number], 1) for number in range(3)]
    for answer in answers:
        with pytest.raises(EngineFault, match="no room for a pool"):
            answer.wait(10)
