"""Response messages to dataclasses: pure, shared by both clients."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC

from adapterbay.client.fusion import method_of, sign_of
from adapterbay.client.types import (
    AdapterChange,
    AdapterInfo,
    AdapterPage,
    AdapterUse,
    AliasInfo,
    Classification,
    Classifications,
    ComparisonAnswer,
    Embeddings,
    EmbeddingVector,
    FusionUse,
    Generation,
    GenerationPiece,
    LabelScore,
    LoadedAdapter,
    PositionLogProbabilities,
    Provenance,
    Timings,
    TokenClassification,
    TokenClassifications,
    TokenLabel,
    TokenLogProbability,
    UnloadedAdapter,
)
from adapterbay.v1 import adapters_pb2, inference_pb2, types_pb2


def _finish_reason(value: inference_pb2.FinishReason.ValueType) -> str:
    return inference_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()


def provenance(message: types_pb2.Provenance) -> Provenance:
    """What answered."""
    return Provenance(
        base_fingerprint=message.base_fingerprint,
        adapters=tuple(
            AdapterUse(
                use.reference,
                use.name,
                use.version,
                use.digest,
                use.weight,
                {rule.layers: rule.weight for rule in use.layer_weights},
            )
            for use in message.adapters
        ),
        quantization=message.quantization,
        timings=Timings(
            queue=message.timings.queue_seconds,
            load=message.timings.load_seconds,
            prefill=message.timings.prefill_seconds,
            decode=message.timings.decode_seconds,
        ),
        fusion=_fusion(message.fusion) if message.HasField("fusion") else None,
    )


def _fusion(message: types_pb2.FusionUse) -> FusionUse:
    return FusionUse(
        digest=message.digest,
        method=method_of(message.method),
        density=message.density if message.HasField("density") else None,
        majority_sign=sign_of(message.majority_sign),
        rank=message.rank if message.HasField("rank") else None,
        seed=message.seed if message.HasField("seed") else None,
    )


def _token(message: inference_pb2.TokenLogProbability) -> TokenLogProbability:
    return TokenLogProbability(message.token_id, message.token, message.log_probability)


def _positions(
    messages: Iterable[inference_pb2.PositionLogProbabilities],
) -> tuple[PositionLogProbabilities, ...]:
    return tuple(
        PositionLogProbabilities(_token(message.chosen), tuple(_token(token) for token in message.top))
        for message in messages
    )


def generation(message: inference_pb2.Generation, source: types_pb2.Provenance) -> Generation:
    """A finished generation."""
    return Generation(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=_finish_reason(message.finish_reason),
        stop=message.stop,
        prompt_tokens=message.prompt_tokens,
        log_probabilities=_positions(message.log_probabilities),
        provenance=provenance(source),
    )


def piece(message: inference_pb2.GenerateStreamResponse) -> GenerationPiece:
    """A piece of a streamed generation."""
    ended = message.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED
    return GenerationPiece(
        text=message.text,
        token_ids=tuple(message.token_ids),
        log_probabilities=_positions(message.log_probabilities),
        finish_reason=_finish_reason(message.finish_reason) if ended else None,
        stop=message.stop,
        prompt_tokens=message.prompt_tokens,
        provenance=provenance(message.provenance) if message.HasField("provenance") else None,
    )


def _scores(messages: Iterable[inference_pb2.LabelScore]) -> tuple[LabelScore, ...]:
    return tuple(LabelScore(score.label, score.probability, score.logit) for score in messages)


def classification(message: inference_pb2.Classification) -> Classification:
    """A text's label."""
    return Classification(
        label=message.label,
        index=message.index,
        scores=_scores(message.scores),
        tokens=message.tokens,
        truncated=message.truncated,
    )


def classifications(message: inference_pb2.ClassifyResponse) -> Classifications:
    """Labels, in the order of the texts."""
    return Classifications(
        tuple(classification(entry) for entry in message.classifications), provenance(message.provenance)
    )


def token_classifications(message: inference_pb2.ClassifyTokensResponse) -> TokenClassifications:
    """Labels of tokens, in the order of the texts."""
    return TokenClassifications(
        tuple(
            TokenClassification(
                tuple(
                    TokenLabel(
                        label.begin,
                        label.end,
                        label.token,
                        label.label,
                        label.index,
                        label.probability,
                        _scores(label.scores),
                    )
                    for label in entry.labels
                ),
                entry.tokens,
                entry.truncated,
            )
            for entry in message.classifications
        ),
        provenance(message.provenance),
    )


def embeddings(message: inference_pb2.EmbedResponse) -> Embeddings:
    """Vectors, in the order of the texts."""
    return Embeddings(
        tuple(EmbeddingVector(tuple(entry.values), entry.tokens, entry.truncated) for entry in message.embeddings),
        provenance(message.provenance),
    )


def comparison_answer(message: inference_pb2.CompareResponse) -> ComparisonAnswer:
    """One arm's answer to one input."""
    answer = message.WhichOneof("answer")
    return ComparisonAnswer(
        arm_index=message.arm_index,
        input_index=message.input_index,
        generation=generation(message.generation, message.provenance) if answer == "generation" else None,
        classification=classification(message.classification) if answer == "classification" else None,
        provenance=provenance(message.provenance),
        seed=message.seed,
    )


def adapter(message: adapters_pb2.Adapter, manifest_json: str | None = None) -> AdapterInfo:
    """One version of an adapter."""
    return AdapterInfo(
        name=message.name,
        version=message.version,
        digest=message.digest,
        aliases=tuple(message.aliases),
        task=message.task,
        method=message.method,
        rank=message.rank,
        labels=tuple(message.labels),
        base_reference=message.base_reference,
        base_fingerprint=message.base_fingerprint,
        size_bytes=message.size_bytes,
        created_at=message.created_at.ToDatetime(tzinfo=UTC),
        servable=message.servable,
        residency=adapters_pb2.Residency.Name(message.residency).removeprefix("RESIDENCY_").lower(),
        resident_bytes=message.resident_bytes,
        pinned=message.pinned,
        active_rows=message.active_rows,
        manifest_json=manifest_json,
    )


def adapter_page(message: adapters_pb2.ListAdaptersResponse) -> AdapterPage:
    """One page of adapters."""
    return AdapterPage(tuple(adapter(entry) for entry in message.adapters), message.next_page_token)


def loaded(message: adapters_pb2.LoadAdapterResponse) -> LoadedAdapter:
    """A version that was loaded."""
    return LoadedAdapter(adapter(message.adapter), message.load_seconds)


def unloaded(message: adapters_pb2.UnloadAdapterResponse) -> UnloadedAdapter:
    """A version that was unloaded."""
    return UnloadedAdapter(adapter(message.adapter), message.freed_bytes)


def change(message: adapters_pb2.WatchAdaptersResponse) -> AdapterChange:
    """One change."""
    return AdapterChange(
        kind=adapters_pb2.AdapterEventType.Name(message.type).removeprefix("ADAPTER_EVENT_TYPE_").lower(),
        adapter=adapter(message.adapter),
        alias=AliasInfo(message.alias.name, message.alias.version) if message.HasField("alias") else None,
        previous_version=message.previous_version,
        message=message.message,
        at=message.at.ToDatetime(tzinfo=UTC),
    )
