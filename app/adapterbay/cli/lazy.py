"""Groups that are imported when they are asked for, so that `adapterbay --help` is quick and needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from adapterbay.registry.errors import MissingExtra

EXTRA_OF_PART = {"trainer": "trainer", "server": "server", "demo": "all", "base": "torch"}


def hand_over(target: str, program: str, arguments: Sequence[str]) -> NoReturn:
    """Runs `module:name`, a typer app or a function, as `program` with `arguments`; ends in SystemExit.

    Raises MissingExtra if the part needs a package that is not installed.
    """
    try:
        found = _load(target)
        command = found if isinstance(found, typer.Typer) else _as_app(found)
        command(args=list(arguments), prog_name=program)
    except ModuleNotFoundError as error:
        raise missing_extra(target, error) from error
    raise SystemExit(0)


def missing_extra(target: str, error: ModuleNotFoundError) -> MissingExtra:
    """What to install so that `target` finds the module it lacks. Raises `error` itself if the module is ours."""
    missing = (error.name or "").split(".")[0]
    if missing in {"", "adapterbay"}:
        raise error
    part = target.split(".")[1]
    extra = EXTRA_OF_PART.get(part, "all")
    return MissingExtra(f"The {part} needs {missing}, which is not installed: pip install 'adapterbay[{extra}]'")


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _as_app(function: Callable[..., Any]) -> typer.Typer:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(function)
    return single
