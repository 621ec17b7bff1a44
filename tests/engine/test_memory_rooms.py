"""Who gets host memory when there is too little: pins, held adapters, large and small ones, loads nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from memory_tools import SECONDS, Make, Memory, memories
from zoo import Zoo

from adapterbay.registry.errors import InvalidArgument, QueueFull, Unavailable
from adapterbay.server.adapters.claims import Claim


@pytest.fixture
def make(zoos: dict[str, Zoo]) -> Iterator[Make]:
    with memories(zoos["llama"].registry) as memory:
        yield memory


def patience(memory: Memory, passed: float = 60.0, beyond: float = 60.0) -> None:
    """How long loads wait, other than usual."""
    memory.host.books.passed_seconds, memory.host.books.beyond_seconds = passed, beyond


def pin(memory: Memory, *digests: str) -> None:
    for digest in digests:
        memory.host.pin(digest, True)
        memory.host.load(digest).result(SECONDS)


def failure(future: Future[float]) -> BaseException:
    error = future.exception(SECONDS)
    assert error is not None
    return error


def test_a_load_that_the_pinned_leave_no_room_is_refused_at_once(make: Make) -> None:
    memory = make(300, dict.fromkeys("abcd", 100))
    pin(memory, "a", "b", "c")
    error = failure(memory.host.load("d"))
    assert isinstance(error, InvalidArgument)
    assert "pinned adapters take 300 bytes of the host budget of 300" in error.message
    assert memory.loads == ["a", "b", "c"]
    assert memory.host.counts().queued == 0
    memory.host.pin("a", False)
    memory.host.load("d").result(SECONDS)


def test_a_load_that_waits_is_refused_when_pins_take_its_room(make: Make) -> None:
    memory = make(200, dict.fromkeys("abc", 100))
    held = [memory.used("a"), memory.used("b")]
    waiting = memory.host.load("c")
    assert not waiting.done()
    memory.host.pin("a", True)
    memory.host.pin("b", True)
    assert isinstance(failure(waiting), InvalidArgument)
    for resident in held:
        memory.release(resident)


def test_a_load_that_nobody_waits_for_is_refused_in_time(make: Make) -> None:
    memory = make(200, dict.fromkeys("abc", 100))
    patience(memory, beyond=0.02)
    held = [memory.used("a"), memory.used("b")]
    assert isinstance(failure(memory.host.load("c")), QueueFull)
    assert memory.host.used_bytes == 200
    assert memory.host.tally.failures.read() == {("QUEUE_FULL",): 1}
    memory.release(held[0])
    memory.host.load("c").result(SECONDS)


def test_rows_get_an_answer_beside_pins_that_fill_the_budget(make: Make) -> None:
    """At once and whatever else runs, one request after the other, and nothing stays."""
    memory = make(300, dict.fromkeys("abcdef", 100))
    patience(memory)
    pin(memory, "a", "b", "c")
    busy = memory.used("a")
    claims = [Claim(), Claim()]
    first = [memory.hold(digest, claims[0]) for digest in "de"]
    second = memory.hold("f", claims[1])
    for resident in first:
        resident.loading.result(SECONDS)
    assert memory.host.used_bytes == 500
    assert second.queued
    for resident in first:
        memory.release(resident)
    second.loading.result(SECONDS)
    assert memory.host.used_bytes == 400
    memory.release(second)
    assert memory.host.used_bytes == 300
    assert memory.host.resident() == ("b", "c", "a")
    memory.release(busy)


def test_who_comes_anew_does_not_make_a_turn_longer(make: Make) -> None:
    """What went beyond the budget is asked for without pause: its turn ends with the rows that were there."""
    memory = make(100, dict.fromkeys("apq", 100))
    patience(memory)
    pin(memory, "a")
    first = memory.used("p")
    joined = memory.hold("p")
    assert joined is first, "nobody waits"
    waiting = memory.hold("q")
    late = memory.hold("p")
    assert late is not first
    memory.release(first)
    memory.release(joined)
    waiting.loading.result(SECONDS)
    assert late.queued
    memory.release(waiting)
    late.loading.result(SECONDS)
    memory.release(late)
    assert memory.host.used_bytes == 100
    assert sum(memory.host.tally.load_seconds.read()[0]) == 1 + memory.host.tally.evictions.of()


def test_a_turn_goes_to_who_holds_what_went_beyond(make: Make) -> None:
    """One adapter is held for two requests; the first is over, the second still needs another, and a third waits."""
    memory = make(100, dict.fromkeys("apqr", 100))
    patience(memory)
    pin(memory, "a")
    first, second, third = Claim(), Claim(), Claim()
    shared = [memory.hold("p", first), memory.hold("p", second)]
    other = memory.hold("r", third)
    own = memory.hold("q", second)
    shared[0].loading.result(SECONDS)
    assert own.queued
    assert other.queued
    memory.host.release(shared[0], first)
    own.loading.result(SECONDS)
    assert other.queued
    memory.host.release(shared[1], second)
    memory.host.release(own, second)
    other.loading.result(SECONDS)
    assert memory.host.used_bytes == 200
    memory.release(other)


def test_nobody_goes_further_beyond_the_budget_while_somebody_will_let_go(make: Make) -> None:
    """Two hold what the first took: one has all that it needs and runs, the other needs more."""
    memory = make(100, dict.fromkeys("apqr", 100))
    patience(memory)
    pin(memory, "a")
    first, runs, waits = Claim(), Claim(), Claim()
    taken = [memory.used("p", first), memory.used("r", first)]
    beside = memory.hold("r", runs)
    assert beside is taken[1]
    also = memory.hold("p", waits)
    more = memory.hold("q", waits)
    for resident in taken:
        memory.host.release(resident, first)
    assert more.queued
    memory.host.release(beside, runs)
    more.loading.result(SECONDS)
    assert memory.host.used_bytes == 300
    for resident in (also, more):
        memory.host.release(resident, waits)


def test_small_ones_pass_a_large_one_for_a_while(make: Make) -> None:
    memory = make(400, {"held": 200, "large": 300, **dict.fromkeys("stuvw", 100)})
    patience(memory)
    held = memory.used("held")
    large = memory.hold("large")
    memory.touched("s", "t", "u", "v")
    assert large.queued
    patience(memory, passed=0.0)
    small = memory.hold("s")
    assert small.queued, "what is free is kept for the large one"
    memory.release(held)
    large.loading.result(SECONDS)
    small.loading.result(SECONDS)
    assert memory.host.used_bytes == 400
    memory.release(large)
    memory.release(small)


def test_a_load_goes_beyond_the_budget_in_time(make: Make) -> None:
    """The others are held without pause, and the engine is never idle."""
    memory = make(200, dict.fromkeys("abcd", 100))
    patience(memory, beyond=0.02)
    held = [memory.used("a"), memory.used("b")]
    first, second = memory.hold("c"), memory.hold("d")
    first.loading.result(SECONDS)
    assert memory.host.used_bytes == 300
    assert second.queued
    memory.release(first)
    second.loading.result(SECONDS)
    assert memory.host.used_bytes == 300
    for resident in (*held, second):
        memory.release(resident)
    assert memory.host.used_bytes == 200


def test_an_idle_engine_is_told_when_a_load_has_ended(make: Make) -> None:
    """It had asked for relief while the load was under way, which nobody's rows waited for."""
    memory = make(200, dict.fromkeys("abc", 100))
    patience(memory)
    memory.gates["b"] = threading.Event()
    claim = Claim()
    held = memory.used("a", claim)
    memory.host.pin("b", True)
    waiting = memory.hold("c", claim)
    memory.host.relieve()
    assert waiting.queued
    assert not memory.wakes
    memory.gates["b"].set()
    memory.host.load("b").result(SECONDS)
    until = time.monotonic() + SECONDS
    while not memory.wakes:
        assert time.monotonic() < until
    memory.host.relieve()
    waiting.loading.result(SECONDS)
    for resident in (held, waiting):
        memory.release(resident)
    assert memory.host.used_bytes == 200


def test_there_is_no_relief_while_somebody_can_run(make: Make) -> None:
    """Who has just got the last of its adapters, of which the engine has not heard when it says that it is stuck."""
    memory = make(100, dict.fromkeys("ab", 100))
    patience(memory)
    ready, waiting = memory.used("a"), memory.hold("b")
    memory.host.relieve()
    assert waiting.queued
    memory.release(ready)
    waiting.loading.result(SECONDS)
    memory.release(waiting)


@pytest.mark.parametrize("rows", [False, True])
def test_a_pin_that_does_not_fit_once_its_size_is_known_is_undone(make: Make, rows: bool) -> None:
    memory = make(300, {"a": 200, "grows": 10}, grows=200)
    patience(memory)
    pin(memory, "a")
    memory.gates["grows"] = threading.Event()
    memory.host.pin("grows", True)
    held = memory.hold("grows") if rows else None
    loading = memory.host.load("grows")
    memory.gates["grows"].set()
    if held is None:
        assert "cannot be pinned: the pinned adapters take 200 bytes" in str(failure(loading))
        assert memory.host.used_bytes == 200
    else:  # which are served all the same
        loading.result(SECONDS)
        memory.release(held)
    assert memory.host.counts().pinned == 1
    with pytest.raises(InvalidArgument, match="cannot be pinned"):
        memory.host.pin("grows", True)


def test_bytes_count_until_the_engine_is_free_of_them(make: Make) -> None:
    memory = make(200, dict.fromkeys("abcd", 100))
    memory.touched("a", "b")
    memory.engine_stands = True
    gone = memory.host.books.table["a"]
    waiting = memory.hold("c")
    assert gone.form is not None
    assert (memory.host.used_bytes, waiting.queued, memory.vacated) == (200, True, ["a"])
    also = memory.hold("d")
    assert memory.vacated == ["a", "b"]
    memory.step()
    for resident in (waiting, also):
        resident.loading.result(SECONDS)
    assert gone.form is None
    assert memory.host.used_bytes == 200


def test_an_unload_answers_when_the_device_is_free(make: Make) -> None:
    memory = make(200, {"a": 100})
    memory.touched("a")
    memory.engine_stands = True
    memory.host.books.table["a"].on_device = True
    freed = memory.host.unload("a")
    assert not freed.done()
    assert memory.host.residency("a").bytes == 200
    memory.step()
    assert freed.result(0) == 200
    memory.host.load("a").result(SECONDS)
    last = memory.host.unload("a")
    memory.host.close()
    assert last.result(0) == 100, "there is no engine any more that could be waited for"
    for ask in (memory.hold, memory.host.load):
        with pytest.raises(Unavailable):
            ask("a")


def test_what_nobody_waits_for_any_more_is_not_loaded(make: Make) -> None:
    memory = make(200, dict.fromkeys("abcd", 100))
    patience(memory)
    held = [memory.used("a"), memory.used("b")]
    left, asked = memory.hold("c"), memory.hold("d")
    later = memory.host.load("d")
    for resident in (left, asked, *held):
        memory.release(resident)
    assert isinstance(left.loading.exception(0), Unavailable)
    later.result(SECONDS)
    assert "c" not in memory.loads


def test_random_traffic_leaves_nobody_waiting(make: Make) -> None:
    """Requests of one to three adapters of many sizes, pins and unloads, from several threads, with an engine that is a
    little late: everybody is answered, no more than one request goes beyond the budget, and the books are right."""
    sizes = {f"d{number}": 10 + number * 7 % 60 for number in range(24)}
    memory = make(150, sizes, d3=90, d7=120)
    patience(memory, passed=0.005, beyond=0.01)
    largest = 3 * 120
    over: list[int] = []

    def ask(seed: int) -> None:
        for turn in range(60):
            number = seed * 131 + turn * 17
            claim = Claim()
            asked = [f"d{(number * (step + 1) + step) % 24}" for step in range(1 + number % 3)]
            residents = [memory.hold(digest, claim) for digest in asked]
            for resident in residents:
                resident.loading.result(SECONDS)
            over.append(memory.host.used_bytes - 150)
            if number % 11 == 0:
                memory.host.pin("d0", turn % 2 == 0)
            if number % 7 == 0:
                memory.host.unload(f"d{1 + number % 23}")
            for resident in residents:
                memory.host.release(resident, claim)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(over) == 6 * 60, "somebody still waits"
    assert max(over) <= largest
    memory.host.pin("d0", False)
    books = memory.host.books
    assert books.taken <= 150
    assert not books.queue
    assert not books.leaving
    assert books.taken == sum(resident.size for resident in books.table.values())
    assert books.vacating == books.loads == 0
