"""`server start`: settings from flags, one frozen config, and what the server holds in a few plain lines."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from adapterbay.registry.errors import AdapterbayError, InvalidArgument
from adapterbay.server.config import ServerConfig

if TYPE_CHECKING:
    from adapterbay.server.app import Serving

_BEGAN = time.monotonic()
"""When this command was loaded: before torch, a fraction of a second after the interpreter's start."""
LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULTS = ServerConfig()
OPTIONS = {"max_rows": "--max-batch", "trusted_keys": "--trusted-key"}
"""Settings whose option has another name."""

app = typer.Typer(
    name="server",
    help="Serve one base model and many adapters over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("start")
def start(
    base: Annotated[
        str | None, typer.Option(help="hub:ORG/REPO, modelscope:ORG/REPO, gguf:PATH, package:NAME or a folder.")
    ] = None,
    registry: Annotated[str | None, typer.Option(help="The registry's folder.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="The port; 0 picks a free one.")] = DEFAULTS.port,
    metrics_port: Annotated[
        int | None, typer.Option(help="Answer Prometheus on this port, too; 0 picks a free one.")
    ] = DEFAULTS.metrics_port,
    metrics_host: Annotated[str, typer.Option(help="The address for metrics.")] = DEFAULTS.metrics_host,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once requests are taken.")] = None,
    quantize: Annotated[
        str, typer.Option(help="none, nf4, int8, int4, int8-bnb, or auto by device.")
    ] = DEFAULTS.quantize,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = DEFAULTS.dtype,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = DEFAULTS.device,
    compile_: Annotated[
        str,
        typer.Option(
            "--compile",
            help="Kernels for the CPU: auto, on (an error without a compiler), or off (slow, int8 and int4 most).",
        ),
    ] = DEFAULTS.compile,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the base.")] = DEFAULTS.threads,
    max_length: Annotated[int | None, typer.Option(help="Lower the base's context, in tokens.")] = DEFAULTS.max_length,
    max_batch: Annotated[int, typer.Option(help="Rows that run at once.")] = DEFAULTS.max_rows,
    max_queue: Annotated[int, typer.Option(help="Rows that may wait; one more is refused.")] = DEFAULTS.max_queue,
    step_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = DEFAULTS.step_tokens,
    kv_bytes: Annotated[int, typer.Option(help="Bytes for the key/value cache.")] = DEFAULTS.kv_bytes,
    prefix_cache: Annotated[
        bool, typer.Option(help="Let prompts with equal beginnings share keys and values.")
    ] = DEFAULTS.prefix_cache,
    host_bytes: Annotated[int, typer.Option(help="Bytes for adapters in host memory.")] = DEFAULTS.host_bytes,
    device_bytes: Annotated[int, typer.Option(help="Bytes for adapters on the device.")] = DEFAULTS.device_bytes,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Load only versions that a trusted key signed.")
    ] = DEFAULTS.require_signature,
    trusted_key: Annotated[
        list[str] | None, typer.Option("--trusted-key", metavar="FILE", help="A public key to trust; may be repeated.")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(help="How long calls may finish at a stop.")] = DEFAULTS.drain_seconds,
    log_level: Annotated[str, typer.Option(help=", ".join(LOG_LEVELS))] = "warning",
    json_ready: Annotated[bool, typer.Option("--json-ready", help="Say what is held as one JSON line.")] = False,
) -> None:
    """Load the base and serve until SIGTERM or Ctrl-C; calls under way finish first."""
    _configure_logging(log_level)
    config = read_config(
        base=base,
        registry=registry,
        host=host,
        port=port,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        quantize=quantize,
        dtype=dtype,
        device=device,
        compile=compile_,
        threads=threads,
        max_length=max_length,
        max_rows=max_batch,
        max_queue=max_queue,
        step_tokens=step_tokens,
        kv_bytes=kv_bytes,
        prefix_cache=prefix_cache,
        host_bytes=host_bytes,
        device_bytes=device_bytes,
        require_signature=require_signature,
        trusted_keys=tuple(trusted_key or ()),
        drain_seconds=drain_seconds,
    )

    if port_file is not None and (port_file.is_dir() or not port_file.parent.is_dir()):
        raise InvalidArgument(f"The port file {port_file} cannot be written: there is no folder for it, or it is one.")

    def ready(serving: Serving) -> None:
        seconds = time.monotonic() - _BEGAN
        for line in [json.dumps(holdings(serving, seconds))] if json_ready else describe(serving, seconds):
            typer.echo(line)
        if port_file is not None:
            write_whole(port_file, f"{serving.port}\n")

    try:
        _serve(config, ready)
    except AdapterbayError as error:
        typer.echo(f"error: {' '.join(error.message.split())}", err=True)
        # A server that cannot start is a matter of its settings or its machine: not of a request.
        raise typer.Exit(2) from None


@app.command("methods")
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As the table of docs/methods.md.")] = False,
) -> None:
    """Every PEFT method: what it becomes, how a mixed batch runs it, whether it can be fused, and what is refused."""
    from adapterbay.server.convert.methods import COLUMNS, METHODS, cells, markdown

    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in METHODS.values()], ensure_ascii=False, indent=2))
    elif as_markdown:
        typer.echo(markdown(), nl=False)
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS, box=None, pad_edge=False)
        for row in METHODS.values():
            table.add_row(*cells(row))
        Console().print(table)


def read_config(**settings: Any) -> ServerConfig:
    """The settings as one object. Raises InvalidArgument that tells everything that is wrong at once."""
    try:
        return ServerConfig(**settings)
    except ValidationError as error:
        raise InvalidArgument(
            f"The server's settings are wrong: {'; '.join(_problem(item) for item in error.errors())}."
        ) from None


def _problem(item: Mapping[str, Any]) -> str:
    """A setting and what is wrong with it; what is wrong with several together has no place of its own."""
    place = ".".join(map(str, item["loc"]))
    message = str(item["msg"]).removeprefix("Value error, ")
    option = OPTIONS.get(place, f"--{place.replace('_', '-')}")
    return f"{option} {item['input']}: {message}" if place else message


def holdings(serving: Serving, seconds: float) -> dict[str, Any]:
    """What the server holds, and after how many seconds, for machines."""
    base = serving.engine.base
    registry = serving.engine.adapters.registry
    return {
        "host": serving.host,
        "port": serving.port,
        "metrics_port": serving.metrics_port,
        "base": base.reference,
        "fingerprint": base.fingerprint,
        "kind": base.kind,
        "parameters": base.parameters,
        "bytes": base.bytes,
        "dtype": base.dtype,
        "quantization": base.quantization,
        "device": base.device,
        "max_length": base.max_length,
        "kernels": serving.engine.kernels,
        "registry": str(registry.root),
        "adapters": registry.count(),
        "start_seconds": round(seconds, 3),
    }


def describe(serving: Serving, seconds: float) -> list[str]:
    """What the server holds, and after how many seconds, for people."""
    base = serving.engine.base
    config = serving.engine.config
    metrics = f", metrics {config.metrics_host}:{serving.metrics_port}" if serving.metrics_port is not None else ""
    registry = serving.engine.adapters.registry
    count = registry.count()
    return [
        f"base         {base.reference} ({base.kind}, context {base.max_length})",
        f"fingerprint  {base.fingerprint}",
        f"holds        {base.parameters:,} parameters in {base.bytes / 2**20:,.1f} MiB, "
        f"{base.dtype}, quantization {base.quantization}, on {base.device}",
        f"kernels      {serving.engine.kernels}",
        f"registry     {registry.root}, {count or 'no'} adapter{'s' if count != 1 else ''}"
        + ("" if count else ": push one, or check --registry"),
        f"serving      {serving.host}:{serving.port}{metrics}, ready after {seconds:.1f} s",
    ]


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees all of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _serve(config: ServerConfig, ready: Any) -> None:
    import asyncio

    from adapterbay.server.app import left_behind, serve  # brings torch

    asyncio.run(serve(config, ready=ready))
    if left_behind():  # the interpreter's own end would abort inside that thread
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _configure_logging(level: str) -> None:
    if level not in LOG_LEVELS:
        raise InvalidArgument(f"The log level {level!r} is not one of {', '.join(LOG_LEVELS)}.", field="log_level")
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "debug":
        from adapterbay.base.quiet import quiet_libraries

        quiet_libraries()
