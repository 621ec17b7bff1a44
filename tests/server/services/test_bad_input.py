"""What bad input gets: a code, a stable reason and the field, never INTERNAL, and nothing is left running."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import grpc
import pytest
from serving_tools import Failure, Served
from tiny import make_base
from zoo import Zoo

from adapterbay.registry import Registry
from adapterbay.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc, types_pb2
from adapterbay.v1 import inference_pb2 as pb

CODE = grpc.StatusCode
SAMPLING = pb.Sampling


def failure(call: Callable[[], object]) -> Failure:
    """How a call failed; streams are read to their end."""

    def finish() -> None:
        result = call()
        if isinstance(result, Iterable):
            list(result)

    with pytest.raises(grpc.RpcError) as caught:
        finish()
    return Failure(caught.value)


def fused(*pairs: tuple[str, float]) -> types_pb2.Fusion:
    return types_pb2.Fusion(adapters=[types_pb2.WeightedAdapter(adapter=a, weight=w) for a, w in pairs])


def methodical(*pairs: tuple[str, float], **settings: object) -> pb.GenerateRequest:
    """A fusion of `pairs`, or of two adapters, with settings."""
    chosen = fused(*(pairs or (("tales", 1), ("songs", 1))))
    chosen.MergeFrom(types_pb2.Fusion(**settings))  # type: ignore[arg-type]
    return pb.GenerateRequest(fusion=chosen, prompt="a")


def layered(layers: str, weight: float = 1.0, count: int = 1) -> pb.GenerateRequest:
    rules = [types_pb2.LayerWeight(layers=layers, weight=weight)] * count
    entry = types_pb2.WeightedAdapter(adapter="tales", weight=1.0, layer_weights=rules)
    return pb.GenerateRequest(fusion=types_pb2.Fusion(adapters=[entry]), prompt="a")


def chat(*messages: tuple[str, str]) -> types_pb2.Conversation:
    return types_pb2.Conversation(messages=[types_pb2.ChatMessage(role=r, content=c) for r, c in messages])


def generate(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"base": True, "prompt": "a", **fields})  # type: ignore[arg-type]


NAN, INF = math.nan, math.inf
LONG = "x" * 600
GENERATE = {
    "no selection": (pb.GenerateRequest(prompt="a"), "selection"),
    "base false": (pb.GenerateRequest(base=False, prompt="a"), "base"),
    "empty adapter": (pb.GenerateRequest(adapter="", prompt="a"), "adapter"),
    "bad reference": (pb.GenerateRequest(adapter="UPPER CASE", prompt="a"), "adapter"),
    "bad selector": (pb.GenerateRequest(adapter="tales@0", prompt="a"), "adapter"),
    "path escape": (pb.GenerateRequest(adapter="../../etc/passwd", prompt="a"), "adapter"),
    "empty fusion": (pb.GenerateRequest(fusion=fused(), prompt="a"), "fusion.adapters"),
    "fusion without name": (pb.GenerateRequest(fusion=fused(("", 1)), prompt="a"), "fusion.adapters[0].adapter"),
    "zero weight": (
        pb.GenerateRequest(fusion=fused(("tales", 1), ("songs", 0)), prompt="a"),
        "fusion.adapters[1].weight",
    ),
    "nan weight": (pb.GenerateRequest(fusion=fused(("tales", NAN)), prompt="a"), "fusion.adapters[0].weight"),
    "infinite weight": (pb.GenerateRequest(fusion=fused(("tales", INF)), prompt="a"), "fusion.adapters[0].weight"),
    "twice by name": (
        pb.GenerateRequest(fusion=fused(("tales", 1), ("tales", 2)), prompt="a"),
        "fusion.adapters[1].adapter",
    ),
    "twice by digest": (
        pb.GenerateRequest(fusion=fused(("tales", 1), ("tales@1", 2)), prompt="a"),
        "fusion.adapters[1].adapter",
    ),
    "65 adapters": (methodical(*((f"a{i}", 1.0) for i in range(65))), "fusion.adapters"),
    "one adapter by ties": (methodical(("tales", 0.5), method=types_pb2.FUSION_METHOD_TIES), "fusion.method"),
    "no such method": (methodical(method=99), "fusion.method"),
    "no such sign": (methodical(method=types_pb2.FUSION_METHOD_TIES, majority_sign=9), "fusion.majority_sign"),
    "density of linear": (methodical(density=0.5), "fusion.density"),
    "density of svd": (methodical(method=types_pb2.FUSION_METHOD_SVD, density=0.5), "fusion.density"),
    "density above 1": (methodical(method=types_pb2.FUSION_METHOD_TIES, density=1.5), "fusion.density"),
    "density nan": (methodical(method=types_pb2.FUSION_METHOD_TIES, density=NAN), "fusion.density"),
    "sign without ties": (
        methodical(method=types_pb2.FUSION_METHOD_DARE_LINEAR, majority_sign=types_pb2.MAJORITY_SIGN_TOTAL),
        "fusion.majority_sign",
    ),
    "rank of ties": (methodical(method=types_pb2.FUSION_METHOD_TIES, rank=4), "fusion.rank"),
    "rank 0": (methodical(method=types_pb2.FUSION_METHOD_SVD, rank=0), "fusion.rank"),
    "seed of cat": (methodical(method=types_pb2.FUSION_METHOD_CAT, seed=1), "fusion.seed"),
    "seed of 64 bits": (methodical(method=types_pb2.FUSION_METHOD_DARE_TIES, seed=2**63), "fusion.seed"),
    "no layers": (layered(""), "fusion.adapters[0].layer_weights[0].layers"),
    "a regex for layers": (layered("(a+)+$"), "fusion.adapters[0].layer_weights[0].layers"),
    "nan for layers": (layered("q_proj", NAN), "fusion.adapters[0].layer_weights[0].weight"),
    "257 layers": (layered("q_proj", count=257), "fusion.adapters[0].layer_weights"),
    "layers that are not there": (layered("layers.99"), "fusion.adapters.layer_weights"),
    "unequal ranks": (methodical(method=types_pb2.FUSION_METHOD_TIES), "fusion.method"),
    "no input": (pb.GenerateRequest(base=True), "input"),
    "empty prompt": (generate(prompt=""), "prompt"),
    "long prompt": (generate(prompt=LONG), "prompt"),
    "no messages": (pb.GenerateRequest(base=True, conversation=chat()), "conversation.messages"),
    "unknown role": (
        pb.GenerateRequest(base=True, conversation=chat(("user", "a"), ("robot", "b"))),
        "conversation.messages[1].role",
    ),
    "empty message": (
        pb.GenerateRequest(base=True, conversation=chat(("user", ""))),
        "conversation.messages[0].content",
    ),
    "long conversation": (pb.GenerateRequest(base=True, conversation=chat(("user", LONG))), "conversation"),
    "negative tokens": (generate(sampling=SAMPLING(max_tokens=-1)), "sampling.max_tokens"),
    "zero tokens": (generate(sampling=SAMPLING(max_tokens=0)), "sampling.max_tokens"),
    "too many tokens": (generate(sampling=SAMPLING(max_tokens=512)), "sampling.max_tokens"),
    "negative temperature": (generate(sampling=SAMPLING(temperature=-0.1)), "sampling.temperature"),
    "nan temperature": (generate(sampling=SAMPLING(temperature=NAN)), "sampling.temperature"),
    "infinite temperature": (generate(sampling=SAMPLING(temperature=INF)), "sampling.temperature"),
    "hot temperature": (generate(sampling=SAMPLING(temperature=100.5)), "sampling.temperature"),
    "zero top_p": (generate(sampling=SAMPLING(temperature=1, top_p=0)), "sampling.top_p"),
    "nan top_p": (generate(sampling=SAMPLING(temperature=1, top_p=NAN)), "sampling.top_p"),
    "big top_p": (generate(sampling=SAMPLING(temperature=1, top_p=1.1)), "sampling.top_p"),
    "zero top_k": (generate(sampling=SAMPLING(temperature=1, top_k=0)), "sampling.top_k"),
    "negative top_k": (generate(sampling=SAMPLING(temperature=1, top_k=-3)), "sampling.top_k"),
    "top_p but greedy": (generate(sampling=SAMPLING(top_p=0.5)), "sampling.top_p"),
    "top_k but greedy": (generate(sampling=SAMPLING(temperature=0, top_k=5)), "sampling.top_k"),
    "empty stop": (generate(sampling=SAMPLING(stop=["a", ""])), "sampling.stop[1]"),
    "many stops": (generate(sampling=SAMPLING(stop=["a"] * 17)), "sampling.stop"),
    "many alternatives": (generate(log_probabilities=pb.LogProbabilityOptions(top=101)), "log_probabilities.top"),
}


@pytest.mark.parametrize(("request_", "field"), GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("streamed", [False, True], ids=["unary", "stream"])
def test_a_bad_generation_names_its_field(
    inference: inference_pb2_grpc.InferenceServiceStub, request_: pb.GenerateRequest, field: str, streamed: bool
) -> None:
    if streamed:
        as_stream = pb.GenerateStreamRequest.FromString(request_.SerializeToString())
        found = failure(lambda: inference.GenerateStream(as_stream))
    else:
        found = failure(lambda: inference.Generate(request_))
    assert (found.code, found.field) == (CODE.INVALID_ARGUMENT, field)
    assert found.reason in {"INVALID_ARGUMENT", "INVALID_REFERENCE"}
    assert found.metadata["field"] == field


def test_a_long_prompt_is_told_both_lengths(inference: inference_pb2_grpc.InferenceServiceStub) -> None:
    found = failure(lambda: inference.Generate(generate(prompt=LONG)))
    assert "600 tokens" in found.message
    assert "512" in found.message


def test_a_huge_prompt_is_refused_untokenized(inference: inference_pb2_grpc.InferenceServiceStub) -> None:
    started = time.monotonic()
    for request in (
        generate(prompt="y" * 20_000_000),
        pb.GenerateRequest(base=True, conversation=chat(("user", "y" * 20_000_000))),
    ):
        found = failure(lambda request=request: inference.Generate(request))
        assert found.code is CODE.INVALID_ARGUMENT
        assert "20,000,000 characters" in found.message
    assert time.monotonic() - started < 20  # tokenized, the two take minutes
    cut = inference.Embed(pb.EmbedRequest(base=True, texts=["y" * 5_000_000], truncate=True)).embeddings[0]
    assert (cut.tokens, cut.truncated) == (512, True)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_bytes_that_are_no_message(channel: grpc.Channel, method: str) -> None:
    call = channel.unary_stream(f"/adapterbay.v1.InferenceService/{method}", None, None)
    found = failure(lambda: call(b"\x0a\x03\xff\xff\xff"))  # a string that is not UTF-8
    assert (found.code, found.reason) == (CODE.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


TEXTS = {
    "no text": ([], "texts"),
    "empty text": (["fine", ""], "texts[1]"),
    "blank text": ([" \n\t"], "texts[0]"),
    "long text": (["fine", "fine", LONG], "texts[2]"),
}


@pytest.mark.parametrize(("texts", "field"), TEXTS.values(), ids=TEXTS)
def test_bad_texts_name_their_place(
    inference: inference_pb2_grpc.InferenceServiceStub, texts: list[str], field: str
) -> None:
    for call in (
        lambda: inference.Classify(pb.ClassifyRequest(adapter="sentiment", texts=texts)),
        lambda: inference.Embed(pb.EmbedRequest(base=True, texts=texts)),
    ):
        found = failure(call)
        assert (found.code, found.field) == (CODE.INVALID_ARGUMENT, field)


def test_unknown_pooling(inference: inference_pb2_grpc.InferenceServiceStub) -> None:
    found = failure(lambda: inference.Embed(pb.EmbedRequest(base=True, texts=["a"], pooling=17)))  # type: ignore[arg-type]
    assert (found.code, found.field) == (CODE.INVALID_ARGUMENT, "pooling")


TWO = [pb.Arm(adapter="tales"), pb.Arm(base=True)]
HEADS = [pb.Arm(adapter="sentiment"), pb.Arm(adapter="stars")]
INPUT = [pb.CompareInput(text="a")]
GEN, CLS = pb.GenerateTask(sampling=SAMPLING(max_tokens=2)), pb.ClassifyTask()
COMPARE = {
    "one arm": (pb.CompareRequest(arms=TWO[:1], inputs=INPUT, generate=GEN), "arms"),
    "many arms": (pb.CompareRequest(arms=TWO * 9, inputs=INPUT, generate=GEN), "arms"),
    "no inputs": (pb.CompareRequest(arms=TWO, generate=GEN), "inputs"),
    "many inputs": (pb.CompareRequest(arms=TWO, inputs=INPUT * 10_001, generate=GEN), "inputs"),
    "no task": (pb.CompareRequest(arms=TWO, inputs=INPUT), "task"),
    "hollow input": (pb.CompareRequest(arms=TWO, inputs=[*INPUT, pb.CompareInput()], generate=GEN), "inputs[1].input"),
    "hollow arm": (pb.CompareRequest(arms=[*TWO, pb.Arm()], inputs=INPUT, generate=GEN), "arms[2].selection"),
    "bad arm": (
        pb.CompareRequest(arms=[*TWO, pb.Arm(fusion=fused(("tales", 0)))], inputs=INPUT, generate=GEN),
        "arms[2].fusion.adapters[0].weight",
    ),
    "conversation to classify": (
        pb.CompareRequest(arms=HEADS, inputs=[pb.CompareInput(conversation=chat(("user", "a")))], classify=CLS),
        "inputs[0].conversation",
    ),
    "blank text to classify": (
        pb.CompareRequest(arms=HEADS, inputs=[pb.CompareInput(text=" ")], classify=CLS),
        "inputs[0].text",
    ),
    "empty prompt": (pb.CompareRequest(arms=TWO, inputs=[pb.CompareInput(text="")], generate=GEN), "inputs[0].text"),
    "bad role": (
        pb.CompareRequest(arms=TWO, inputs=[pb.CompareInput(conversation=chat(("x", "a")))], generate=GEN),
        "inputs[0].conversation.messages[0].role",
    ),
    "bad sampling": (
        pb.CompareRequest(arms=TWO, inputs=INPUT, generate=pb.GenerateTask(sampling=SAMPLING(top_k=2))),
        "generate.sampling.top_k",
    ),
    "long input": (
        pb.CompareRequest(arms=TWO, inputs=[*INPUT, pb.CompareInput(text=LONG)], generate=GEN),
        "inputs[1].text",
    ),
    "long text to classify": (
        pb.CompareRequest(arms=HEADS, inputs=[*INPUT, pb.CompareInput(text=LONG)], classify=CLS),
        "inputs[1].text",
    ),
}


@pytest.mark.parametrize(("request_", "field"), COMPARE.values(), ids=COMPARE)
def test_a_bad_comparison_names_its_field(
    inference: inference_pb2_grpc.InferenceServiceStub, request_: pb.CompareRequest, field: str
) -> None:
    found = failure(lambda: inference.Compare(request_))
    assert (found.code, found.field) == (CODE.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("reference", ["sentimnet", "sentiment@champoin"])
def test_a_misspelt_adapter_gets_near_names(
    inference: inference_pb2_grpc.InferenceServiceStub,
    adapters: adapters_pb2_grpc.AdapterServiceStub,
    reference: str,
) -> None:
    for call in (
        lambda: inference.Generate(pb.GenerateRequest(adapter=reference, prompt="a")),
        lambda: inference.Classify(pb.ClassifyRequest(adapter=reference, texts=["a"])),
        lambda: inference.Compare(
            pb.CompareRequest(arms=[pb.Arm(base=True), pb.Arm(adapter=reference)], inputs=INPUT, generate=GEN)
        ),
        lambda: adapters.GetAdapter(adapters_pb2.GetAdapterRequest(adapter=reference)),
        lambda: adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter=reference)),
    ):
        found = failure(call)
        assert (found.code, found.reason) == (CODE.NOT_FOUND, "NOT_FOUND")
        assert "sentiment" in found.metadata["near"]
        assert "Did you mean" in found.message


def test_an_adapter_of_another_base_gets_both_fingerprints(
    inference: inference_pb2_grpc.InferenceServiceStub,
    adapters: adapters_pb2_grpc.AdapterServiceStub,
    served: Served,
) -> None:
    theirs = served.zoo.registry.versions("foreign")[0].base_fingerprint
    for call in (
        lambda: inference.Generate(pb.GenerateRequest(adapter="foreign", prompt="a")),
        lambda: inference.GenerateStream(pb.GenerateStreamRequest(adapter="foreign", prompt="a")),
        lambda: inference.Embed(pb.EmbedRequest(adapter="foreign", texts=["a"])),
        lambda: adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter="foreign")),
        lambda: adapters.PinAdapter(adapters_pb2.PinAdapterRequest(adapter="foreign", pinned=True)),
    ):
        found = failure(call)
        assert (found.code, found.reason) == (CODE.FAILED_PRECONDITION, "BASE_MISMATCH")
        assert found.metadata["base_fingerprint"] == served.engine.base.fingerprint
        assert found.metadata["adapter_base_fingerprint"] == theirs
        assert theirs in found.message
        assert found.message.startswith("foreign@1: ")


TASKS = {
    "no head": (pb.ClassifyRequest(adapter="tales", texts=["a"]), "tales@1: This adapter has no"),
    "the base has no head": (pb.ClassifyRequest(base=True, texts=["a"]), "The base alone"),
    "labels differ": (
        pb.ClassifyRequest(fusion=fused(("sentiment", 1), ("stars", 1)), texts=["a"]),
        "sentiment@1 + stars@1: The fused heads have different labels",
    ),
}


@pytest.mark.parametrize(("request_", "words"), TASKS.values(), ids=TASKS)
def test_a_task_that_an_adapter_cannot_do(
    inference: inference_pb2_grpc.InferenceServiceStub, served: Served, request_: pb.ClassifyRequest, words: str
) -> None:
    found = failure(lambda: inference.Classify(request_))
    assert (found.code, found.reason) == (CODE.FAILED_PRECONDITION, "TASK_MISMATCH")
    assert found.message.startswith(words)
    served.idle()


def test_files_altered_on_disk_are_refused_and_the_others_unharmed(
    inference: inference_pb2_grpc.InferenceServiceStub, served: Served
) -> None:
    registry: Registry = served.zoo.registry
    folder = served.zoo.folders["songs"]
    adapter_file = folder / "adapter_model.safetensors"
    original = adapter_file.read_bytes()
    served.zoo.add("altered", folder.parent / "altered", targets=["q_proj"], rank=2, seed=99, scale=0.5)
    digest = registry.resolve("altered").digest
    stored = registry.open_snapshot(digest).files["adapter_model.safetensors"]
    stored.chmod(0o644)
    content = bytearray(stored.read_bytes())
    content[-1] ^= 0xFF
    stored.write_bytes(content)
    found = failure(lambda: inference.Generate(pb.GenerateRequest(adapter="altered", prompt="a")))
    assert (found.code, found.reason) == (CODE.FAILED_PRECONDITION, "CORRUPTED")
    assert found.message.startswith("altered@1: adapter_model.safetensors was altered in the registry")
    for method, weights in ((types_pb2.FUSION_METHOD_UNSPECIFIED, 1), (types_pb2.FUSION_METHOD_SVD, 2)):
        fusion = types_pb2.Fusion(
            adapters=[types_pb2.WeightedAdapter(adapter=name, weight=weights) for name in ("songs", "altered")],
            method=method,
        )
        found = failure(partial(inference.Generate, pb.GenerateRequest(fusion=fusion, prompt="a")))
        assert found.reason == "CORRUPTED"
        assert found.message.startswith("altered@1: "), "the one of the two that it is"
    assert inference.Generate(pb.GenerateRequest(adapter="songs", prompt="a", sampling=SAMPLING(max_tokens=1)))
    assert adapter_file.read_bytes() == original
    served.idle()


ADAPTERS = {
    "empty reference": (lambda stub: stub.GetAdapter(adapters_pb2.GetAdapterRequest()), "adapter"),
    "bad reference": (lambda stub: stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter="A B")), "adapter"),
    "negative page": (lambda stub: stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=-1)), "page_size"),
    "big page": (lambda stub: stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_size=1001)), "page_size"),
    "bad token": (lambda stub: stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_token="no")), "page_token"),
    "bad json token": (
        lambda stub: stub.ListAdapters(adapters_pb2.ListAdaptersRequest(page_token="WzFd")),
        "page_token",
    ),
}


@pytest.mark.parametrize(("call", "field"), ADAPTERS.values(), ids=ADAPTERS)
def test_bad_adapter_calls(adapters: adapters_pb2_grpc.AdapterServiceStub, call: object, field: str) -> None:
    found = failure(lambda: call(adapters))  # type: ignore[operator]
    assert (found.code, found.field) == (CODE.INVALID_ARGUMENT, field)


def test_an_encoder_generates_nothing(tmp_path: Path) -> None:
    zoo = Zoo(make_base(tmp_path / "bert", "bert"), Registry.open(tmp_path / "registry"))
    with Served(zoo) as served, grpc.insecure_channel(served.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        found = failure(lambda: stub.Generate(generate()))
        assert (found.code, found.reason) == (CODE.FAILED_PRECONDITION, "TASK_MISMATCH")
        compared = failure(lambda: stub.Compare(pb.CompareRequest(arms=[TWO[1]] * 2, inputs=INPUT, generate=GEN)))
        assert (compared.code, compared.reason) == (CODE.FAILED_PRECONDITION, "TASK_MISMATCH")
        assert len(stub.Embed(pb.EmbedRequest(base=True, texts=["a"])).embeddings[0].values) == 64
        cut = stub.Embed(pb.EmbedRequest(base=True, texts=["z" * 300], truncate=True)).embeddings[0]
        assert (cut.tokens, cut.truncated) == (128, True)


def test_nothing_was_left_running(served: Served) -> None:
    served.idle()
