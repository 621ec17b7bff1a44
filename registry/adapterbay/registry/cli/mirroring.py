"""Copying versions between registries, and the places that have names of their own."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from adapterbay.registry.cli.common import JsonOption, app
from adapterbay.registry.console import guarded, write_json
from adapterbay.registry.location import config_path, named_registries, open_registry
from adapterbay.registry.tables import size, write, write_table


@app.command()
@guarded()
def mirror(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, hub:ORG, hub:ORG/REPO or a configured name.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The same; a folder that is not there is made.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME[=OTHER]]...", help="Only these adapters; OTHER is the name at DST."),
    ] = None,
    aliases: Annotated[bool, typer.Option("--aliases/--no-aliases", help="Set the aliases of SRC at DST.")] = True,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Where their base is, if not where they say.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be copied, and copy nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy versions from SRC to DST with their digests and numbers. Run it again to go on."""
    from adapterbay.registry import mirror as mirrors  # brings huggingface_hub, which takes a while to load

    wanted = mirrors.parse_names(names or ())
    start, end = open_registry(source, create=False), open_registry(destination, create=not dry_run)
    if dry_run:
        report = mirrors.plan(start, end, wanted, aliases=aliases)
    else:
        report = mirrors.mirror(
            start,
            end,
            wanted,
            aliases=aliases,
            base=base,
            progress=lambda copy: None if as_json else write([_line(copy)]),
        )
    if as_json:
        write_json({"dry_run": dry_run, "report": report})
        return
    if dry_run:
        write(_line(copy) for copy in report.copied)
    write(f"alias {each.to}@{each.alias} → {each.version}" for each in report.aliases)
    write(f"left out: {each}" for each in report.left_out)
    done = "would be copied" if dry_run else "were copied"
    write([f"{len(report.copied)} versions {done}, {report.present} were there already."])


def _line(copy: Any) -> str:
    renamed = "" if copy.name == copy.to else f"{copy.name} → "
    return f"{renamed}{copy.to}@{copy.version} {copy.digest} ({size(copy.size_bytes)})"


@app.command()
@guarded()
def places(as_json: JsonOption = False) -> None:
    """Show the registries that registries.toml gives a name."""
    found = named_registries()
    if as_json:
        write_json({"file": config_path(), "places": found})
        return
    if not found:
        write([f"No registry has a name: write sections such as [prod] into {config_path()}."])
        return
    table = Table("Name", "Place", "Endpoint", "Token")
    for name, each in found.items():
        table.add_row(name, each.place, each.endpoint or "", f"${each.token_env}" if each.token_env else "")
    write_table(table)
