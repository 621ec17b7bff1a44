"""Options that several commands share, and how they are read."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from adapterbay.client import Selection
from adapterbay.client.channel import DEFAULT_ADDRESS
from adapterbay.client.types import Provenance
from adapterbay.registry.errors import InvalidArgument

Server = Annotated[
    str, typer.Option("--server", envvar="ADAPTERBAY_SERVER", metavar="HOST:PORT", help="The server to ask.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds until the call is given up.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="The most new tokens.  (default: 256)")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 is greedy.  (default: 0)")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Keep the smallest set of tokens with this probability.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Keep this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this string; may be repeated.")]

SERVER = DEFAULT_ADDRESS
BASE_ARM = "base"
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse_weighted(text: str, field: str) -> tuple[str, float]:
    """`REF:WEIGHT`, for instance `tales@2:0.5`. The reference may itself end with `@sha256:HEX`."""
    reference, separator, weight = text.rpartition(":")
    if not separator or _HEX_DIGEST.fullmatch(weight):
        raise InvalidArgument(f"{text!r} has no weight; write REFERENCE:WEIGHT, as in tales@2:0.5.", field=field)
    try:
        return reference, float(weight)
    except ValueError:
        raise InvalidArgument(f"The weight {weight!r} in {text!r} is not a number.", field=field) from None


def parse_arm(text: str) -> Selection:
    """An arm: `base`, a reference, or a fusion `REF:WEIGHT+REF:WEIGHT`. An adapter named base is `base@latest`."""
    if text == BASE_ARM:
        return Selection(base=True)
    _, separator, end = text.rpartition(":")
    if "+" not in text and (not separator or text.startswith("hub:") or _HEX_DIGEST.fullmatch(end)):
        return Selection(adapter=text)
    return Selection(fusion=dict(parse_weighted(part, "arms") for part in text.split("+")))


def choose(adapter: str | None, fuse: list[str] | None, base: bool) -> Selection:
    """What should answer, from --adapter, --fuse and --base: exactly one."""
    fusion = dict(parse_weighted(part, "fuse") for part in fuse) if fuse else None
    if fuse and fusion is not None and len(fusion) < len(fuse):
        raise InvalidArgument("An adapter appears twice in --fuse.", field="fuse")
    if [adapter is not None, fusion is not None, base].count(True) != 1:
        raise InvalidArgument(
            "Say what should answer by exactly one of --adapter REF, --fuse REF:WEIGHT … and --base.", field="adapter"
        )
    return Selection(adapter=adapter, fusion=fusion, base=base)


def answered_by(provenance: Provenance) -> str:
    """For people: which versions answered, for instance `sentiment@2 (sha256:1f0c…)`."""
    if not provenance.adapters:
        return "the base alone"
    parts = []
    for use in provenance.adapters:
        weight = "" if use.weight == 1 else f"{use.weight:g} × "
        parts.append(f"{weight}{use.name}@{use.version} ({use.digest[:19]}…)")
    return " + ".join(parts)
