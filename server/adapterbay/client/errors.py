"""What can go wrong, typed.

ClientError
├── ClientClosedError            the client was closed
├── RequestError                 what was given makes no request, so nothing was sent; a ValueError, too
└── ServerError                  the call failed; `code`, `reason`, `message`, `metadata`, `retry_after_seconds`
    ├── InvalidArgumentError     `field` names what is wrong in the request
    ├── NotFoundError            `near` holds names that may have been meant
    ├── FailedPreconditionError  another base, altered files, a task that the adapter cannot do
    ├── AbortedError             an alias moved meanwhile
    ├── ResourceExhaustedError   the queue is full; `retry_after_seconds` says when to try again
    ├── DeadlineExceededError
    ├── CallCancelledError
    ├── UnavailableError         nobody listens, or the server starts or stops; calls are retried before this
    └── InternalError            a bug of the server; the message has an id that its log knows
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """The root of the client's errors."""


class ClientClosedError(ClientError):
    """The client was closed, so it makes no calls any more."""

    def __init__(self) -> None:
        super().__init__("This client is closed.")


class RequestError(ClientError, ValueError):
    """What was given cannot be sent; the message names the argument."""


class ServerError(ClientError):
    """A call failed. `reason` is a stable UPPER_SNAKE word, empty if no adapterbay server gave one."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        metadata: dict[str, str],
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.code, self.reason, self.message, self.metadata, self.retry_after_seconds)


class InvalidArgumentError(ServerError):
    """The request is wrong."""

    @property
    def field(self) -> str:
        """The path of the wrong field, for instance `sampling.top_p`."""
        return self.metadata.get("field", "")


class NotFoundError(ServerError):
    """No such adapter, version or alias."""

    @property
    def near(self) -> tuple[str, ...]:
        """Names that may have been meant, the likeliest first."""
        return tuple(filter(None, self.metadata.get("near", "").split(", ")))


class FailedPreconditionError(ServerError):
    """The adapter belongs to another base, was altered, or cannot do the task."""


class AbortedError(ServerError):
    """An alias moved since it was read."""


class ResourceExhaustedError(ServerError):
    """The server's queue is full."""


class DeadlineExceededError(ServerError):
    """The timeout passed."""


class CallCancelledError(ServerError):
    """The call was cancelled."""


class UnavailableError(ServerError):
    """Nobody listens at the address, or the server is starting or stopping."""


class InternalError(ServerError):
    """A bug of the server."""


_CLASSES: dict[grpc.StatusCode, type[ServerError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.INTERNAL: InternalError,
}


def from_status(
    code: grpc.StatusCode, message: str | None, trailing: Iterable[tuple[str, str | bytes]] | None
) -> ServerError:
    """The typed error of a failed call, with its google.rpc details if it has any."""
    reason, metadata, retry_after = "", dict[str, str](), None
    for key, value in trailing or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            reason, metadata, retry_after = _read_details(value)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not reason:  # ended here, in gRPC's own words
        message = "The call's deadline passed."
    kind = _CLASSES.get(code, ServerError)
    return kind(code, reason, message or code.name, metadata, retry_after)


def _read_details(value: bytes) -> tuple[str, dict[str, str], float | None]:
    reason, metadata, retry_after = "", dict[str, str](), None
    try:
        details = status_pb2.Status.FromString(value).details
    except DecodeError:
        return "", {}, None
    for packed in details:
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if packed.Unpack(info):
            reason, metadata = info.reason, {**metadata, **info.metadata}
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif packed.Unpack(bad) and bad.field_violations:
            metadata.setdefault("field", bad.field_violations[0].field)
    return reason, metadata, retry_after
