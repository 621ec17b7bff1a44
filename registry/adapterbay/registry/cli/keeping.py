"""Keeping a store healthy, and carrying versions to machines without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterbay.registry.archive import export_archive, import_archive
from adapterbay.registry.cli.common import JsonOption, RegistryOption, app, complete_name, existing, local
from adapterbay.registry.console import fail, guarded, write_json
from adapterbay.registry.local.doctor import diagnose
from adapterbay.registry.location import folder_of, open_registry
from adapterbay.registry.tables import size, write


@app.command()
@guarded()
def doctor(
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build the index anew from what is on disk; a damaged one is moved aside.")
    ] = False,
    registry: Annotated[
        str | None,
        typer.Option("--registry", metavar="PLACE", help="A folder or a configured name [ADAPTERBAY_REGISTRY]."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the index with the disk. Exits with 1 if anything is wrong. (`verify` reads every byte.)"""
    diagnosis = diagnose(folder_of(registry, create=False), rebuild=rebuild)
    if as_json:
        write_json({"ok": diagnosis.ok, "diagnosis": diagnosis})
    else:
        write([f"the index of {diagnosis.place} was built anew"] if diagnosis.rebuilt else [])
        write([f"{finding.severity}: {finding}" for finding in diagnosis.findings] or ["nothing is wrong"])
    if not diagnosis.ok:
        errors = [finding for finding in diagnosis.findings if finding.severity == "error"]
        fail(f"{len(errors)} {'thing is' if len(errors) == 1 else 'things are'} wrong: {errors[0]}", 1)


@app.command()
@guarded()
def gc(
    grace: Annotated[
        float, typer.Option("--grace", metavar="HOURS", min=0, help="Keep orphans younger than this.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the files that no version needs any more."""
    report = existing(registry).gc(grace_seconds=3600 * grace, dry_run=dry_run)
    if as_json:
        write_json(report)
    else:
        done = "would be removed" if dry_run else "removed"
        write(
            [f"{report.removed_blobs} blobs {done}, {size(report.freed_bytes)}; {report.fresh} orphans are too fresh"]
        )


@app.command("export")
@guarded()
def export_versions(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...",
            help="NAME for all its versions, or NAME@3, NAME@champion, ….",
            autocompletion=complete_name,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write versions into one file, for a machine without a network."""
    report = export_archive(existing(registry), references, output)
    if as_json:
        write_json(report)
    else:
        write([f"{report.versions} versions → {output} ({size(report.size_bytes)})"])


@app.command("import")
@guarded()
def import_versions(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="What `registry export` wrote.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Where the base is here, if it is named otherwise.")
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the versions of a file in, with their names, numbers and digests. Can be run again."""
    report = import_archive(local(open_registry(registry, create=True)), archive, base=base)
    if as_json:
        write_json(report)
    else:
        write([f"{report.versions} versions imported, {report.skipped} were here", *report.notes])
