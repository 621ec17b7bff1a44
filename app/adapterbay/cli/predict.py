"""`adapterbay predict`: labels for texts."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from adapterbay.cli import options
from adapterbay.cli.console import asking
from adapterbay.client import Client
from adapterbay.registry.console import write_json


def predict(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="An adapter reference, for instance sentiment@champion.")
    ],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="The texts to label.")],
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    server: options.Server = options.SERVER,
    timeout: options.Timeout = 60.0,
    as_json: options.Json = False,
) -> None:
    """Label texts with a classification adapter."""
    with Client(server, timeout=timeout) as client, asking(server):
        answer = client.classify(texts, adapter=adapter, truncate=truncate)
    if as_json:
        labelled = [
            {"text": text, **dataclasses.asdict(entry)} for text, entry in zip(texts, answer.items, strict=True)
        ]
        write_json({"classifications": labelled, "provenance": answer.provenance})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "probability", "text", box=None, header_style="bold")
    for text, entry in zip(texts, answer.items, strict=True):
        cut = " [cut]" if entry.truncated else ""
        table.add_row(entry.label, f"{entry.probability:.3f}", _plain(text) + cut)
    console = Console()
    console.print(table)
    console.print(f"answered by {options.answered_by(answer.provenance)}", style="dim", highlight=False)


def _plain(text: str) -> str:
    """A user's text as one line that rich takes literally."""
    from rich.markup import escape

    return escape(" ".join(text.split()))
