"""Pushing, reading and pulling versions, and moving aliases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer

from adapterbay.registry.base import BaseReference, from_root
from adapterbay.registry.cli.common import (
    AliasArgument,
    ExpectedOption,
    ForceOption,
    JsonOption,
    NameArgument,
    ReferenceArgument,
    RegistryOption,
    WhyOption,
    app,
    complete_name,
    expected_version,
    forced,
    local,
    one_version,
    opened,
    opened_to_push,
    with_force,
)
from adapterbay.registry.cli.reading import show_lineage
from adapterbay.registry.console import fail, guarded, write_json
from adapterbay.registry.errors import InvalidArgument, InvalidReference
from adapterbay.registry.local.store import Registry
from adapterbay.registry.location import open_registry
from adapterbay.registry.manifest import TaskName
from adapterbay.registry.tables import adapter_table, problem_lines, push_lines, version_lines, write, write_table
from adapterbay.registry.views import AliasMove, Listing, MetricBound, Problem

alias_app = typer.Typer(name="alias", help="Movable names for versions.", no_args_is_help=True)
app.add_typer(alias_app)


@app.command()
@guarded()
def push(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="What PEFT's save_pretrained wrote; or hub:ORG/REPO@REV, modelscope:ORG/REPO@REV."
        ),
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="An adapter, such as team/sentiment, or hub:ORG/REPO.")],
    alias: Annotated[list[str] | None, typer.Option("--alias", metavar="ALIAS", help="Move this alias to it.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Its base: hub:ORG/REPO, a path, ….")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help=f"One of {', '.join(get_args(TaskName))}.")] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="LABEL", help="A label, in the order of the head's rows.")
    ] = None,
    parent: Annotated[
        list[str] | None, typer.Option("--parent", metavar="REF", help="What it was made from, if it was.")
    ] = None,
    force: ForceOption = False,
    why: WhyOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a PEFT adapter as the next version of NAME."""
    overruling = forced(force, why)
    store, spelled = opened_to_push(name, registry)
    parents = [store.resolve(reference).digest for reference in parent or ()]
    receipt = store.push(
        _source(folder),
        spelled,
        aliases=alias or (),
        base=base,
        task=task,
        labels=label,
        parents=parents,
        **with_force(store, overruling),
    )
    if as_json:
        write_json(receipt)
    else:
        write(push_lines(receipt))


def _source(folder: str) -> Path:
    if folder.startswith(("hub:", "modelscope:")):
        from adapterbay.registry.sources import fetch_adapter_folder

        return fetch_adapter_folder(folder)
    return Path(folder)


@app.command("list")
@guarded()
def list_adapters(
    prefix: Annotated[str, typer.Option("--prefix", help="Only names that begin with this.")] = "",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="Only for this base: a reference, a path or a fingerprint."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help=f"Only with this task: {', '.join(get_args(TaskName))}."),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="Only of this PEFT method, such as LORA.")] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="KEY[=VALUE]", help="Only with this tag; may be repeated.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="BOUND", help="Only with such a metric: 'accuracy>=0.8'; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many.")] = None,
    after: Annotated[str, typer.Option("--after", metavar="NAME", help="Only names that sort after this.")] = "",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show adapters with their newest versions; filters look at the newest version."""
    if task is not None and task not in get_args(TaskName):
        raise InvalidArgument(f"The task {task[:60]!r} is not one of {', '.join(get_args(TaskName))}.", field="task")
    listing = Listing(
        prefix=prefix,
        base=None if base is None else _base(base),
        task=task,
        method=method,
        tags=dict(_tag(text) for text in tag or ()),
        metrics=tuple(MetricBound.parse(text) for text in metric or ()),
        after=after,
        limit=limit,
    )
    store = open_registry(registry, create=False)
    if isinstance(store, Registry):
        found = store.adapters(listing=listing)
    elif listing == Listing(prefix=prefix):
        found = store.adapters(prefix)
    else:
        raise InvalidArgument("On the Hub only --prefix is there to choose by.", field="list")
    if as_json:
        write_json({"adapters": found})
    else:
        write_table(adapter_table(found))


def _base(text: str) -> str:
    """A base as versions name it: a path from the root on. All else as it is: a bare name may be of any scheme."""
    try:
        found = BaseReference.parse(text)
    except InvalidReference:
        return text
    return str(from_root(found)) if found.scheme in ("folder", "gguf") else text


def _tag(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    return key, value if equals else None


@app.command()
@guarded()
def show(
    reference: ReferenceArgument,
    lineage: Annotated[bool, typer.Option("--lineage", help="Show what it was made from instead.")] = False,
    dot: Annotated[bool, typer.Option("--dot", help="The lineage for Graphviz.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="The lineage as a picture.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one version with its manifest, or what it was made from."""
    store, spelled = opened(reference, registry)
    if lineage or dot or svg:
        show_lineage(store, spelled, as_json=as_json, dot=dot, svg=svg)
        return
    resolved = store.resolve(spelled)
    version = store.version(resolved.name, resolved.version)
    manifest = store.snapshot(f"{resolved.name}@{resolved.digest}").manifest
    if as_json:
        write_json({"version": version, "manifest": manifest})
    else:
        write(version_lines(version, manifest))


@app.command()
@guarded()
def pull(
    reference: ReferenceArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is not there yet, or empty.")],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a folder that plain PEFT loads."""
    store, spelled = opened(reference, registry)
    resolved = store.resolve(spelled)
    path = store.pull(f"{resolved.name}@{resolved.digest}", destination)
    if as_json:
        write_json({"resolved": resolved, "path": path})
    else:
        write([f"{resolved.name}@{resolved.version} → {path}"])


@app.command()
@guarded()
def resolve(reference: ReferenceArgument, registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Show what a reference means now."""
    store, spelled = opened(reference, registry)
    found = store.resolve(spelled)
    if as_json:
        write_json(found)
    else:
        write([f"{found.name}@{found.version} {found.digest}"])


@app.command()
@guarded()
def verify(
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Only this adapter; with --key also one version.", autocompletion=complete_name
        ),
    ] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option("--key", metavar="FILE", help="Check signatures too, with this public key; may be repeated."),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read everything and check every digest. Exits with 1 if anything is wrong."""
    store, name = (open_registry(registry, create=False), None) if reference is None else opened(reference, registry)
    if name is not None and "@" in name and not key:
        raise InvalidArgument(
            f"All versions of an adapter are checked: write {name.partition('@')[0][:128]}. (One version: with --key.)",
            field="reference",
        )
    report = store.verify(None if name is None else name.partition("@")[0])
    if key:
        report = replace(report, problems=(*report.problems, *_signatures(local(store), name, key)))
    if as_json:
        write_json({"ok": report.ok, "report": report})
    else:
        write([f"{report.checked_versions} versions and {report.checked_blobs} blobs were checked."])
        write(problem_lines(report))
    if not report.ok:
        count = len(report.problems)
        fail(f"{count} {'problem was' if count == 1 else 'problems were'} found: {report.problems[0]}", 1)


def _signatures(store: Registry, reference: str | None, keys: list[Path]) -> list[Problem]:
    from adapterbay.registry.signing import TrustedKeys, signature_problems

    if reference is None:
        versions = [record for found in store.adapters() for record in store.versions(found.name)]
    elif "@" in reference:
        versions = [store.version(*one_version(store, reference))]
    else:
        versions = store.versions(reference)
    return signature_problems(store, versions, TrustedKeys.read(keys))


@alias_app.command("set")
@guarded()
def set_alias(
    name: NameArgument,
    alias: AliasArgument,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    expected: ExpectedOption = None,
    force: ForceOption = False,
    why: WhyOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point ALIAS at VERSION, at one instant."""
    overruling = forced(force, why)
    store, spelled = opened(name, registry)
    move = store.set_alias(
        spelled, alias, version, expected=expected_version(expected), **with_force(store, overruling)
    )
    show_move(name, move, as_json)


@alias_app.command("rm")
@guarded()
def remove_alias(
    name: NameArgument,
    alias: AliasArgument,
    expected: ExpectedOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove ALIAS. The version stays."""
    store, spelled = opened(name, registry)
    move = store.remove_alias(spelled, alias, expected=expected_version(expected))
    if as_json:
        write_json(move)
    else:
        write([f"{name}@{alias} was removed (was {move.previous})"])


def show_move(name: str, move: AliasMove, as_json: bool) -> None:
    """An alias that moved."""
    if as_json:
        write_json(move)
        return
    before = "" if move.previous is None else f" (was {move.previous})"
    write([f"{name}@{move.alias} → {move.version}{before}"])
    write([f"overruled: {demand}" for demand in move.overruled])
