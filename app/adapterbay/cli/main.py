"""The umbrella: commands that talk to a server, and groups that are imported only when they are asked for."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from adapterbay.cli import compare, generate, predict
from adapterbay.cli.console import ending_in_one_line
from adapterbay.cli.lazy import hand_over

GROUPS = {
    "registry": ("adapterbay.registry.cli:app", "Push, list and pull adapters; move aliases."),
    "trainer": ("adapterbay.trainer.cli:app", "Train adapters on real text. (Extra: trainer.)"),
    "server": ("adapterbay.server.cli:app", "Serve one base and many adapters. (Extra: server.)"),
    "demo": ("adapterbay.demo.cli:demo", "See the whole product work, end to end. (Extra: all.)"),
}
PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}

app = typer.Typer(
    name="adapterbay",
    help="One base model in memory; every fine-tune of it one request away.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("predict")(predict.predict)
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)


def _mount(name: str, target: str, summary: str) -> None:
    """A command that hands everything after its name over to `target`, `--help` included."""

    @app.command(name, help=summary, add_help_option=False, context_settings=PASS_THROUGH)
    def group(context: typer.Context) -> None:
        hand_over(target, f"adapterbay {name}", context.args)


for _name, (_target, _summary) in GROUPS.items():
    _mount(_name, _target, _summary)


@app.command("version")
def version(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print the versions of adapterbay and of what it runs on."""
    import importlib.metadata
    import json
    import platform

    found = {"adapterbay": importlib.metadata.version("adapterbay"), "python": platform.python_version()}
    for package in ("grpcio", "protobuf", "torch", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo("\n".join(f"{name} {number}" for name, number in found.items()))


def run() -> None:
    """The console script `adapterbay`."""
    with ending_in_one_line():
        app(prog_name="adapterbay")


def run_registry() -> None:
    """The console script `registry`."""
    _run_group("registry")


def run_trainer() -> None:
    """The console script `trainer`."""
    _run_group("trainer")


def run_server() -> None:
    """The console script `server`."""
    _run_group("server")


def _run_group(name: str) -> None:
    with ending_in_one_line():
        hand_over(GROUPS[name][0], name, sys.argv[1:])
