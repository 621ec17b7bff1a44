"""Compare: the same inputs through several arms. All arms of one input are one group, so they run in one batch."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence

from adapterbay.registry.errors import TaskMismatch
from adapterbay.server.requests import (
    ArmSpec,
    ClassifyResult,
    ClassifyTask,
    GenerateResult,
    GenerateTask,
    SamplingSpec,
)
from adapterbay.server.services import messages
from adapterbay.server.services.arms import require_head, resolve_arm, text_limit
from adapterbay.server.services.calls import Call, RowSpec, run_groups
from adapterbay.server.services.encode import Encoder
from adapterbay.server.services.ports import EnginePort
from adapterbay.server.services.selection import Selected, read_selection
from adapterbay.server.services.validate import (
    check_comparison,
    read_conversation,
    read_sampling,
    require_prompt,
)
from adapterbay.v1 import inference_pb2

Groups = list[list[RowSpec]]


async def compare(
    engine: EnginePort, encoder: Encoder, call: Call, request: inference_pb2.CompareRequest
) -> AsyncIterator[inference_pb2.CompareResponse]:
    """Answers as they finish. Arms are resolved once, and one seed serves every arm and input."""
    check_comparison(request)
    selections = [read_selection(arm, f"arms[{index}].") for index, arm in enumerate(request.arms)]
    seed = 0
    if request.WhichOneof("task") == "generate":
        sampling = _seeded(request.generate)
        _check_inputs(request)
        if engine.base.kind == "encoder":
            raise TaskMismatch("The base is an encoder and generates no text; it classifies and embeds.")
        arms = await asyncio.to_thread(_resolved, engine, selections)
        if sampling.temperature > 0 and sampling.seed is not None:
            seed = sampling.seed
        groups = await asyncio.to_thread(_generation_groups, encoder, request, arms, sampling)
    else:
        arms = await asyncio.to_thread(_resolved, engine, selections)
        for arm in arms:
            require_head(arm)
        groups = await asyncio.to_thread(_classification_groups, engine, encoder, request, arms)
    async for (input_index, arm_index), result in run_groups(call, groups):
        response = inference_pb2.CompareResponse(arm_index=arm_index, input_index=input_index, seed=seed)
        if isinstance(result, GenerateResult):
            response.generation.CopyFrom(messages.generation(result))
        elif isinstance(result, ClassifyResult):
            response.classification.CopyFrom(messages.classification(result))
        response.provenance.CopyFrom(messages.provenance(engine.base, arms[arm_index], result.timings))
        yield response


def _resolved(engine: EnginePort, selections: Sequence[Selected]) -> list[ArmSpec]:
    return [resolve_arm(engine.adapters, selection) for selection in selections]


def _seeded(task: inference_pb2.GenerateTask) -> SamplingSpec:
    options = task.log_probabilities if task.HasField("log_probabilities") else None
    sampling = read_sampling(task.sampling, options, "generate.")
    if sampling.temperature > 0 and sampling.seed is None:
        return dataclasses.replace(sampling, seed=secrets.randbits(63))
    return sampling


def _check_inputs(request: inference_pb2.CompareRequest) -> None:
    for index, entry in enumerate(request.inputs):
        if entry.WhichOneof("input") == "text":
            require_prompt(entry.text, f"inputs[{index}].text")
        else:
            read_conversation(entry.conversation, f"inputs[{index}].conversation")


def _generation_groups(
    encoder: Encoder, request: inference_pb2.CompareRequest, arms: list[ArmSpec], sampling: SamplingSpec
) -> Groups:
    groups: Groups = []
    for index, entry in enumerate(request.inputs):
        if entry.WhichOneof("input") == "text":
            ids = encoder.prompt(entry.text, f"inputs[{index}].text")
        else:
            field = f"inputs[{index}].conversation"
            ids = encoder.conversation(read_conversation(entry.conversation, field), field)
        encoder.new_tokens(len(ids), sampling.max_tokens, "generate.sampling.max_tokens")
        task = GenerateTask(prompt_ids=ids, sampling=sampling)
        groups.append([(arm, task) for arm in arms])
    return groups


def _classification_groups(
    engine: EnginePort, encoder: Encoder, request: inference_pb2.CompareRequest, arms: list[ArmSpec]
) -> Groups:
    """Each arm cuts where Classify with that arm would, so that both give the same answer."""
    limits = [text_limit(engine.adapters, arm, engine.base.max_length) for arm in arms]
    truncate = request.classify.truncate
    groups: Groups = []
    for index, entry in enumerate(request.inputs):
        by_limit = {
            limit: encoder.text(entry.text, limit=limit, truncate=truncate, field=f"inputs[{index}].text")
            for limit in set(limits)
        }
        tasks = [ClassifyTask(*by_limit[limit]) for limit in limits]
        groups.append(list(zip(arms, tasks, strict=True)))
    return groups
