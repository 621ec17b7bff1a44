"""Host memory when something goes otherwise than expected: larger forms, refused pins, loads and threads that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from memory_tools import SECONDS, Make, memories
from zoo import Zoo

from adapterbay.registry.errors import EngineFault, QueueFull, Unavailable
from adapterbay.server.adapters.alarm import Alarm


@pytest.fixture
def make(zoos: dict[str, Zoo]) -> Iterator[Make]:
    with memories(zoos["llama"].registry) as memory:
        yield memory


@pytest.mark.parametrize("closed", [False, True])
def test_a_form_that_is_larger_does_not_wait_for_nobody(make: Make, closed: bool) -> None:
    memory = make(200, {"held": 160, "grows": 10}, grows=100)
    memory.gates["grows"] = threading.Event()
    memory.used("held")
    larger = memory.hold("grows")
    closing = threading.Thread(target=memory.host.close if closed else memory.release, args=() if closed else (larger,))
    while "grows" not in memory.loads:
        pass
    closing.start()
    while not memory.host._closed and larger.claims:
        pass
    memory.gates["grows"].set()
    assert isinstance(larger.loading.exception(SECONDS), Unavailable)
    closing.join(SECONDS)
    assert not memory.host.books.queue
    assert memory.host.used_bytes == 160


def test_a_form_that_is_larger_waits_from_then_on(make: Make) -> None:
    memory = make(200, {"held": 160, "grows": 10}, grows=100)
    memory.gates["grows"] = threading.Event()
    held, larger = memory.used("held"), memory.hold("grows")
    asked_at = larger.queued_at
    memory.gates["grows"].set()
    while not larger.queued:
        pass
    assert larger.queued_at > asked_at
    memory.release(held)
    larger.loading.result(SECONDS)


def test_a_pin_that_is_refused_leaves_its_room_to_others(make: Make) -> None:
    memory = make(200, {"held": 100, "pinned": 150, "other": 100})
    memory.used("held")
    memory.host.pin("pinned", True)
    refused = memory.host.books.table["pinned"].loading
    memory.host.books.beyond_seconds = 0.0
    memory.host.load("other").result(SECONDS)
    assert isinstance(refused.exception(SECONDS), QueueFull)


@pytest.mark.parametrize("load", [lambda _: None, lambda _: exit()])
def test_whatever_goes_wrong_in_a_load_is_told(make: Make, monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    memory = make(200, {"a": 100})
    monkeypatch.setattr(memory.host, "_load", load)
    assert isinstance(memory.host.load("a").exception(SECONDS), EngineFault)
    assert memory.host.used_bytes == memory.host.books.loads == len(memory.host.books.table) == 0


def test_a_change_is_told_whatever_follows_from_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make(200, {"a": 100})
    memory.touched("a")
    with monkeypatch.context() as patch:
        patch.setattr(memory.host.books, "settle", None)
        with pytest.raises(TypeError):
            memory.host.unload("a")
    assert memory.vacated == ["a"]


def test_an_alarm_that_got_no_thread_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rung = threading.Event()
    alarm = Alarm(rung.set)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Timer, "start", fail)
        alarm.by(0.0)
    alarm.by(time.monotonic())
    assert rung.wait(SECONDS)
