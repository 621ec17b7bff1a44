"""What a request selected to answer, checked as it stands in the message; nothing is resolved yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.fusing import MAX_PARTS, FusionSettings
from adapterbay.server.weights import LayerWeights, check_pattern
from adapterbay.v1 import inference_pb2, types_pb2

MAX_LAYER_WEIGHTS: Final = 256
_METHOD: Final = "FUSION_METHOD_"
_SIGN: Final = "MAJORITY_SIGN_"
LINEAR: Final = "linear"

SelectingMessage = (
    inference_pb2.GenerateRequest
    | inference_pb2.GenerateStreamRequest
    | inference_pb2.ClassifyRequest
    | inference_pb2.ClassifyTokensRequest
    | inference_pb2.EmbedRequest
    | inference_pb2.Arm
)


@dataclass(frozen=True, slots=True)
class Choice:
    """One adapter that a request named, not resolved yet. `field` is where it named it."""

    reference: str
    weight: float
    field: str
    layer_weights: LayerWeights | None = None


@dataclass(frozen=True, slots=True)
class Selected:
    """No choice is the base alone, one an adapter, several a fusion; `fusion` is how, None the weighted sum."""

    choices: tuple[Choice, ...] = ()
    fusion: FusionSettings | None = None


def read_selection(message: SelectingMessage, prefix: str = "") -> Selected:
    """What should answer. `prefix` is the path of the message in the request and ends with a dot."""
    which = message.WhichOneof("selection")
    if which is None:
        raise InvalidArgument(
            "Nothing was selected to answer: set `adapter`, `fusion` or `base`.", field=f"{prefix}selection"
        )
    if which == "base":
        if not message.base:
            raise InvalidArgument("`base` must be true when it is set; name an adapter instead.", field=f"{prefix}base")
        return Selected()
    if which == "adapter":
        return Selected((read_reference(message.adapter, f"{prefix}adapter"),))
    path = f"{prefix}fusion"
    settings = read_settings(message.fusion, path)
    choices = _read_adapters(message.fusion.adapters, f"{path}.adapters")
    if settings is not None and len(choices) < 2:
        raise InvalidArgument(
            f"The method {settings.method} fuses two adapters or more; leave it out to scale one.",
            field=f"{path}.method",
        )
    return Selected(choices, settings)


def read_reference(reference: str, field: str) -> Choice:
    """A reference that is there; its grammar is the registry's business."""
    if not reference:
        raise InvalidArgument("The adapter reference is empty.", field=field)
    return Choice(reference, 1.0, field)


def read_settings(fusion: types_pb2.Fusion, path: str) -> FusionSettings | None:
    """How adapters become one, complete; None is the weighted sum. Raises InvalidArgument with the field."""
    method = _word(types_pb2.FusionMethod, fusion.method, _METHOD, f"{path}.method") or LINEAR
    sign = _word(types_pb2.MajoritySign, fusion.majority_sign, _SIGN, f"{path}.majority_sign")
    try:
        settings = FusionSettings(
            method,
            fusion.density if fusion.HasField("density") else None,
            fusion.rank if fusion.HasField("rank") else None,
            fusion.seed if fusion.HasField("seed") else None,
            sign,
        ).completed()
    except InvalidArgument as error:
        raise InvalidArgument(error.message, field=f"{path}.{error.field}") from error
    return None if method == LINEAR else settings


def write_settings(settings: FusionSettings, digest: str) -> types_pb2.FusionUse:
    """The inverse of `read_settings`, for the answer."""
    sign = settings.majority_sign or ("total" if settings.elects_signs else "unspecified")
    return types_pb2.FusionUse(
        digest=digest,
        method=types_pb2.FusionMethod.Value(f"{_METHOD}{settings.method.upper()}"),
        density=settings.density,
        majority_sign=types_pb2.MajoritySign.Value(f"{_SIGN}{sign.upper()}"),
        rank=settings.rank,
        seed=settings.seed,
    )


def _word(enum: object, number: int, prefix: str, field: str) -> str | None:
    """The value's name as the registry writes it; None for the default."""
    if number == 0:
        return None
    try:
        name: str = enum.Name(number)  # type: ignore[attr-defined]
    except ValueError:
        raise InvalidArgument(f"The number {number} is not known here.", field=field) from None
    return name.removeprefix(prefix).lower()


def _read_adapters(entries: Sequence[types_pb2.WeightedAdapter], path: str) -> tuple[Choice, ...]:
    if not entries:
        raise InvalidArgument("A fusion needs at least one adapter.", field=path)
    if len(entries) > MAX_PARTS:
        raise InvalidArgument(f"The fusion has {len(entries)} adapters; at most {MAX_PARTS} are taken.", field=path)
    choices: list[Choice] = []
    for index, entry in enumerate(entries):
        reference = read_reference(entry.adapter, f"{path}[{index}].adapter")
        if not math.isfinite(entry.weight) or entry.weight == 0:
            raise InvalidArgument(
                f"The weight of {entry.adapter!r} is {entry.weight:g}; it must be finite and not zero.",
                field=f"{path}[{index}].weight",
            )
        if any(other.reference == entry.adapter for other in choices):
            raise InvalidArgument(f"{entry.adapter!r} appears twice in the fusion.", field=reference.field)
        layer_weights = _read_layers(entry, f"{path}[{index}].layer_weights")
        choices.append(Choice(entry.adapter, entry.weight, reference.field, layer_weights))
    return tuple(choices)


def _read_layers(entry: types_pb2.WeightedAdapter, path: str) -> LayerWeights | None:
    if len(entry.layer_weights) > MAX_LAYER_WEIGHTS:
        raise InvalidArgument(
            f"{entry.adapter!r} has {len(entry.layer_weights)} weights of layers; at most {MAX_LAYER_WEIGHTS} are "
            "taken.",
            field=path,
        )
    rules: list[tuple[str, float]] = []
    for index, rule in enumerate(entry.layer_weights):
        try:
            check_pattern(rule.layers)
        except InvalidArgument as error:
            raise InvalidArgument(error.message, field=f"{path}[{index}].layers") from error
        if not math.isfinite(rule.weight):
            raise InvalidArgument(
                f"The weight of {rule.layers!r} is {rule.weight:g}; it must be finite.", field=f"{path}[{index}].weight"
            )
        rules.append((rule.layers, rule.weight))
    return LayerWeights(entry.weight, tuple(rules)) if rules else None
