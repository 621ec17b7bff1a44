"""How the command ends and prints: one line for an error, plain text for people, JSON for machines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import grpc
import typer

from adapterbay.client import ClientError, InvalidArgumentError, UnavailableError
from adapterbay.registry.errors import AdapterbayError

USAGE = 2
INTERRUPTED = 130


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Turns errors that are not bugs into one line on stderr and an exit code: 2 for a wrong request, else 1."""
    try:
        yield
    except AdapterbayError as error:
        _fail(error.message, error.exit_code)
    except (InvalidArgumentError, ValueError) as error:
        _fail(str(error), USAGE)
    except ClientError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has enough. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


@contextlib.contextmanager
def asking(server: str) -> Iterator[None]:
    """Around calls to a server: says where nobody answered."""
    try:
        yield
    except UnavailableError as error:
        if error.reason:
            raise
        raise UnavailableError(
            grpc.StatusCode.UNAVAILABLE,
            "",
            f"No server answers at {server}; start one with `adapterbay server start`, or say --server HOST:PORT.",
            {},
        ) from error


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise SystemExit(code)


def to_json(value: Any) -> str:
    """One line of JSON; dataclasses become objects, times ISO 8601."""

    def convert(part: Any) -> Any:
        if isinstance(part, datetime):
            return part.isoformat()
        raise TypeError(f"{type(part).__name__} has no JSON form")

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.dumps(value, ensure_ascii=False, default=convert)
