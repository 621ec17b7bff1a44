"""Every class of the error tree has a gRPC status of its own, with details; only bugs are INTERNAL."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from adapterbay.registry import errors
from adapterbay.registry.errors import AdapterbayError
from adapterbay.server.status import DOMAIN, code_of, status_of

EXPECTED = {
    "InvalidArgument": grpc.StatusCode.INVALID_ARGUMENT,
    "InvalidReference": grpc.StatusCode.INVALID_ARGUMENT,
    "NotFound": grpc.StatusCode.NOT_FOUND,
    "Rejected": grpc.StatusCode.FAILED_PRECONDITION,
    "BaseMismatch": grpc.StatusCode.FAILED_PRECONDITION,
    "UnsupportedMethod": grpc.StatusCode.FAILED_PRECONDITION,
    "NoEffect": grpc.StatusCode.FAILED_PRECONDITION,
    "TaskMismatch": grpc.StatusCode.FAILED_PRECONDITION,
    "Corrupted": grpc.StatusCode.FAILED_PRECONDITION,
    "Untrusted": grpc.StatusCode.FAILED_PRECONDITION,
    "StaleAlias": grpc.StatusCode.ABORTED,
    "Conflict": grpc.StatusCode.ABORTED,
    "PromotionRefused": grpc.StatusCode.FAILED_PRECONDITION,
    "QueueFull": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DeadlineExceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "Cancelled": grpc.StatusCode.CANCELLED,
    "Unavailable": grpc.StatusCode.UNAVAILABLE,
    "StorageFull": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "MissingExtra": grpc.StatusCode.UNIMPLEMENTED,
    "EngineFault": grpc.StatusCode.INTERNAL,
}


def subclasses(root: type[AdapterbayError]) -> Iterator[type[AdapterbayError]]:
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from subclasses(child)


def expected_code(kind: type[AdapterbayError]) -> grpc.StatusCode:
    """A direct child of the root must be listed above; what is below it has its code unless listed too."""
    return next(EXPECTED[ancestor.__name__] for ancestor in kind.__mro__ if ancestor.__name__ in EXPECTED)


def example(kind: type[AdapterbayError]) -> AdapterbayError:
    extra: dict[str, object] = {
        "BaseMismatch": {"expected": "sha256:aa", "actual": "sha256:bb"},
        "QueueFull": {"retry_after_seconds": 1.25},
        "NotFound": {"near": ["sentiment"]},
        "PromotionRefused": {"unmet": ["accuracy must be at least 0.8, and is 0.7"]},
        "InvalidArgument": {"field": "sampling.top_p"},
    }.get(kind.__name__, {})  # type: ignore[assignment]
    return kind("What went wrong.", **extra)  # type: ignore[arg-type]


def detail(status: status_pb2.Status, kind: type) -> object:
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


def test_only_our_own_faults_are_internal() -> None:
    assert [name for name, code in EXPECTED.items() if code is grpc.StatusCode.INTERNAL] == ["EngineFault"]


@pytest.mark.parametrize("kind", list(subclasses(AdapterbayError)), ids=lambda kind: kind.__name__)
def test_every_class_of_the_tree_has_its_code(kind: type[AdapterbayError]) -> None:
    error = example(kind)
    status = status_of(error)
    assert code_of(error) is expected_code(kind)
    assert status.code == expected_code(kind).value[0]
    assert status.message == error.message
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason, dict(info.metadata)) == (DOMAIN, error.reason, error.metadata)


def test_invalid_argument_names_its_field() -> None:
    bad = detail(status_of(errors.InvalidArgument("no", field="texts[3]")), error_details_pb2.BadRequest)
    assert [violation.field for violation in bad.field_violations] == ["texts[3]"]


def test_a_full_queue_says_when_to_try_again() -> None:
    retry = detail(status_of(errors.QueueFull("full", retry_after_seconds=1.25)), error_details_pb2.RetryInfo)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 250_000_000)


def test_base_mismatch_gives_both_fingerprints() -> None:
    error = errors.BaseMismatch("other base", expected="sha256:aa", actual="sha256:bb")
    info = detail(status_of(error), error_details_pb2.ErrorInfo)
    assert dict(info.metadata) == {"base_fingerprint": "sha256:aa", "adapter_base_fingerprint": "sha256:bb"}


def test_a_subclass_from_elsewhere_has_its_ancestors_code() -> None:
    class Local(errors.NotFound):
        pass

    assert code_of(Local("x")) is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("error", [ValueError("secret path /root"), AdapterbayError("bare root")])
def test_the_unexpected_is_internal_and_logged(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        status = status_of(error)
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in status.message
    info = detail(status, error_details_pb2.ErrorInfo)
    assert info.metadata["incident"] in caplog.text
    assert info.metadata["incident"] in status.message


def test_long_messages_fit_into_call_metadata() -> None:
    error = errors.NotFound("词" * 5_000, near=["x" * 9_000] * 50)
    status = status_of(error)
    assert len(status.message.encode()) <= 1_000
    assert status.message.endswith("…")
    assert len(status.SerializeToString()) < 4_000
