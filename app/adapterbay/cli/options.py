"""Options that several commands share, and how they are read."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterbay.client import Fusion, Selection, WeightedAdapter
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
SELECTION_HELP = "An adapter reference, REF:WEIGHT, or a fusion such as a:0.7+b:-0.3 or 'ties(a:1+b:1, density=0.2)'."


def parse_weighted(text: str, field: str) -> WeightedAdapter:
    """`REF:WEIGHT`, for instance `tales@2:0.5`, or `REF:WEIGHT[LAYERS=WEIGHT,…]`."""
    try:
        return WeightedAdapter.parse(text)
    except ValueError as error:
        raise InvalidArgument(str(error), field=field) from None


def parse_selection(text: str, field: str) -> Selection:
    """A reference or a fusion: `REF:WEIGHT+REF:WEIGHT`, `ties(REF:WEIGHT+REF:WEIGHT, density=0.2)`."""
    try:
        selection = Selection.parse(text)
        selection.fields()  # numbers that a message cannot hold
        return selection
    except ValueError as error:
        raise InvalidArgument(str(error), field=field) from None


def parse_arm(text: str) -> Selection:
    """An arm: `base`, a reference, or a fusion. An adapter named base is `base@latest`."""
    return Selection(base=True) if text == BASE_ARM else parse_selection(text, "arms")


def choose(adapter: str | None, fuse: list[str] | None, base: bool) -> Selection:
    """What should answer, from --adapter, --fuse and --base: exactly one."""
    parts = tuple(parse_weighted(part, "fuse") for part in fuse or ())
    if [adapter is not None, bool(parts), base].count(True) != 1:
        raise InvalidArgument(
            "Say what should answer by exactly one of --adapter REF, --fuse REF:WEIGHT … and --base.", field="adapter"
        )
    if adapter is not None:
        return parse_selection(adapter, "adapter")
    try:
        return Selection(fusion=Fusion(parts)) if parts else Selection(base=True)
    except ValueError as error:
        raise InvalidArgument(f"{error} See --fuse.", field="fuse") from None


def answered_by(provenance: Provenance) -> str:
    """For people: which versions answered, for instance `sentiment@2 (sha256:1f0c…)`."""
    if not provenance.adapters:
        return "the base alone"
    parts = []
    for use in provenance.adapters:
        weight = "" if use.weight == 1 else f"{use.weight:g} × "
        layers = ",".join(f"{pattern}={factor:g}" for pattern, factor in use.layer_weights.items())
        parts.append(f"{weight}{use.name}@{use.version} ({use.digest[:19]}…)" + (f"[{layers}]" if layers else ""))
    together = " + ".join(parts)
    return together if provenance.fusion is None else f"{provenance.fusion.method} of {together}"
