"""Pushing, reading and pulling versions, and moving aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterbay.registry.cli.common import (
    ExpectedOption,
    JsonOption,
    NameArgument,
    ReferenceArgument,
    RegistryOption,
    app,
    existing,
)
from adapterbay.registry.console import fail, guarded, write_json
from adapterbay.registry.local.store import Registry
from adapterbay.registry.tables import adapter_table, problem_lines, push_lines, version_lines, write, write_table
from adapterbay.registry.views import ANY, AnyVersion

alias_app = typer.Typer(name="alias", help="Movable names for versions.", no_args_is_help=True)
app.add_typer(alias_app)


def _expected(number: int | None) -> AnyVersion | int | None:
    return ANY if number is None else (number or None)


@app.command()
@guarded()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that PEFT's save_pretrained wrote.")],
    name: NameArgument,
    alias: Annotated[list[str] | None, typer.Option("--alias", metavar="ALIAS", help="Move this alias to it.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Its base: hub:ORG/REPO, a path, ….")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="causal-lm, sequence-classification or feature-extraction.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="LABEL", help="A label, in the order of the head's rows.")
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a PEFT adapter as the next version of NAME."""
    receipt = Registry.open(registry).push(folder, name, aliases=alias or (), base=base, task=task, labels=label)
    if as_json:
        write_json(receipt)
    else:
        write(push_lines(receipt))


@app.command("list")
@guarded()
def list_adapters(
    prefix: Annotated[str, typer.Option("--prefix", help="Only names that begin with this.")] = "",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show all adapters with their newest versions."""
    found = existing(registry).adapters(prefix)
    if as_json:
        write_json({"adapters": found})
    else:
        write_table(adapter_table(found))


@app.command()
@guarded()
def show(reference: ReferenceArgument, registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Show one version with its manifest."""
    store = existing(registry)
    resolved = store.resolve(reference)
    version = store.version(resolved.name, resolved.version)
    manifest = store.manifest(resolved.digest)
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
) -> None:
    """Write a version as a plain PEFT folder."""
    store = existing(registry)
    resolved = store.resolve(reference)
    path = store.pull(resolved.name + "@" + resolved.digest, destination)
    write([f"{resolved.name}@{resolved.version} → {path}"])


@app.command()
@guarded()
def resolve(reference: ReferenceArgument, registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Show what a reference means now."""
    found = existing(registry).resolve(reference)
    if as_json:
        write_json(found)
    else:
        write([f"{found.name}@{found.version} {found.digest}"])


@app.command()
@guarded()
def verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this adapter.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read everything and check every digest. Exits with 1 if anything is wrong."""
    report = existing(registry).verify(name)
    if as_json:
        write_json({"ok": report.ok, "report": report})
    else:
        write([f"{report.checked_versions} versions and {report.checked_blobs} blobs were checked."])
        write(problem_lines(report))
    if not report.ok:
        count = len(report.problems)
        fail(f"{count} {'problem was' if count == 1 else 'problems were'} found: {report.problems[0]}", 1)


@alias_app.command("set")
@guarded()
def set_alias(
    name: NameArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1)],
    expected: ExpectedOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point ALIAS at VERSION, at one instant."""
    move = existing(registry).set_alias(name, alias, version, expected=_expected(expected))
    if as_json:
        write_json(move)
    else:
        before = "" if move.previous is None else f" (was {move.previous})"
        write([f"{name}@{alias} → {move.version}{before}"])


@alias_app.command("rm")
@guarded()
def remove_alias(
    name: NameArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    expected: ExpectedOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove ALIAS. The version stays."""
    move = existing(registry).remove_alias(name, alias, expected=_expected(expected))
    if as_json:
        write_json(move)
    else:
        write([f"{name}@{alias} was removed (was {move.previous})"])
