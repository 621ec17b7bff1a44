"""How the command ends: one line for an error, and an exit code. What all groups share is in `registry.console`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import grpc
import typer

from adapterbay.client import (
    ClientError,
    DeadlineExceededError,
    InvalidArgumentError,
    RequestError,
    UnavailableError,
)
from adapterbay.registry.console import USAGE_EXIT_CODE, fail, guarded

FAILED_EXIT_CODE = 1
LOST = ("Socket closed", "Connection reset", "GOAWAY", "Stream removed")
"""What gRPC says of a connection that was there."""


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
        which = f" ({error.field})" if "[" in error.field and error.field not in str(error) else ""
        fail(f"{error}{which}", USAGE_EXIT_CODE)
    except RequestError as error:
        fail(str(error), USAGE_EXIT_CODE)
    except ClientError as error:
        fail(str(error), FAILED_EXIT_CODE)


@contextlib.contextmanager
def asking(server: str) -> Iterator[None]:
    """Around calls to a server: says where nobody answered, and which option gives it more time."""
    try:
        yield
    except DeadlineExceededError as error:
        raise DeadlineExceededError(error.code, error.reason, f"{error} See --timeout.", error.metadata) from error
    except UnavailableError as error:
        if error.reason:  # an adapterbay server did answer, and says why
            raise
        if any(words in error.message for words in LOST):
            message = f"The server at {server} went away before its answer was whole."
        else:
            message = (
                f"No server answers at {server}; start one with `adapterbay server start`, or say --server HOST:PORT."
            )
        raise UnavailableError(grpc.StatusCode.UNAVAILABLE, "", message, {}) from error
