"""Making a version out of several."""

from __future__ import annotations

from typing import Annotated

import typer

from adapterbay.registry.cli.common import (
    ForceOption,
    JsonOption,
    RegistryOption,
    WhyOption,
    app,
    complete_name,
    forced,
    opened,
    opened_to_push,
    with_force,
)
from adapterbay.registry.console import guarded, write_json
from adapterbay.registry.fusing import (
    DEFAULT_DENSITY,
    MAJORITY_SIGNS,
    METHODS,
    FusionSettings,
    fuse_versions,
    parse_weighted,
    read_part,
)
from adapterbay.registry.tables import push_lines, write


@app.command()
@guarded()
def fuse(
    name: Annotated[str, typer.Argument(metavar="OUT", help="The adapter that gets the new version.")],
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="REF:WEIGHT…", help="Such as team/a@1:0.7 team/b@champion:0.3.", autocompletion=complete_name
        ),
    ],
    method: Annotated[str, typer.Option("--method", help=f"{', '.join(METHODS)}.")] = "cat",
    density: Annotated[
        float | None,
        typer.Option("--density", help=f"ties, dare, magnitude_prune: the share that is kept ({DEFAULT_DENSITY})."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="svd: the rank of the result.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="dare: what is dropped (0).")] = None,
    majority_sign: Annotated[
        str | None, typer.Option("--majority-sign", help=f"ties: what elects a sign: {', '.join(MAJORITY_SIGNS)}.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option("--alias", metavar="ALIAS", help="Move this alias to it.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Where their base is: hub:ORG/REPO, a path, ….")
    ] = None,
    force: ForceOption = False,
    why: WhyOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fuse versions into the next version of OUT, by PEFT's add_weighted_adapter. Its parents are recorded."""
    overruling = forced(force, why)
    settings = FusionSettings(method, density, rank, seed, majority_sign)
    weighted = [parse_weighted(part) for part in parts]
    found = []
    for part in weighted:
        backend, reference = opened(part.reference, registry)
        found.append(read_part(backend, part.spelled(reference)))
    target, spelled = opened_to_push(name, registry)
    receipt = fuse_versions(
        target, spelled, found, settings, aliases=alias or (), base=base, **with_force(target, overruling)
    )
    if as_json:
        write_json(receipt)
    else:
        write(push_lines(receipt))
