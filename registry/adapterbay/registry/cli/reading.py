"""Looking closer: two versions compared, the model card of one, and what one was made from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adapterbay.registry.backend import Backend
from adapterbay.registry.card import render_card
from adapterbay.registry.cli.common import JsonOption, ReferenceArgument, RegistryOption, app, complete_name, opened
from adapterbay.registry.console import guarded, write_json
from adapterbay.registry.diff import diff_versions
from adapterbay.registry.diff_tables import change_table, metric_table, module_table, summary_lines
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.lineage import lineage
from adapterbay.registry.lineage_svg import to_svg
from adapterbay.registry.lineage_text import to_dot, tree_lines
from adapterbay.registry.manifest import README_FILE
from adapterbay.registry.tables import write, write_table

DEFAULT_MODULES = 20


@app.command()
@guarded()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="NAME, NAME@3, …", autocompletion=complete_name)],
    b: Annotated[str, typer.Argument(metavar="B", help="NAME, NAME@3, …", autocompletion=complete_name)],
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=0, help="Modules to show, the farthest apart first; 0: all.")
    ] = DEFAULT_MODULES,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: settings, metrics, and how far the weights of each layer lie apart."""
    backends = [opened(reference, registry) for reference in (a, b)]
    left, right = (backend.resolve(reference) for backend, reference in backends)
    snapshots = [
        backend.snapshot(f"{side.name}@{side.digest}")
        for (backend, _), side in zip(backends, (left, right), strict=True)
    ]
    found = diff_versions(*snapshots)
    if as_json:
        write_json({"a": left, "b": right, "diff": found})
        return
    for table in (
        change_table(found, f"{left.name}@{left.version}", f"{right.name}@{right.version}"),
        metric_table(found),
        module_table(found.modules[: limit or None], "Module") if found.modules else None,
        module_table(found.heads, "Head") if found.heads else None,
    ):
        if table is not None:
            write_table(table)
    if limit and len(found.modules) > limit:
        write([f"{len(found.modules) - limit} more modules: --limit 0 shows all."])
    write(summary_lines(found))


@app.command()
@guarded()
def card(
    reference: ReferenceArgument,
    name: Annotated[
        str | None, typer.Option("--name", metavar="ORG/REPO", help="The repository it would be published as.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there, not to standard output.")
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the model card that a version would be published with."""
    backend, spelled = opened(reference, registry)
    resolved = backend.resolve(spelled)
    snapshot = backend.snapshot(f"{resolved.name}@{resolved.digest}")
    own = snapshot.read(README_FILE) if README_FILE in snapshot.files else None
    made = render_card(snapshot.manifest, name=name or resolved.name, own_readme=own, version=resolved.version)
    if output is not None:
        output.write_bytes(made)
    if as_json:
        write_json({"version": resolved, "card": made.decode()})
    elif output is None:
        sys.stdout.write(made.decode())
        sys.stdout.flush()
    else:
        write([f"{resolved.name}@{resolved.version} → {output}"])


def show_lineage(
    registry: Backend, reference: str, *, as_json: bool = False, dot: bool = False, svg: bool = False
) -> None:
    """Writes what a version was made from to standard output: as a tree, JSON, DOT or SVG. Raises InvalidArgument."""
    if sum((as_json, dot, svg)) > 1:
        raise InvalidArgument("Choose one of --json, --dot and --svg.", field="lineage")
    graph = lineage(registry, reference)
    if as_json:
        write_json(graph)
    elif dot or svg:
        sys.stdout.write(to_dot(graph) if dot else to_svg(graph))
        sys.stdout.flush()
    else:
        write(tree_lines(graph))
