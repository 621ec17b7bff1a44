"""Serving a registry by the Hub's protocol, and the tokens of those who use it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from adapterbay.registry.cli.common import JsonOption, app
from adapterbay.registry.console import guarded, write_json
from adapterbay.registry.errors import MissingExtra, RegistryNotFound
from adapterbay.registry.local.store import Registry
from adapterbay.registry.location import folder_of
from adapterbay.registry.serve.settings import DEFAULT_PORT, BaseChoice, ServeSettings, Sizes
from adapterbay.registry.serve.tokens import Token, TokenFile
from adapterbay.registry.tables import write, write_table

token_app = typer.Typer(name="token", help="Who may use a server of this registry.", no_args_is_help=True)
app.add_typer(token_app)

FolderOption = Annotated[
    str | None,
    typer.Option("--registry", metavar="PLACE", help="A folder or a configured name [ADAPTERBAY_REGISTRY]."),
]
TokensOption = Annotated[
    Path | None, typer.Option("--tokens-file", metavar="FILE", help="The tokens (tokens.json in the registry).")
]


@app.command()
@guarded()
def serve(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option("--host", help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    registry: FolderOption = None,
    tokens_file: TokensOption = None,
    anonymous: Annotated[
        str, typer.Option("--anonymous", metavar="none|read|write", help="What callers without a token may do.")
    ] = "none",
    base: Annotated[
        list[str] | None,
        typer.Option("--base", metavar="NAME=REF", help="A base for admission; NAME is what clients call it."),
    ] = None,
    public_url: Annotated[
        str | None, typer.Option("--public-url", metavar="URL", help="Where clients reach it, behind a proxy.")
    ] = None,
    regular_bytes: Annotated[
        int,
        typer.Option("--regular-bytes", min=1, help="Files up to this size travel inside a commit; larger by Git LFS."),
    ] = Sizes().regular_bytes,
) -> None:
    """Serve the registry by the Hub's protocol: clients set HF_ENDPOINT and HF_TOKEN and push and pull as ever."""
    try:
        from adapterbay.registry.serve.running import run
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise MissingExtra(
            f"Serving needs {error.name}: pip install 'adapterbay[registry-server]'.",
            metadata={"extra": "registry-server"},
        ) from error
    sizes = Sizes(regular_bytes=regular_bytes, commit_bytes=max(Sizes().commit_bytes, regular_bytes))
    settings = ServeSettings(
        registry=folder_of(registry, create=True),
        host=host,
        port=port,
        tokens_file=tokens_file,
        anonymous=anonymous,  # type: ignore[arg-type] # checked by ServeSettings
        bases=tuple(BaseChoice.parse(text) for text in base or ()),
        public_url=public_url,
        sizes=sizes,
    )
    if settings.anonymous == "none" and not TokenFile(settings.tokens_path).tokens():
        write(["There are no tokens yet, so nobody may read: make one with `registry token create NAME --scope read`."])
    run(settings, lambda line: write([line]))


@token_app.command("create")
@guarded()
def create_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who it is for; recorded with what they do.")],
    scope: Annotated[str, typer.Option("--scope", metavar="read|write", help="What it is good for.")],
    only: Annotated[
        str | None, typer.Option("--only", metavar="PREFIX", help="Good for this name, or team/ for all below it.")
    ] = None,
    registry: FolderOption = None,
    tokens_file: TokensOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, this once; only its sha256 is kept."""
    folder = folder_of(registry, create=True)
    if tokens_file is None:
        Registry.open(folder).close()  # a folder that holds tokens only would be no registry
    token, text = _tokens(folder, tokens_file).create(name, scope, only)
    if as_json:
        write_json({"token": text, **_shown(token)})
    else:
        write([text])


@token_app.command("list")
@guarded()
def list_tokens(registry: FolderOption = None, tokens_file: TokensOption = None, as_json: JsonOption = False) -> None:
    """Show who has a token."""
    folder = folder_of(registry, create=False)
    if tokens_file is None and not folder.is_dir():
        raise RegistryNotFound(f"There is no registry at {folder}: check --registry.")
    tokens = _tokens(folder, tokens_file).tokens()
    if as_json:
        write_json({"tokens": [_shown(token) for token in tokens]})
        return
    table = Table("Name", "Scope", "Only", "Made (UTC)")
    for token in tokens:
        table.add_row(token.name, token.scope, token.only or "", token.created_at[:16].replace("T", " "))
    write_table(table)


@token_app.command("revoke")
@guarded()
def revoke_token(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    registry: FolderOption = None,
    tokens_file: TokensOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a token back. A running server refuses it from now on."""
    token = _tokens(folder_of(registry, create=False), tokens_file).revoke(name)
    if as_json:
        write_json({"revoked": _shown(token)})
    else:
        write([f"{token.name} was revoked"])


def _tokens(folder: Path, tokens_file: Path | None) -> TokenFile:
    return TokenFile(ServeSettings(folder, tokens_file=tokens_file).tokens_path)


def _shown(token: Token) -> dict[str, str | None]:
    return {each.name: getattr(token, each.name) for each in fields(token) if each.name != "sha256"}
