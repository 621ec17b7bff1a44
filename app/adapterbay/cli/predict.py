"""`adapterbay predict`: labels for texts."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from adapterbay.cli import options
from adapterbay.cli.console import asking
from adapterbay.client import Client, Selection
from adapterbay.registry.console import write_json


def predict(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help=f"For instance sentiment@champion. {options.SELECTION_HELP}")
    ],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="The texts to label.")],
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Label each token, not each text.")] = False,
    server: options.Server = options.SERVER,
    timeout: options.Timeout = 60.0,
    as_json: options.Json = False,
) -> None:
    """Label texts with a classification adapter."""
    selection = options.parse_selection(adapter, "adapter")
    if tokens:
        _predict_tokens(selection, texts, truncate, server, timeout, as_json)
        return
    with Client(server, timeout=timeout) as client, asking(server):
        answer = client.classify(texts, adapter=selection.adapter, fusion=selection.fusion, truncate=truncate)
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


def _predict_tokens(
    selection: Selection, texts: list[str], truncate: bool, server: str, timeout: float, as_json: bool
) -> None:
    with Client(server, timeout=timeout) as client, asking(server):
        answer = client.classify_tokens(texts, adapter=selection.adapter, fusion=selection.fusion, truncate=truncate)
    if as_json:
        labelled = [
            {"text": text, **dataclasses.asdict(entry)} for text, entry in zip(texts, answer.items, strict=True)
        ]
        write_json({"classifications": labelled, "provenance": answer.provenance})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("text", "place", "token", "label", "probability", box=None, header_style="bold")
    for number, entry in enumerate(answer, 1):
        for token in entry:
            place = f"{token.begin}-{token.end}"
            table.add_row(str(number), place, _plain(token.token), token.label, f"{token.probability:.3f}")
    console = Console()
    console.print(table)
    console.print(f"answered by {options.answered_by(answer.provenance)}", style="dim", highlight=False)


def _plain(text: str) -> str:
    """A user's text as one line that rich takes literally."""
    from rich.markup import escape

    return escape(" ".join(text.split()))
