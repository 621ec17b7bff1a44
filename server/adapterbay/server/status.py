"""The one place that turns the error tree into gRPC: a code, and google.rpc details for machines.

Every status carries google.rpc.ErrorInfo (domain "adapterbay", the error's reason and metadata). InvalidArgument adds
google.rpc.BadRequest with the field, QueueFull adds google.rpc.RetryInfo. What is not of the tree is a bug of ours, as
EngineFault is: INTERNAL, with an id under which the log has the traceback. A user's mistake is never INTERNAL.
"""

from __future__ import annotations

import logging
import uuid

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from adapterbay.registry.errors import (
    AdapterbayError,
    BaseMismatch,
    Cancelled,
    Conflict,
    Corrupted,
    DeadlineExceeded,
    EngineFault,
    InvalidArgument,
    MissingExtra,
    NoEffect,
    NotFound,
    PromotionRefused,
    QueueFull,
    Rejected,
    StaleAlias,
    StorageFull,
    TaskMismatch,
    Unavailable,
    UnsupportedMethod,
    Untrusted,
)

DOMAIN = "adapterbay"
DETAILS_KEY = "grpc-status-details-bin"

# Metadata of a call is limited to 8 KiB by default; the message travels twice, once percent-encoded and once in the
# details as base64, so both it and the facts are cut well below that.
MESSAGE_BYTES = 1_000
VALUE_BYTES = 300
METADATA_ENTRIES = 16

_logger = logging.getLogger(__name__)

CODES: dict[type[AdapterbayError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Rejected: grpc.StatusCode.FAILED_PRECONDITION,
    BaseMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    UnsupportedMethod: grpc.StatusCode.FAILED_PRECONDITION,
    NoEffect: grpc.StatusCode.FAILED_PRECONDITION,
    TaskMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    # Not DATA_LOSS: the call itself lost nothing, and the contract promises FAILED_PRECONDITION for altered files.
    Corrupted: grpc.StatusCode.FAILED_PRECONDITION,
    Untrusted: grpc.StatusCode.FAILED_PRECONDITION,
    StaleAlias: grpc.StatusCode.ABORTED,
    Conflict: grpc.StatusCode.ABORTED,
    PromotionRefused: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    StorageFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    MissingExtra: grpc.StatusCode.UNIMPLEMENTED,
    EngineFault: grpc.StatusCode.INTERNAL,
}
"""The code of each branch of the tree; a subclass has its nearest ancestor's."""


def code_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC code of an error; INTERNAL for what the tree does not know."""
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    return grpc.StatusCode.INTERNAL


def status_of(error: BaseException) -> status_pb2.Status:
    """An error as google.rpc.Status. Logs the traceback of an unexpected one."""
    if not isinstance(error, AdapterbayError) or not isinstance(error, tuple(CODES)):
        return _internal(error)
    code = code_of(error)
    message = _cut(error.message, MESSAGE_BYTES)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: _cut(value, VALUE_BYTES) for key, value in list(error.metadata.items())[:METADATA_ENTRIES]},
    )
    details = [_packed(info)]
    if isinstance(error, InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=_cut(error.message, VALUE_BYTES)
        )
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, QueueFull):
        nanoseconds = max(0, round(error.retry_after_seconds * 1e9))
        delay = Duration(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=code.value[0], message=message, details=details)


def _internal(error: BaseException) -> status_pb2.Status:
    incident = uuid.uuid4().hex
    _logger.error("unexpected error, incident %s", incident, exc_info=error)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"incident": incident})
    return status_pb2.Status(
        code=grpc.StatusCode.INTERNAL.value[0],
        message=f"This is a bug of the server ({type(error).__name__}); its log tells more under incident {incident}.",
        details=[_packed(info)],
    )


def _packed(message: object) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)  # type: ignore[arg-type]  # google.rpc ships no types
    return packed


def _cut(text: str, limit: int) -> str:
    """At most `limit` UTF-8 bytes of text, cut between characters."""
    encoded = text.encode("utf-8", errors="replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 3].decode(errors="ignore") + "…"
