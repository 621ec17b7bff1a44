"""When texts are encoded on the event loop itself: never when that could keep it from its other calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from adapterbay.server.services.encode import SHORT, TEMPLATE, Encoder


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(None, max_length=64)


@contextmanager
def busy(encoder: Encoder) -> Iterator[None]:
    """Another thread is in the middle of a text."""
    begun, ended = threading.Event(), threading.Event()

    def encode() -> None:
        with encoder.at_once([]) as here:
            assert here
            begun.set()
            ended.wait(20)

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        assert begun.wait(20)
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("texts", "here"),
    [([], True), (["a" * (SHORT - TEMPLATE)], True), (["a" * SHORT], False), (["a"] * (SHORT // TEMPLATE), False)],
    ids=["none", "short", "long", "many"],
)
def test_only_few_short_texts_are_encoded_at_once(encoder: Encoder, texts: list[str], here: bool) -> None:
    with encoder.at_once(texts) as told:
        assert told is here


def test_nobody_waits_for_another_threads_text(encoder: Encoder) -> None:
    with busy(encoder), encoder.at_once(["a"]) as here:
        assert not here
    with encoder.at_once(["a"]) as here:
        assert here


def test_a_failure_inside_frees_the_encoder(encoder: Encoder) -> None:
    with pytest.raises(RuntimeError), encoder.at_once(["a"]):
        raise RuntimeError
    with busy(encoder):
        pass
