"""Streaming text: pieces join to the whole, characters stay whole, stop strings never show."""

from __future__ import annotations

import random

import pytest
from tiny import byte_tokenizer

from adapterbay.server.tokens import StopWatch, StreamDecoder


@pytest.mark.parametrize(
    "text", ["plain ascii", "naïve café", "日本語のテキスト", "emoji 👩‍🚀 and flags 🇪🇺", " lead", "a\n\nb"]
)
def test_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    decoder = StreamDecoder(tokenizer, tokenizer("prompt")["input_ids"])
    pieces = [decoder.push(token) for token in tokenizer(text)["input_ids"]]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    decoder = StreamDecoder(tokenizer, [])
    ids = tokenizer("a日")["input_ids"][:-1]
    assert "".join(decoder.push(token) for token in ids) == "a"
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"


def test_stop_strings_are_cut_wherever_the_pieces_break() -> None:
    rng = random.Random(0)
    text, stops = "one two three STOP four END", ("STOP", "END", "three STOP!")
    for _ in range(200):
        watch, shown, rest = StopWatch(stops), "", text
        while rest and watch.hit is None:
            cut = rng.randint(1, 5)
            shown += watch.push(rest[:cut])
            rest = rest[cut:]
            assert "STOP" not in shown
        assert watch.hit == "STOP"
        assert shown == "one two three "


def test_what_only_looked_like_a_stop_is_shown() -> None:
    watch = StopWatch(["</end>"])
    assert watch.push("a </e") == "a "
    assert watch.push("nd is not it") == "</end is not it"
    assert watch.push("</en") == ""
    assert watch.flush() == "</en"
    assert watch.hit is None


def test_the_earliest_stop_wins_and_the_longest_at_one_place() -> None:
    watch = StopWatch(["b", "bc", "a"])
    assert watch.push("xabc") == "x"
    assert watch.hit == "a"
    watch = StopWatch(["b", "bc"])
    assert watch.push("xbc") == "x"
    assert watch.hit == "bc"
