"""What the commands of `registry` share: the app, options, arguments, opening a registry, completing names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapterbay.registry.backend import Backend
from adapterbay.registry.errors import AdapterbayError, InvalidArgument
from adapterbay.registry.gate import MAX_WHY
from adapterbay.registry.local.commit import Force
from adapterbay.registry.local.store import Registry
from adapterbay.registry.location import is_hub, open_for, open_registry
from adapterbay.registry.reference import Reference
from adapterbay.registry.views import ANY, AnyVersion, Listing

MAX_COMPLETIONS = 50

app = typer.Typer(name="registry", help="Versions of adapters, with movable names.", no_args_is_help=True)


def complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of adapters, and after an @ their aliases and versions, for a shell. Never an error."""
    try:
        store = open_registry(ctx.params.get("registry"), create=False)
        if not isinstance(store, Registry):
            return []
        name, at, _ = incomplete.partition("@")
        if not at:
            return [found.name for found in store.adapters(listing=Listing(prefix=name, limit=MAX_COMPLETIONS))]
        selectors = [*store.aliases(name), *(str(record.version) for record in store.versions(name))]
        return [found for found in (f"{name}@{selector}" for selector in selectors) if found.startswith(incomplete)]
    except (AdapterbayError, OSError):
        return []


RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="PLACE",
        help="A folder, hub:ORG or a configured name [ADAPTERBAY_REGISTRY].",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="An adapter, such as team/sentiment.", autocompletion=complete_name)
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(metavar="REF", help="NAME, NAME@3, NAME@champion or NAME@sha256:….", autocompletion=complete_name),
]
AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS", help="A movable name, such as champion.")]
ExpectedOption = Annotated[
    int | None, typer.Option("--expected", metavar="N", min=0, help="Only if it points at version N now (0: at none).")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overrule the alias's guard; --why is recorded.")]
WhyOption = Annotated[str | None, typer.Option("--why", metavar="TEXT", help="Why, with --force.")]


def existing(registry: str | Path | None) -> Registry:
    """The local registry at a place. Raises RegistryNotFound if there is none, InvalidArgument if it is not local."""
    return local(open_registry(registry, create=False))


def local(backend: Backend) -> Registry:
    """The backend, if it is a local registry. Raises InvalidArgument."""
    if not isinstance(backend, Registry):
        raise InvalidArgument(
            "This works on a local registry only: mirror what you need (registry mirror), or run it beside the store.",
            field="registry",
        )
    return backend


def opened(reference: str, registry: str | None) -> tuple[Backend, str]:
    """The registry that a reference or name belongs to, and the reference as that registry spells it."""
    return open_for(reference, registry)


def opened_to_push(name: str, registry: str | None) -> tuple[Backend, str]:
    """Like `opened`; a local registry that is not there is made."""
    return open_for(name, registry) if is_hub(name) else (open_registry(registry, create=True), name)


def one_version(store: Registry, reference: str) -> tuple[str, int]:
    """Name and version of what a reference means now."""
    found = store.resolve(Reference.parse(reference))
    return found.name, found.version


def expected_version(number: int | None) -> AnyVersion | int | None:
    """What `--expected` says: None is any, 0 is none."""
    return ANY if number is None else (number or None)


def forced(force: bool, why: str | None) -> Force | None:
    """What `--force` and `--why` say together. Raises InvalidArgument."""
    if why is not None and not force:
        raise InvalidArgument("--why goes with --force.", field="why")
    if why is not None and len(why) > MAX_WHY:
        raise InvalidArgument(f"--why may have {MAX_WHY} characters.", field="why")
    return Force(why or "") if force else None


def with_force(store: Backend, force: Force | None) -> dict[str, Any]:
    """The keyword for `force`, for a registry that has guards. Raises InvalidArgument for another one."""
    if force is None:
        return {}
    if not isinstance(store, Registry):
        raise InvalidArgument("--force overrules a guard, and guards are of registries in folders.", field="force")
    return {"force": force}
