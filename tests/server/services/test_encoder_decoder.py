"""A T5 behind gRPC: the text has a context of its own, and the answer's text does not continue it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving_tools import Served
from tiny import TARGETS, make_base
from zoo import Zoo

from adapterbay.client import Client, FailedPreconditionError, InvalidArgumentError, Selection
from adapterbay.registry import Registry


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("t5")
    zoo = Zoo(make_base(root / "base", "t5", layers=1), Registry.open(root / "registry"))
    zoo.add("short", root / "short", targets=TARGETS["t5"][1], task="SEQ_2_SEQ_LM", scale=0.5)
    with Served(zoo, max_length=64) as served, Client(served.address) as client:
        yield client


def test_it_generates_streams_and_compares(asker: Client) -> None:
    whole = asker.generate("a" * 64, adapter="short", max_tokens=64, ignore_end=True)
    assert (whole.prompt_tokens, len(whole.token_ids)) == (64, 64)
    pieces = asker.generate_stream("a" * 64, adapter="short", max_tokens=64, ignore_end=True)
    assert "".join(piece.text for piece in pieces) == whole.text
    answers = list(asker.compare_generate(["short", Selection(base=True)], ["a", "b"], max_tokens=3))
    assert len(answers) == 4
    assert len(asker.embed(["a"], adapter="short")[0].values) == 64


@pytest.mark.parametrize(("text", "most"), [("a" * 65, 1), ("a", 65)])
def test_each_context_has_its_limit(asker: Client, text: str, most: int) -> None:
    with pytest.raises(InvalidArgumentError, match="65"):
        asker.generate(text, adapter="short", max_tokens=most)


def test_an_adapter_without_a_head_labels_nothing(asker: Client) -> None:
    with pytest.raises(FailedPreconditionError, match="no classification head"):
        asker.classify(["a"], adapter="short")
