"""`adapterbay demo [--json] [--keep FOLDER]`."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer

from adapterbay.registry.console import guarded
from adapterbay.registry.errors import InvalidArgument


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for adapters and registry, kept.", show_default="deleted")
    ] = None,
) -> None:
    """Train, push, serve, swap, fuse and compare: the whole product on a real model and real reviews."""
    with guarded():
        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise InvalidArgument(f"{keep} is not empty; name another folder.", field="keep")
        _quiet()
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


def _quiet() -> None:
    """Libraries' own bars and notices would break the story; what matters of them is told by its steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
