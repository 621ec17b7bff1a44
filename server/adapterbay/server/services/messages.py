"""Results to messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from adapterbay.server.requests import (
    ArmSpec,
    ClassifyResult,
    ClassifyTokensResult,
    EmbedResult,
    FinishReason,
    GenerateResult,
    PositionChances,
    Timings,
    TokenChance,
)
from adapterbay.server.services.ports import BasePort
from adapterbay.server.services.selection import write_settings
from adapterbay.v1 import inference_pb2, types_pb2

FINISH_REASONS = {
    FinishReason.END: inference_pb2.FINISH_REASON_END,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def provenance(base: BasePort, arm: ArmSpec, timings: Timings) -> types_pb2.Provenance:
    """What answered, exactly."""
    return types_pb2.Provenance(
        base_fingerprint=base.fingerprint,
        quantization=base.quantization,
        adapters=[
            types_pb2.AdapterUse(
                reference=part.reference,
                name=part.name,
                version=part.version,
                digest=part.digest,
                weight=part.weight,
                layer_weights=[
                    types_pb2.LayerWeight(layers=pattern, weight=factor)
                    for pattern, factor in (part.layer_weights.rules if part.layer_weights is not None else ())
                ],
            )
            for part in arm.parts
        ],
        fusion=write_settings(arm.fusion, arm.key[0][0]) if arm.fusion is not None else None,
        timings=types_pb2.Timings(
            queue_seconds=timings.queue,
            load_seconds=timings.load,
            prefill_seconds=timings.prefill,
            decode_seconds=timings.decode,
        ),
    )


def joint_timings(rows: Sequence[Timings], wall_seconds: float) -> Timings:
    """Where the time of a call with several texts went, so that queue and prefill add up to the whole call.

    queue: until the first row was computed. load: the longest wait of any row for its adapters, as a share of that.
    prefill: from there until the last row was done, in `wall_seconds` from the call's first submission.
    """
    if len(rows) == 1:
        return rows[0]
    queue = min(row.queue for row in rows)
    load = min(queue, max(row.load for row in rows))
    return Timings(queue=queue, load=load, prefill=max(0.0, wall_seconds - queue))


def chances(positions: Sequence[PositionChances]) -> list[inference_pb2.PositionLogProbabilities]:
    """Log-probabilities, position by position."""
    return [
        inference_pb2.PositionLogProbabilities(
            chosen=_token(position.chosen), top=[_token(chance) for chance in position.top]
        )
        for position in positions
    ]


def _token(chance: TokenChance) -> inference_pb2.TokenLogProbability:
    return inference_pb2.TokenLogProbability(
        token_id=chance.token_id, token=chance.token, log_probability=chance.log_probability
    )


def generation(result: GenerateResult) -> inference_pb2.Generation:
    """A finished generation."""
    return inference_pb2.Generation(
        text=result.text,
        token_ids=result.token_ids,
        finish_reason=FINISH_REASONS[result.finish_reason],
        stop=result.stop,
        prompt_tokens=result.prompt_tokens,
        log_probabilities=chances(result.chances),
    )


def classification(result: ClassifyResult) -> inference_pb2.Classification:
    """A text's label: the likeliest, the first of equals."""
    best = max(range(len(result.probabilities)), key=result.probabilities.__getitem__)
    return inference_pb2.Classification(
        label=result.labels[best],
        index=best,
        scores=_scores(result.labels, result.probabilities, result.logits),
        tokens=result.tokens,
        truncated=result.truncated,
    )


def _scores(
    labels: Sequence[str], probabilities: Sequence[float], logits: Sequence[float]
) -> list[inference_pb2.LabelScore]:
    return [
        inference_pb2.LabelScore(label=label, probability=probability, logit=logit)
        for label, probability, logit in zip(labels, probabilities, logits, strict=True)
    ]


def token_classification(
    result: ClassifyTokensResult, text: str, places: Sequence[tuple[int, int] | None], *, scores: bool
) -> inference_pb2.TokenClassification:
    """The labels of a text's tokens. `places` has [begin, end) for each token of the row, None for special ones."""
    labels = []
    for place, probabilities, logits in zip(places, result.probabilities, result.logits, strict=True):
        if place is None:
            continue
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        labels.append(
            inference_pb2.TokenLabel(
                begin=place[0],
                end=place[1],
                token=text[place[0] : place[1]],
                label=result.labels[best],
                index=best,
                probability=probabilities[best],
                scores=_scores(result.labels, probabilities, logits) if scores else (),
            )
        )
    return inference_pb2.TokenClassification(labels=labels, tokens=result.tokens, truncated=result.truncated)


def embedding(result: EmbedResult) -> inference_pb2.Embedding:
    """A text's vector."""
    return inference_pb2.Embedding(values=result.values, tokens=result.tokens, truncated=result.truncated)
