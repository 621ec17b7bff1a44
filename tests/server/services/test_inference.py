"""Every inference RPC over a real server: what comes back, and that streaming, batching and comparing agree."""

from __future__ import annotations

import math

import grpc
import pytest
from serving_tools import LABELS, Served

from adapterbay.server.requests import FinishReason
from adapterbay.v1 import inference_pb2 as pb
from adapterbay.v1 import inference_pb2_grpc, types_pb2

Stub = inference_pb2_grpc.InferenceServiceStub
GREEDY = pb.Sampling(max_tokens=12, ignore_end=True)


def fusion(**weights: float) -> types_pb2.Fusion:
    return types_pb2.Fusion(
        adapters=[types_pb2.WeightedAdapter(adapter=name, weight=weight) for name, weight in weights.items()]
    )


SELECTIONS = {
    "adapter": {"adapter": "tales"},
    "fusion": {"fusion": fusion(tales=0.5, songs=-0.25)},
    "base": {"base": True},
}
each_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


@each_selection
def test_generate_says_what_answered(inference: Stub, served: Served, selection: dict[str, object]) -> None:
    response = inference.Generate(pb.GenerateRequest(prompt="Once upon", sampling=GREEDY, **selection))
    generation = response.generation
    assert len(generation.token_ids) == 12
    assert generation.finish_reason == pb.FINISH_REASON_LENGTH
    assert generation.prompt_tokens == len("Once upon")
    assert not generation.log_probabilities
    provenance = response.provenance
    assert provenance.base_fingerprint == served.engine.base.fingerprint
    assert provenance.quantization == "none"
    used = {use.name: use.weight for use in provenance.adapters}
    expected = {"adapter": {"tales": 1.0}, "fusion": {"tales": 0.5, "songs": -0.25}, "base": {}}
    assert used == expected[next(iter(selection))]
    for use in provenance.adapters:
        assert use.digest == served.zoo.registry.resolve(use.name).digest
        assert (use.reference, use.version) == (use.name, 1)
    timings = provenance.timings
    assert 0 <= timings.load_seconds <= timings.queue_seconds
    assert timings.prefill_seconds > 0
    assert timings.decode_seconds > 0


def test_selections_answer_differently(inference: Stub) -> None:
    answers = {
        tuple(
            inference.Generate(
                pb.GenerateRequest(prompt="Once upon", sampling=GREEDY, **selection)
            ).generation.token_ids
        )
        for selection in SELECTIONS.values()
    }
    assert len(answers) == 3


@each_selection
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, pb.Sampling(max_tokens=30, temperature=1.2, top_p=0.9, top_k=40, seed=7)],
    ids=["greedy", "sampled"],
)
def test_streaming_equals_unary(inference: Stub, selection: dict[str, object], sampling: pb.Sampling) -> None:
    options = pb.LogProbabilityOptions(top=2)
    asked = {"prompt": "Two ways, 一致", "sampling": sampling, "log_probabilities": options, **selection}
    whole = inference.Generate(pb.GenerateRequest(**asked)).generation
    pieces = list(inference.GenerateStream(pb.GenerateStreamRequest(**asked)))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == list(whole.token_ids)
    streamed = [position.chosen.token_id for piece in pieces for position in piece.log_probabilities]
    assert streamed == [position.chosen.token_id for position in whole.log_probabilities] == list(whole.token_ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(pieces) - 1)
    assert not any(piece.HasField("provenance") for piece in pieces[:-1])
    assert pieces[-1].finish_reason == whole.finish_reason
    assert pieces[-1].HasField("provenance")
    assert [piece.prompt_tokens for piece in pieces] == [whole.prompt_tokens] + [0] * (len(pieces) - 1)


def test_a_conversation_goes_through_the_chat_template(inference: Stub, served: Served) -> None:
    messages = [types_pb2.ChatMessage(role="user", content="Hi")]
    chat = inference.Generate(
        pb.GenerateRequest(
            base=True, conversation=types_pb2.Conversation(messages=messages), sampling=pb.Sampling(max_tokens=3)
        )
    )
    rendered = served.engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    raw = inference.Generate(pb.GenerateRequest(base=True, prompt=rendered, sampling=pb.Sampling(max_tokens=3)))
    assert chat.generation.token_ids == raw.generation.token_ids
    assert chat.generation.prompt_tokens == raw.generation.prompt_tokens


def test_log_probabilities_are_of_the_distribution(inference: Stub) -> None:
    request = pb.GenerateRequest(
        base=True, prompt="abc", sampling=GREEDY, log_probabilities=pb.LogProbabilityOptions(top=3)
    )
    generation = inference.Generate(request).generation
    assert len(generation.log_probabilities) == len(generation.token_ids)
    for token, position in zip(generation.token_ids, generation.log_probabilities, strict=True):
        top = [entry.log_probability for entry in position.top]
        assert top == sorted(top, reverse=True)
        assert len(top) == 3
        assert position.chosen.token_id == position.top[0].token_id == token
        assert sum(math.exp(value) for value in top) <= 1 + 1e-6


def test_without_max_tokens_the_default_is_256_or_what_is_left(inference: Stub) -> None:
    def length(prompt: str) -> int:
        request = pb.GenerateRequest(base=True, prompt=prompt, sampling=pb.Sampling(ignore_end=True))
        return len(inference.Generate(request).generation.token_ids)

    assert length("a") == 256
    assert length("a" * 500) == 12


def test_stop_strings_end_the_text_before_them(inference: Stub) -> None:
    plain = inference.Generate(
        pb.GenerateRequest(adapter="tales", prompt="xyz", sampling=pb.Sampling(max_tokens=40, ignore_end=True))
    ).generation
    stop = plain.text[5:7]
    stopped = inference.Generate(
        pb.GenerateRequest(
            adapter="tales", prompt="xyz", sampling=pb.Sampling(max_tokens=40, ignore_end=True, stop=[stop])
        )
    ).generation
    assert stopped.finish_reason == pb.FINISH_REASON_STOP
    assert stopped.stop == stop
    assert stopped.text == plain.text[: plain.text.index(stop)]


def test_classify_keeps_the_order_of_many_texts(inference: Stub, served: Served) -> None:
    texts = [f"text number {index} {'long ' * (index % 7)}" for index in range(100)]
    response = inference.Classify(pb.ClassifyRequest(adapter="sentiment@champion", texts=texts))
    assert len(response.classifications) == 100
    for index in (0, 13, 57, 99):
        alone = inference.Classify(pb.ClassifyRequest(adapter="sentiment", texts=[texts[index]])).classifications[0]
        together = response.classifications[index]
        assert together.tokens == len(texts[index])
        assert together.label == alone.label
        for one, other in zip(together.scores, alone.scores, strict=True):
            assert one.label == other.label
            assert one.logit == pytest.approx(other.logit, abs=1e-4)
    first = response.classifications[0]
    assert [score.label for score in first.scores] == list(LABELS)
    assert sum(score.probability for score in first.scores) == pytest.approx(1)
    assert first.scores[first.index].label == first.label
    assert first.scores[first.index].probability == max(score.probability for score in first.scores)
    assert response.provenance.adapters[0].reference == "sentiment@champion"
    timings = response.provenance.timings
    assert timings.prefill_seconds > 0 == timings.decode_seconds
    served.idle()


def test_one_call_with_a_thousand_texts_does_not_overflow_the_queue(zoo: object, served: Served) -> None:
    with Served(served.zoo, max_queue=8, max_rows=4) as small, grpc.insecure_channel(small.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        response = stub.Classify(pb.ClassifyRequest(adapter="sentiment", texts=[f"t{i}" for i in range(1_000)]))
        assert len(response.classifications) == 1_000
        small.idle()


def test_fused_heads_and_heads_of_other_sizes(inference: Stub) -> None:
    fused = inference.Classify(pb.ClassifyRequest(fusion=fusion(**{"sentiment": 0.5, "sentiment-b": 0.5}), texts=["x"]))
    assert len(fused.classifications[0].scores) == 2
    stars = inference.Classify(pb.ClassifyRequest(adapter="stars", texts=["x"]))
    assert [score.label for score in stars.classifications[0].scores] == ["bad", "so-so", "good"]


def test_a_fusion_by_a_method_says_how_it_was_made(inference: Stub, served: Served) -> None:
    parts = fusion(tales=0.5, songs=-0.25)
    parts.adapters[0].layer_weights.add(layers="layers.0-1", weight=2.0)
    linear = inference.Generate(pb.GenerateRequest(prompt="Once", sampling=GREEDY, fusion=parts))
    assert not linear.provenance.HasField("fusion")
    uses = linear.provenance.adapters
    assert [[(rule.layers, rule.weight) for rule in use.layer_weights] for use in uses] == [[("layers.0-1", 2.0)], []]
    parts.method = types_pb2.FUSION_METHOD_DARE_TIES_SVD
    parts.rank = 4
    fused = inference.Generate(pb.GenerateRequest(prompt="Once", sampling=GREEDY, fusion=parts))
    use = fused.provenance.fusion
    assert use.digest.startswith("fusion:sha256:")
    assert (use.method, use.density, use.majority_sign, use.rank, use.seed) == (
        types_pb2.FUSION_METHOD_DARE_TIES_SVD,
        0.5,
        types_pb2.MAJORITY_SIGN_TOTAL,
        4,
        0,
    )
    assert fused.provenance.adapters == uses
    assert fused.generation.token_ids != linear.generation.token_ids
    parts.seed = 1
    other = inference.Generate(pb.GenerateRequest(prompt="Once", sampling=GREEDY, fusion=parts))
    assert other.provenance.fusion.digest != use.digest
    assert use.digest in served.engine.adapters.resident()
    cat = types_pb2.Fusion(adapters=parts.adapters, method=types_pb2.FUSION_METHOD_CAT)
    arms = [pb.Arm(fusion=cat), pb.Arm(fusion=fusion(tales=1.0)), pb.Arm(adapter="tales")]
    compared = inference.Compare(
        pb.CompareRequest(arms=arms, inputs=[pb.CompareInput(text="Once")], generate=pb.GenerateTask(sampling=GREEDY))
    )
    texts = {answer.arm_index: answer.generation.token_ids for answer in compared}
    assert texts[0] == linear.generation.token_ids, "cat is the weighted sum as one adapter"
    assert texts[1] == texts[2], "a scale of 1 is none"


def test_truncate_cuts_at_the_base_and_says_so(inference: Stub) -> None:
    long, short = "z" * 600, "z"
    response = inference.Classify(pb.ClassifyRequest(adapter="sentiment", texts=[long, short], truncate=True))
    assert [(entry.tokens, entry.truncated) for entry in response.classifications] == [(512, True), (1, False)]
    embedded = inference.Embed(pb.EmbedRequest(base=True, texts=[long], truncate=True)).embeddings[0]
    assert (embedded.tokens, embedded.truncated) == (512, True)


@pytest.mark.parametrize("pooling", [pb.POOLING_UNSPECIFIED, pb.POOLING_MEAN, pb.POOLING_FIRST, pb.POOLING_LAST])
def test_embed(inference: Stub, served: Served, pooling: pb.Pooling.ValueType) -> None:
    request = pb.EmbedRequest(adapter="tales", texts=["one", "two", "one"], pooling=pooling, normalize=True)
    response = inference.Embed(request)
    first, second, third = (list(entry.values) for entry in response.embeddings)
    assert len(first) == served.engine.base.hidden_size
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert first == pytest.approx(third, abs=1e-5)
    assert first != pytest.approx(second, abs=1e-3)


def test_compare_generates_with_one_seed_for_all_arms(inference: Stub, served: Served) -> None:
    arms = [pb.Arm(**selection) for selection in SELECTIONS.values()] + [pb.Arm(adapter="tales@1")]
    inputs = [pb.CompareInput(text=f"input {index}") for index in range(20)]
    conversation = types_pb2.Conversation(messages=[types_pb2.ChatMessage(role="user", content="Hi")])
    inputs.append(pb.CompareInput(conversation=conversation))
    task = pb.GenerateTask(sampling=pb.Sampling(max_tokens=8, temperature=1.0))
    answers = list(inference.Compare(pb.CompareRequest(arms=arms, inputs=inputs, generate=task)))
    places = {(answer.input_index, answer.arm_index): answer for answer in answers}
    assert len(places) == len(answers) == len(arms) * len(inputs)
    assert len({answer.seed for answer in answers}) == 1
    assert answers[0].seed > 0
    for index in range(len(inputs)):
        same, again = places[index, 0], places[index, 3]
        assert same.generation.token_ids == again.generation.token_ids
        assert [use.name for use in places[index, 1].provenance.adapters] == ["tales", "songs"]
        assert not places[index, 2].provenance.adapters
    alone = inference.Generate(
        pb.GenerateRequest(
            adapter="tales",
            prompt="input 4",
            sampling=pb.Sampling(max_tokens=8, temperature=1.0, seed=answers[0].seed),
        )
    )
    assert alone.generation.token_ids == places[4, 0].generation.token_ids
    served.idle()


def test_compare_classifies_as_classify_does(inference: Stub) -> None:
    texts = ["fine", "awful", "z" * 600]
    request = pb.CompareRequest(
        arms=[pb.Arm(adapter="sentiment"), pb.Arm(adapter="stars")],
        inputs=[pb.CompareInput(text=text) for text in texts],
        classify=pb.ClassifyTask(truncate=True),
    )
    answers = {(answer.arm_index, answer.input_index): answer for answer in inference.Compare(request)}
    assert len(answers) == 6
    for arm, name in enumerate(["sentiment", "stars"]):
        alone = inference.Classify(pb.ClassifyRequest(adapter=name, texts=texts, truncate=True)).classifications
        for index, expected in enumerate(alone):
            answer = answers[arm, index]
            assert answer.classification.label == expected.label
            assert answer.classification.truncated == expected.truncated
            assert answer.seed == 0
            assert answer.provenance.adapters[0].name == name


def test_an_alias_that_moves_is_resolved_once_for_each_call(inference: Stub, served: Served) -> None:
    registry = served.zoo.registry
    registry.push(served.zoo.folders["tales"], "moving", base=f"folder:{served.zoo.base}")
    registry.push(served.zoo.folders["songs"], "moving", base=f"folder:{served.zoo.base}")
    registry.set_alias("moving", "live", 1)
    request = pb.GenerateStreamRequest(
        adapter="moving@live", prompt="a", sampling=pb.Sampling(max_tokens=200, ignore_end=True)
    )
    running = inference.GenerateStream(request)
    next(running)
    registry.set_alias("moving", "live", 2)
    after = inference.Generate(
        pb.GenerateRequest(adapter="moving@live", prompt="a", sampling=pb.Sampling(max_tokens=1))
    )
    before = list(running)[-1]
    assert before.provenance.adapters[0].digest == registry.resolve("tales").digest
    assert before.provenance.adapters[0].version == 1
    assert after.provenance.adapters[0].digest == registry.resolve("songs").digest


def test_finish_reasons_cover_the_engines() -> None:
    from adapterbay.server.services.messages import FINISH_REASONS

    assert set(FINISH_REASONS) == set(FinishReason)
