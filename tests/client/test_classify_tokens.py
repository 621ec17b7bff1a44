"""Labels of tokens, from the contract to the command: places in the text, special tokens left out, cut texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import grpc
import pytest
import torch
from serving_tools import Failure, Served
from tiny import make_base, peft_model
from zoo import Zoo

from adapterbay.cli import compare, main
from adapterbay.client import (
    AsyncClient,
    Client,
    FailedPreconditionError,
    InvalidArgumentError,
    Selection,
    TokenClassification,
)
from adapterbay.registry import Registry
from adapterbay.registry.errors import InvalidArgument
from adapterbay.v1 import inference_pb2 as pb
from adapterbay.v1 import inference_pb2_grpc

LABELS = ("O", "NAME", "PLACE")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A BERT whose tokenizer puts [CLS] and [SEP] around the bytes of a text."""
    root = tmp_path_factory.mktemp("tagged")
    zoo = Zoo(make_base(root / "base", "bert", layers=1), Registry.open(root / "registry"))
    zoo.add("names", root / "names", targets=["query", "value"], seed=1, task="TOKEN_CLS", labels=LABELS)
    zoo.add("names-b", root / "names-b", targets=["key"], seed=2, task="TOKEN_CLS", labels=LABELS)
    zoo.add("moods", root / "moods", targets=["query"], seed=3, task="SEQ_CLS", labels=["bad", "good"])
    with Served(zoo) as served:
        yield served


@pytest.fixture(scope="module")
def asker(tagged: Served) -> Iterator[Client]:
    with Client(tagged.address) as client:
        yield client


def reference(served: Served, name: str, text: str) -> torch.Tensor:
    """[tokens, labels], special tokens left out."""
    model = peft_model(served.zoo.base, served.zoo.folders[name], "TOKEN_CLS", num_labels=len(LABELS))
    ids = served.engine.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits[0, 1:-1]
    return logits


def check(entry: TokenClassification, served: Served, text: str) -> None:
    expected = reference(served, "names", text).softmax(-1)
    assert [token.label for token in entry] == [LABELS[best] for best in expected.argmax(-1)]
    for token, chances in zip(entry, expected, strict=True):
        assert token.token == text[token.begin : token.end]
        assert LABELS[token.index] == token.label
        assert token.probability == pytest.approx(chances.max().item(), abs=1e-4)


def test_tokens_have_places_and_the_labels_that_transformers_gives_them(tagged: Served, asker: Client) -> None:
    texts = ["Zoë Müller", "in Ulm", "x" * 50]
    answer = asker.classify_tokens(texts, adapter="names")
    assert len(answer) == 3
    for entry, text in zip(answer, texts, strict=True):
        assert entry.tokens == len(text.encode()) + 2
        assert not entry.truncated
        assert [token.token for token in entry] == [character for character in text for _ in character.encode()]
        assert not any(token.scores for token in entry)
        check(entry, tagged, text)
    assert [use.name for use in answer.provenance.adapters] == ["names"]


def test_all_scores_a_fusion_and_the_other_client(tagged: Served, asker: Client) -> None:
    (entry,) = asker.classify_tokens(["Ulm"], fusion={"names": 0.5, "names-b": 0.5}, scores=True)
    for token in entry:
        assert [score.label for score in token.scores] == list(LABELS)
        assert sum(score.probability for score in token.scores) == pytest.approx(1)
        assert max(score.probability for score in token.scores) == token.probability

    async def ask() -> tuple[TokenClassification, ...]:
        async with AsyncClient(tagged.address) as client:
            return tuple(await client.classify_tokens(["Ulm"], adapter="names"))

    (same,) = asyncio.run(ask())
    check(same, tagged, "Ulm")


def test_a_long_text_is_refused_or_cut(tagged: Served, asker: Client) -> None:
    with pytest.raises(InvalidArgumentError, match="502 tokens"):
        asker.classify_tokens(["y" * 500], adapter="names")
    (cut,) = asker.classify_tokens(["y" * 500], adapter="names", truncate=True)
    assert cut.truncated
    assert cut.tokens == 128
    assert [token.begin for token in cut] == list(range(126))


def test_the_wrong_task_is_told(asker: Client) -> None:
    with pytest.raises(FailedPreconditionError, match="call Classify"):
        asker.classify_tokens(["a"], adapter="moods")
    with pytest.raises(FailedPreconditionError, match="call ClassifyTokens"):
        asker.classify(["a"], adapter="names")
    with pytest.raises(FailedPreconditionError, match="base alone has no classification head"):
        asker.classify_tokens(["a"], base=True)


def test_a_comparison_that_finds_its_task_itself_takes_no_labels_of_tokens(asker: Client) -> None:
    arms = [Selection(adapter="names"), Selection(adapter="names-b")]
    with pytest.raises(InvalidArgument, match="names labels tokens, which comparisons do not take"):
        compare._task(asker, compare.TaskChoice.AUTO, arms)
    assert compare._task(asker, compare.TaskChoice.GENERATE, arms) is compare.TaskChoice.GENERATE


def test_bad_requests_name_the_field(tagged: Served) -> None:
    with grpc.insecure_channel(tagged.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request, field in (
            (pb.ClassifyTokensRequest(adapter="names"), "texts"),
            (pb.ClassifyTokensRequest(adapter="names", texts=["a", " "]), "texts[1]"),
            (pb.ClassifyTokensRequest(texts=["a"]), "selection"),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                stub.ClassifyTokens(request)
            failure = Failure(raised.value)
            assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_the_command(tagged: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ADAPTERBAY_SERVER", tagged.address)
    printed = []
    for extra in ((), ("--json",)):
        monkeypatch.setattr("sys.argv", ["adapterbay", "predict", "names", "Ulm", "--tokens", *extra])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert not ended.value.code
        printed.append(capsys.readouterr().out)
    assert "2-3" in printed[0]
    assert "names@1" in printed[0]
    (entry,) = json.loads(printed[1])["classifications"]
    assert [label["token"] for label in entry["labels"]] == ["U", "l", "m"]
