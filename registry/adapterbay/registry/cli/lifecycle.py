"""What becomes of a version: history, rollback, tags, deprecation, deletion, guards and the evidence they ask for."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterbay.registry.cli.common import (
    ForceOption,
    JsonOption,
    ReferenceArgument,
    RegistryOption,
    WhyOption,
    app,
    complete_name,
    existing,
    forced,
    one_version,
    opened,
    with_force,
)
from adapterbay.registry.cli.versions import show_move
from adapterbay.registry.console import guarded, write_json
from adapterbay.registry.errors import InvalidArgument, InvalidReference, NotFound
from adapterbay.registry.gate import BASE_ARM, Comparison, Guard, Verdict
from adapterbay.registry.local.store import Registry
from adapterbay.registry.reference import check_alias
from adapterbay.registry.tables import history_table, write, write_table


@app.command()
@guarded()
def history(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="An adapter; without it: what was done for every adapter.",
            autocompletion=complete_name,
        ),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what happened to NAME: versions, moves of aliases and all else, by whom and when."""
    if name is None:
        events = existing(registry).history(None)
    else:
        store, spelled = opened(name, registry)
        events = store.history(spelled)
    if as_json:
        write_json({"history": events})
    else:
        write_table(history_table(events))


@app.command()
@guarded()
def rollback(
    reference: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS", help="The alias to move back.", autocompletion=complete_name)
    ],
    force: ForceOption = False,
    why: WhyOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at where it was before its last move; once more goes one further back."""
    overruling = forced(force, why)
    store, spelled = opened(reference, registry)
    name, at, alias = spelled.partition("@")
    if not at or not alias:
        raise InvalidArgument(f"{reference[:80]!r} names no alias: write NAME@champion.", field="reference")
    show_move(name, store.rollback(name, alias, **with_force(store, overruling)), as_json)


@app.command()
@guarded()
def tag(
    reference: ReferenceArgument,
    tags: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Tags to set.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--rm", metavar="KEY", help="A tag to remove.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set and remove tags of a version; without any, show them."""
    store = existing(registry)
    name, version = one_version(store, reference)
    if tags or remove:
        wanted = {key: value for key, _, value in (text.partition("=") for text in tags or ())}
        now = store.tag(name, version, wanted, remove=remove or ())
    else:
        now = dict(store.version(name, version).tags)
    if as_json:
        write_json({"name": name, "version": version, "tags": now})
    else:
        shown = ", ".join(f"{key}={value}" if value else key for key, value in now.items())
        write([f"{name}@{version}: {shown or 'no tags'}"])


@app.command()
@guarded()
def deprecate(
    reference: ReferenceArgument,
    reason: Annotated[str | None, typer.Option("--reason", help="Why, and what to use instead.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back.")] = False,
    registry: RegistryOption = None,
) -> None:
    """Say that a version should not be used any more. It stays usable."""
    if undo == (reason is not None):
        raise InvalidArgument("Give --reason TEXT, or --undo.", field="reason")
    store = existing(registry)
    name, version = one_version(store, reference)
    store.deprecate(name, version, reason)
    write([f"{name}@{version} is {'not deprecated any more' if undo else 'deprecated'}"])


@app.command()
@guarded()
def delete(
    reference: ReferenceArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is recorded.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    registry: RegistryOption = None,
) -> None:
    """Take a version away for good. Its number is never used again; `gc` removes its files."""
    store = existing(registry)
    name, version = one_version(store, reference)
    if not yes:
        typer.confirm(f"Delete {name}@{version} for good?", abort=True)
    store.delete(name, version, reason)
    write([f"{name}@{version} was deleted; gc frees its files"])


@app.command()
@guarded()
def guard(
    reference: Annotated[
        str,
        typer.Argument(metavar="[NAME@]ALIAS", help="The alias to guard: of one adapter, or of every adapter."),
    ],
    minimum: Annotated[
        list[str] | None, typer.Option("--min", metavar="METRIC=VALUE", help="The metric must be at least this.")
    ] = None,
    maximum: Annotated[
        list[str] | None, typer.Option("--max", metavar="METRIC=VALUE", help="The metric must be at most this.")
    ] = None,
    requires: Annotated[
        list[str] | None, typer.Option("--requires", metavar="EVIDENCE", help="comparison or signature.")
    ] = None,
    remove: Annotated[bool, typer.Option("--rm", help="Take the guard away.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Demand that a version shows something before the alias may point at it; without demands, show the guards."""
    store = existing(registry)
    before, at, after = reference.partition("@")
    name, alias = (before, after) if at else (None, before)
    adapter = name if at else (before if _is_adapter(store, before) else None)
    demands = [*(minimum or ()), *(maximum or ()), *(requires or ())]
    if remove and demands:
        raise InvalidArgument("--rm takes the guard away; it goes with no demand.", field="guard")
    if demands or remove:
        if adapter is not None and not at:
            raise InvalidArgument(f"{before} is an adapter: write {before}@ALIAS.", field="guard")
        wanted = Guard(_bounds(minimum), _bounds(maximum), tuple(dict.fromkeys(requires or ()))) if demands else None
        store.guard(name, alias, wanted)
    if name is not None:
        store.aliases(name)  # NotFound, with near names
    wanted_alias = None if adapter is not None and not at else check_alias(alias)
    shown = [
        (place, each, found)
        for place in (None, *([adapter] if adapter is not None else ()))
        for each, found in store.guards(place).items()
        if wanted_alias in (None, each)
    ]
    if as_json:
        write_json({"guards": [{"adapter": place, "alias": each, "guard": found} for place, each, found in shown]})
    else:
        lines = [f"{place}@{each}: {found}" if place else f"every {each}: {found}" for place, each, found in shown]
        write(lines or [f"{reference} is not guarded"])


def _is_adapter(store: Registry, name: str) -> bool:
    try:
        store.aliases(name)
    except (InvalidReference, NotFound):
        return False
    return True


def _bounds(texts: list[str] | None) -> dict[str, float]:
    bounds = {}
    for text in texts or ():
        metric, equals, value = text.partition("=")
        try:
            bounds[metric] = float(value)
        except ValueError:
            equals = ""
        if not equals or not metric:
            raise InvalidArgument(f"{text[:80]!r} is not a bound: write accuracy=0.8.", field="guard")
    return bounds


@app.command("record-comparison")
@guarded()
def record_comparison(
    reference: ReferenceArgument,
    against: Annotated[
        str,
        typer.Argument(metavar="OTHER", help="The other version, or the word base.", autocompletion=complete_name),
    ],
    metric: Annotated[str, typer.Option("--metric", help="What was measured, such as accuracy.")],
    value: Annotated[float, typer.Option("--value", help="What REF reached.")],
    other: Annotated[float, typer.Option("--other", help="What OTHER reached.")],
    inputs: Annotated[int, typer.Option("--inputs", min=1, help="On how many inputs.")],
    verdict: Annotated[str, typer.Option("--verdict", help="REF is better, worse, or inconclusive.")],
    test: Annotated[str | None, typer.Option("--test", help="The statistical test, such as mcnemar.")] = None,
    p_value: Annotated[float | None, typer.Option("--p-value", help="Its p-value.")] = None,
    report: Annotated[str | None, typer.Option("--report", help="Where the whole report is.")] = None,
    registry: RegistryOption = None,
) -> None:
    """Record how a version did against another one: the evidence that a guard with --requires comparison asks for."""
    store = existing(registry)
    name, version = one_version(store, reference)
    arm = BASE_ARM if against == BASE_ARM else store.resolve(against).digest
    words: dict[str, Verdict] = {"better": "better", "worse": "worse", "inconclusive": "inconclusive"}
    if verdict not in words:
        raise InvalidArgument(f"{verdict[:40]!r} is no verdict: better, worse or inconclusive.", field="verdict")
    store.record_comparison(
        name,
        version,
        Comparison(arm, metric, value, other, inputs, words[verdict], test=test, p_value=p_value, report=report),
    )
    write([f"{name}@{version} against {against}: {verdict}, recorded"])
