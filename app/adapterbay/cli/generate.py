"""`adapterbay generate`: complete a prompt."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from adapterbay.cli import options
from adapterbay.cli.console import asking
from adapterbay.client import Client, Generation, Provenance
from adapterbay.client.requests import GenerateOptions
from adapterbay.registry.console import write_json
from adapterbay.registry.errors import InvalidArgument


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to complete; - reads it from standard input.")],
    adapter: Annotated[str | None, typer.Option("--adapter", help=options.SELECTION_HELP)] = None,
    fuse: Annotated[
        list[str] | None, typer.Option("--fuse", metavar="REF:WEIGHT", help="One adapter of a fusion; repeat it.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base alone.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a conversation.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message; with --chat.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    server: options.Server = options.SERVER,
    timeout: options.Timeout = 300.0,
    as_json: options.Json = False,
) -> None:
    """Complete a prompt with an adapter, a fusion or the base."""
    selection = options.choose(adapter, fuse, base)
    if system is not None and not chat:
        raise InvalidArgument("--system needs --chat.", field="system")
    text = sys.stdin.read() if prompt == "-" else prompt
    request: GenerateOptions = {
        "adapter": selection.adapter,
        "fusion": selection.fusion,
        "base": selection.base,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or (),
    }
    if chat:
        before = [{"role": "system", "content": system}] if system is not None else []
        request["messages"] = [*before, {"role": "user", "content": text}]
    raw = None if chat else text
    with Client(server, timeout=timeout) as client, asking(server):
        if stream:
            _stream(client, raw, request, as_json)
        else:
            _whole(client.generate(raw, **request), as_json)


def _whole(answer: Generation, as_json: bool) -> None:
    if as_json:
        write_json(answer)
        return
    typer.echo(answer.text)
    _footer(answer.provenance, answer.finish_reason, len(answer.token_ids))


def _stream(client: Client, prompt: str | None, request: GenerateOptions, as_json: bool) -> None:
    tokens = 0
    with contextlib.closing(client.generate_stream(prompt, **request)) as pieces:
        for piece in pieces:
            tokens += len(piece.token_ids)
            if as_json:
                write_json(piece)
                continue
            typer.echo(piece.text, nl=False)
            sys.stdout.flush()
            if piece.provenance is not None and piece.finish_reason is not None:
                typer.echo()
                _footer(piece.provenance, piece.finish_reason, tokens)


def _footer(provenance: Provenance, finish_reason: str, tokens: int) -> None:
    """On stderr, so that the text alone can be piped."""
    typer.echo(f"answered by {options.answered_by(provenance)}; {tokens} tokens, {finish_reason}", err=True)
