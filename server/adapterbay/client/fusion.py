"""Several adapters as one, as values and as text: `a:0.7+b:-0.3`, `ties(a:0.7+b:0.3, density=0.2)`.

    fusion   = terms | method "(" terms *( "," setting ) ")"
    terms    = term *( "+" term )
    term     = reference ":" weight [ "[" layers "=" weight *( "," layers "=" weight ) "]" ]
    setting  = ( "density" | "majority_sign" | "rank" | "seed" ) "=" value

`tales:0.5[layers.0-9=0,q_proj=2]` counts half, not at all in the first ten blocks, and fully in q_proj of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from adapterbay.client.errors import RequestError
from adapterbay.client.making import is_finite, is_number, made, several, shown
from adapterbay.v1 import types_pb2

LINEAR: Final = "linear"
_METHOD: Final = "FUSION_METHOD_"
_SIGN: Final = "MAJORITY_SIGN_"
METHODS: Final = tuple(
    name.removeprefix(_METHOD).lower()
    for name, _ in types_pb2.FusionMethod.items()
    if not name.endswith("_UNSPECIFIED")
)
"""The ways to fuse; what they mean is in `adapterbay/v1/types.proto`."""

_TERM = re.compile(r"(?P<text>[^\[\]()]*)(?:\[(?P<layers>[^\[\]]*)\])?")
_CALL = re.compile(r"(?P<method>[a-z_]+)\((?P<inside>.*)\)", re.DOTALL)
_PLUS = re.compile(r"(?<![0-9][eE])\+")
_COMMA = re.compile(r",(?![^\[]*\])")
"""A comma that stands in no brackets."""
_KINDS: Final = {"density": float, "majority_sign": str, "rank": int, "seed": int}


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """A reference and the factor on its delta; `layer_weights` are factors at some layers, the first match counts."""

    reference: str
    weight: float = 1.0
    layer_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.reference, str):
            raise TypeError(f"The reference of a fusion's adapter takes text, not {shown(self.reference)}.")
        _check_weight(self.weight, self.reference)
        if not isinstance(self.layer_weights, Mapping):
            raise TypeError(
                f"layer_weights of {shown(self.reference)} takes {{'LAYERS': weight}}, not {shown(self.layer_weights)}."
            )
        for layers, weight in self.layer_weights.items():
            if not isinstance(layers, str):
                raise TypeError(f"layer_weights of {shown(self.reference)} names layers by text, not {shown(layers)}.")
            _check_weight(weight, self.reference, layers)

    @classmethod
    def parse(cls, text: str) -> WeightedAdapter:
        """`REF:WEIGHT`, or `REF:WEIGHT[LAYERS=WEIGHT,…]`. The reference may itself end with `@sha256:HEX`.

        Raises ValueError that says what is wrong, or TypeError if it is no text.
        """
        if not isinstance(text, str):
            raise TypeError(f"A weighted adapter's text is REFERENCE:WEIGHT, not {shown(text)}.")
        found = _TERM.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"{text!r} has brackets that do not match; write REFERENCE:WEIGHT[LAYERS=WEIGHT].")
        if not is_weighted(found["text"]):
            raise ValueError(f"{text!r} has no weight; write REFERENCE:WEIGHT, as in tales@2:0.5.")
        reference, _, weight = found["text"].rpartition(":")
        layers: dict[str, float] = {}
        for rule in (found["layers"] or "").split(",") if found["layers"] is not None else ():
            pattern, separator, factor = rule.strip().rpartition("=")
            if not separator:
                raise ValueError(f"{rule!r} in {text!r} has no weight; write LAYERS=WEIGHT, as in layers.0-9=0.5.")
            if pattern in layers:
                raise ValueError(f"The layers {pattern!r} appear twice in {text!r}.")
            layers[pattern] = _number(factor, text)
        return cls(reference, _number(weight, text), layers)

    def message(self) -> types_pb2.WeightedAdapter:
        """For a request."""
        return made(
            types_pb2.WeightedAdapter,
            adapter=self.reference,
            weight=self.weight,
            layer_weights=[made(types_pb2.LayerWeight, layers=k, weight=v) for k, v in self.layer_weights.items()],
        )


@dataclass(frozen=True, slots=True)
class Fusion:
    """Adapters applied as one. What `method` does not use stays None; see `Fusion` in `adapterbay/v1/types.proto`."""

    adapters: tuple[WeightedAdapter, ...]
    method: str = LINEAR
    density: float | None = None
    majority_sign: str | None = None
    rank: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.adapters, str | Mapping):
            raise TypeError(f"adapters takes a sequence of WeightedAdapter; Fusion.of reads {shown(self.adapters)}.")
        adapters = tuple(several(self.adapters, "adapters", "WeightedAdapter"))
        for place, adapter in enumerate(adapters):
            if not isinstance(adapter, WeightedAdapter):
                raise TypeError(f"adapters[{place}] takes a WeightedAdapter(REFERENCE, weight), not {shown(adapter)}.")
        if not adapters:
            raise RequestError("The fusion has no adapters; give at least one, as in {'tales': 0.5}.")
        object.__setattr__(self, "adapters", adapters)
        if self.method not in METHODS:
            raise ValueError(f"{self.method!r} is not a method of fusion: {', '.join(METHODS)} are.")
        if self.majority_sign not in (None, "total", "frequency"):
            raise ValueError(f"majority_sign is {self.majority_sign!r}; it must be 'total' or 'frequency'.")
        seen: set[str] = set()
        for adapter in adapters:
            if adapter.reference in seen:
                raise ValueError(f"{adapter.reference!r} appears twice in the fusion.")
            seen.add(adapter.reference)

    @classmethod
    def of(cls, fusion: FusionLike) -> Fusion:
        """From what a call may be given."""
        if isinstance(fusion, Fusion):
            return fusion
        if isinstance(fusion, str):
            return cls.parse(fusion)
        if not isinstance(fusion, Mapping):
            raise TypeError(f"fusion takes {{'NAME': weight}}, a Fusion or its text, not {shown(fusion)}.")
        return cls(tuple(WeightedAdapter(reference, weight) for reference, weight in fusion.items()))

    @classmethod
    def parse(cls, text: str) -> Fusion:
        """From its text. Raises ValueError that says what is wrong, or TypeError if it is no text."""
        if not isinstance(text, str):
            raise TypeError(f"A fusion's text is REFERENCE:WEIGHT+…, not {shown(text)}.")
        call = _CALL.fullmatch(text.strip())
        if call is None:
            return cls(_terms(text))
        terms, *settings = _COMMA.split(call["inside"])
        chosen: dict[str, float | int | str] = {}
        for setting in settings:
            name, separator, value = (part.strip() for part in setting.partition("="))
            if not separator or name not in _KINDS:
                raise ValueError(f"{setting.strip()!r} in {text!r} is not one of {', '.join(_KINDS)}, as in rank=8.")
            if name in chosen:
                raise ValueError(f"{name} appears twice in {text!r}.")
            try:
                chosen[name] = _KINDS[name](value)
            except ValueError:
                raise ValueError(f"{value!r} is no {name}, in {text!r}.") from None
        return cls(_terms(terms), call["method"], **chosen)  # type: ignore[arg-type]

    def message(self) -> types_pb2.Fusion:
        """For a request. What is out of range for the message raises ValueError."""
        sign = f"{_SIGN}{(self.majority_sign or 'unspecified').upper()}"
        return made(
            types_pb2.Fusion,
            adapters=[adapter.message() for adapter in self.adapters],
            method=types_pb2.FusionMethod.Value(f"{_METHOD}{self.method.upper()}"),
            density=self.density,
            majority_sign=types_pb2.MajoritySign.Value(sign),
            rank=self.rank,
            seed=self.seed,
        )


FusionLike = Fusion | Mapping[str, float] | str
"""A fusion, {reference: weight} for the weighted sum, or the text of one."""


def is_weighted(text: str) -> bool:
    """Whether a reference has a weight behind it. `hub:org/repo` and `a@sha256:…` have none."""
    reference, separator, _ = text.rpartition(":")
    return bool(separator) and reference != "hub" and not reference.endswith("@sha256")


def is_fusion(text: str) -> bool:
    """Whether a text is that of a fusion (one adapter with a weight is one, too), and not a reference."""
    return "+" in text or "[" in text or "(" in text or (":" in text and is_weighted(text))


def method_of(number: types_pb2.FusionMethod.ValueType) -> str:
    """The name of a method that an answer reports."""
    return types_pb2.FusionMethod.Name(number).removeprefix(_METHOD).lower()


def sign_of(number: types_pb2.MajoritySign.ValueType) -> str | None:
    """The name of what elected signs; None if nothing did."""
    name = types_pb2.MajoritySign.Name(number).removeprefix(_SIGN).lower()
    return None if name == "unspecified" else name


def _terms(text: str) -> tuple[WeightedAdapter, ...]:
    return tuple(WeightedAdapter.parse(term) for term in _PLUS.split(text))


def _check_weight(weight: object, *of: str) -> None:
    """Raises TypeError for what is no number (True is none), RequestError for one that nothing can be scaled by."""
    if is_number(weight) and is_finite(weight):
        return
    said = f"The weight of {' at '.join(map(shown, of))} is {shown(weight)}; it must be a"
    raise RequestError(f"{said} finite number.") if is_number(weight) else TypeError(f"{said} number.")


def _number(weight: str, text: str) -> float:
    try:
        return float(weight)
    except ValueError:
        raise ValueError(f"The weight {weight!r} in {text!r} is not a number.") from None
