"""`adapterbay demo [--json] [--keep FOLDER]`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from adapterbay.registry.console import guarded
from adapterbay.registry.errors import InvalidArgument
from adapterbay.registry.threads import be_a_good_neighbour


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for adapters and registry, kept.", show_default="deleted")
    ] = None,
) -> None:
    """Train, push, serve, swap, fuse and compare: the whole product on a real model and real reviews."""
    be_a_good_neighbour()
    with guarded():
        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise InvalidArgument(f"{keep} is not empty; name another folder.", field="keep")
        from adapterbay.base.quiet import quiet_libraries

        quiet_libraries()
        with tempfile.TemporaryDirectory(prefix="adapterbay-demo-") as scratch:
            folder = keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            report = _run(folder)
            if keep is not None:
                report["folder"] = str(keep.absolute())
        if as_json:
            typer.echo(json.dumps(report, ensure_ascii=False))
    if not report["ok"]:
        raise typer.Exit(1)


def _run(folder: Path) -> dict[str, object]:
    from adapterbay.demo.console import Narrator
    from adapterbay.demo.script import Demo

    narrator = Narrator()
    demo = Demo(folder, narrator)
    report = demo.run()
    narrator.say("")
    for claim, held in demo.checks.items():
        narrator.say(f"{'✓' if held else '✗'} {claim}")
    narrator.say(f"\n   {'All of it held' if report['ok'] else 'NOT all of it held'}; {report['seconds']} s in all.")
    return report
