"""How the command ends: one line for an error, and an exit code. What all groups share is in `registry.console`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import typer

from adapterbay.client import ClientError, InvalidArgumentError, UnavailableError
from adapterbay.registry.console import USAGE_EXIT_CODE, fail, guarded

FAILED_EXIT_CODE = 1


@contextlib.contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Turns errors that are not bugs into one line on stderr and an exit code: 2 for a wrong request, else 1."""
    try:
        with guarded(), _client_errors():
            yield
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None


@contextlib.contextmanager
def _client_errors() -> Iterator[None]:
    try:
        yield
    except InvalidArgumentError as error:
        fail(str(error), USAGE_EXIT_CODE)
    except ClientError as error:
        fail(str(error), FAILED_EXIT_CODE)


@contextlib.contextmanager
def asking(server: str) -> Iterator[None]:
    """Around calls to a server: says where nobody answered."""
    try:
        yield
    except UnavailableError as error:
        if error.reason:  # an adapterbay server did answer, and says why
            raise
        raise UnavailableError(
            grpc.StatusCode.UNAVAILABLE,
            "",
            f"No server answers at {server}; start one with `adapterbay server start`, or say --server HOST:PORT.",
            {},
        ) from error
