"""Promotion gates: what a version must show before a guarded alias may point at it.

A guard sets bounds on metrics of the training record and asks for evidence. A move that does not meet it is refused;
it can be forced, and who did so and why is recorded. Every move is checked: a promotion, a push with an alias, a
rollback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from adapterbay.registry.digest import is_digest
from adapterbay.registry.errors import InvalidArgument

MAX_WHY: Final = 2_000
EVIDENCE: Final = ("comparison", "signature")
BASE_ARM: Final = "base"

Verdict = Literal["better", "worse", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A recorded comparison of a version with another arm on the same `inputs` inputs.

    `against` is the digest of the other version, or `base`. `value` and `other` are the two arms' `metric`; `p_value`
    is that of the test named `test`, if one was made; `verdict` is about the version it is recorded for. `report` is
    the digest or place of a longer report, if there is one.
    """

    against: str
    metric: str
    value: float
    other: float
    inputs: int
    verdict: Verdict
    test: str | None = None
    p_value: float | None = None
    report: str | None = None

    def __post_init__(self) -> None:
        if self.against != BASE_ARM and not is_digest(self.against):
            raise InvalidArgument("The other arm of a comparison is a digest, or the word base.", field="against")
        if self.verdict not in ("better", "worse", "inconclusive"):
            raise InvalidArgument(f"{self.verdict!r} is no verdict: better, worse or inconclusive.", field="verdict")
        if self.inputs < 1 or not self.metric:
            raise InvalidArgument("A comparison needs a metric and at least one input.", field="inputs")
        if not (math.isfinite(self.value) and math.isfinite(self.other)):
            raise InvalidArgument(f"{self.metric[:60]} must be a number: {self.value}, {self.other}.", field="value")
        if self.p_value is not None and not 0 <= self.p_value <= 1:
            raise InvalidArgument(f"A p-value lies between 0 and 1, not at {self.p_value}.", field="p_value")

    def to_document(self) -> dict[str, Any]:
        """As it stands in the journal."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Comparison:
        """The inverse of `to_document`."""
        return cls(**document)


@dataclass(frozen=True, slots=True)
class Guard:
    """What a version must show: each metric of `minimum` at least, of `maximum` at most, and all evidence `requires`.

    `comparison`: a recorded comparison that does not say "worse" with the version that the alias points at, or pointed
    at before it was removed (if there is none: with anything). `signature`: the version is signed.
    """

    minimum: Mapping[str, float] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [word for word in self.requires if word not in EVIDENCE]
        if unknown:
            raise InvalidArgument(
                f"{unknown[0][:60]!r} is no evidence that can be required: {', '.join(EVIDENCE)} are.", field="requires"
            )
        for metric, bound in (*self.minimum.items(), *self.maximum.items()):
            if not math.isfinite(bound):
                raise InvalidArgument(f"The bound on {metric[:60]} is {bound}: write accuracy=0.8.", field="guard")
        if not (self.minimum or self.maximum or self.requires):
            raise InvalidArgument("A guard demands something: a bound on a metric, or evidence.", field="guard")
        both = sorted(metric for metric in self.minimum.keys() & self.maximum.keys() if self._crossed(metric))
        if both:
            raise InvalidArgument(f"The guard can never be met: the bounds on {both[0]} cross.", field="guard")

    def _crossed(self, metric: str) -> bool:
        return self.minimum[metric] > self.maximum[metric]

    def to_document(self) -> dict[str, Any]:
        """As it stands in the journal."""
        return {"minimum": dict(self.minimum), "maximum": dict(self.maximum), "requires": list(self.requires)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Guard:
        """The inverse of `to_document`."""
        return cls(document.get("minimum", {}), document.get("maximum", {}), tuple(document.get("requires", ())))

    def __str__(self) -> str:
        parts = [f"{metric} >= {value:g}" for metric, value in self.minimum.items()]
        parts += [f"{metric} <= {value:g}" for metric, value in self.maximum.items()]
        return ", ".join([*parts, *(f"a {word}" for word in self.requires)])


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the version that an alias shall point at. `current` is the digest it points at now, or
    pointed at before it was removed, if any."""

    metrics: Mapping[str, float]
    comparisons: Sequence[Comparison]
    signed: bool
    current: str | None


def unmet(guard: Guard, evidence: Evidence) -> tuple[str, ...]:
    """The demands of the guard that are not met, in words; empty if the move may be made."""
    missing = []
    for metric, least in guard.minimum.items():
        value = evidence.metrics.get(metric)
        if value is None or value < least:
            missing.append(f"{metric} must be at least {least:g}, {_is(value)}")
    for metric, most in guard.maximum.items():
        value = evidence.metrics.get(metric)
        if value is None or value > most:
            missing.append(f"{metric} must be at most {most:g}, {_is(value)}")
    if "comparison" in guard.requires:
        missing += _comparison(evidence)
    if "signature" in guard.requires and not evidence.signed:
        missing.append("it must be signed")
    return tuple(missing)


def _is(value: float | None) -> str:
    return "and is not recorded" if value is None else f"and is {value:g}"


def _comparison(evidence: Evidence) -> list[str]:
    relevant = [found for found in evidence.comparisons if evidence.current in (None, found.against)]
    if not relevant:
        other = (
            "anything"
            if evidence.current is None
            else f"the version it points or pointed at ({evidence.current[:19]}…)"
        )
        return [f"a comparison with {other} must be recorded"]
    if relevant[-1].verdict == "worse":
        newest = relevant[-1]
        return [
            f"the newest comparison says that it is worse ({newest.metric} {newest.value:g} against {newest.other:g})"
        ]
    return []
