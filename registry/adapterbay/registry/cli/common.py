"""What the commands of `registry` share: the app, options, arguments, and opening a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapterbay.registry.local.store import Registry

app = typer.Typer(name="registry", help="Versions of adapters, with movable names.", no_args_is_help=True)

RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="PLACE",
        help="A folder, hub:ORG or a configured name [ADAPTERBAY_REGISTRY].",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An adapter, such as team/sentiment.")]
ReferenceArgument = Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME@3, NAME@champion or NAME@sha256:….")]
ExpectedOption = Annotated[
    int | None, typer.Option("--expected", metavar="N", min=0, help="Only if it points at version N now (0: at none).")
]


def existing(registry: str | Path | None) -> Registry:
    """The registry at a place. Raises RegistryNotFound if there is none."""
    return Registry.open(registry, create=False)
