"""The one error vocabulary of adapterbay.

    AdapterbayError
    ├── InvalidArgument        the request or the settings are wrong; `field` names where
    │   └── InvalidReference   a name, reference or base reference that does not follow the grammar
    ├── NotFound               no such adapter, version, alias or file; `near` holds likely meanings
    │   ├── BaseNotFound       no such base model, or not in a form that can be read
    │   └── RegistryNotFound   no registry where one was looked for
    ├── Rejected               admission refused an adapter's files; `reason` is a stable word
    ├── BaseMismatch           the adapter belongs to another base; both fingerprints are given
    ├── UnsupportedMethod      a PEFT method, or a setting of one, that is not served
    ├── NoEffect               the adapter would change nothing: never silently the base
    ├── TaskMismatch           the adapter cannot do what was asked (no head, labels that differ)
    ├── Corrupted              stored bytes do not have their digest any more
    ├── Untrusted              not signed, not by a key that is trusted, or the signature is not good
    ├── StaleAlias             an alias moved since it was read (compare-and-swap failed)
    ├── Conflict               somebody else was faster, or the place holds something else; read again and decide
    ├── PromotionRefused       the guard of an alias is not met; `unmet` says by what
    ├── QueueFull              no room; `retry_after_seconds` says when to try again
    ├── DeadlineExceeded       the caller's deadline passed
    ├── Cancelled              the caller went away, or the server is stopping
    ├── Unavailable            the server does not take requests now (starting or draining)
    ├── StorageFull            no space left; nothing was kept of what was being written
    ├── MissingExtra           an optional part is not installed; the message says what to install
    └── EngineFault            our own mistake: a step failed for a reason no request caused

Every error says what is wrong and what to do, in one sentence or two. The server maps this tree to gRPC in one
place (`adapterbay.server.status`); the command line prints the message as one line and exits with `exit_code`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final, Self

MAX_MESSAGE: Final = 4000
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, most: int = MAX_MESSAGE) -> str:
    """Text of strangers for people: controls of terminals and turns of direction are escaped, the end is cut."""
    if len(text) > most:
        text = f"{text[:most]}…"
    return _UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


class AdapterbayError(Exception):
    """The root. `reason` is a stable UPPER_SNAKE word for machines; `metadata` holds the facts as strings."""

    default_reason: ClassVar[str] = "ERROR"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        message = shown(message)
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = {key: shown(value, 2000) for key, value in (metadata or {}).items()}

    def told(self, message: str) -> Self:
        """A copy with another message: one error may be told to many, to each in the words of its question."""
        message = shown(message)
        copied = type(self).__new__(type(self), message)
        copied.__dict__.update(self.__dict__, message=message)
        return copied


class InvalidArgument(AdapterbayError):
    """The request or the settings are wrong. `field` is the dotted path of the offending field."""

    default_reason = "INVALID_ARGUMENT"
    exit_code = 2

    def __init__(self, message: str, *, field: str = "", reason: str | None = None) -> None:
        super().__init__(message, reason=reason, metadata={"field": field} if field else None)
        self.field = field


class InvalidReference(InvalidArgument):
    """A name or reference that does not follow the grammar."""

    default_reason = "INVALID_REFERENCE"


class NotFound(AdapterbayError):
    """No such thing. `near` are names that may have been meant, the likeliest first."""

    default_reason = "NOT_FOUND"

    def __init__(self, message: str, *, near: Sequence[str] = (), reason: str | None = None) -> None:
        if near:
            message = f"{message} Did you mean {', '.join(near)}?"
        super().__init__(message, reason=reason, metadata={"near": ", ".join(near)} if near else None)
        self.near = tuple(near)


class BaseNotFound(NotFound):
    """No such base model, or not in a form that can be read."""

    default_reason = "BASE_NOT_FOUND"
    exit_code = 2


class RegistryNotFound(NotFound):
    """No registry where one was looked for."""

    default_reason = "REGISTRY_NOT_FOUND"
    exit_code = 2


class Rejected(AdapterbayError):
    """Admission refused the files. `reason` is one of the words listed in `adapterbay.registry.admission`."""

    default_reason = "REJECTED"


class BaseMismatch(AdapterbayError):
    """The adapter was made for another base than the one at hand."""

    default_reason = "BASE_MISMATCH"

    def __init__(self, message: str, *, expected: str, actual: str) -> None:
        super().__init__(message, metadata={"base_fingerprint": expected, "adapter_base_fingerprint": actual})
        self.expected = expected
        self.actual = actual


class UnsupportedMethod(AdapterbayError):
    """A PEFT method, or a setting of one, that is not served."""

    default_reason = "UNSUPPORTED_METHOD"


class NoEffect(AdapterbayError):
    """The adapter would change nothing: its tensors match nothing, or its delta is zero and it has no head."""

    default_reason = "NO_EFFECT"


class TaskMismatch(AdapterbayError):
    """The adapter cannot do what was asked."""

    default_reason = "TASK_MISMATCH"


class Corrupted(AdapterbayError):
    """Stored bytes do not have their digest any more."""

    default_reason = "CORRUPTED"


class Untrusted(AdapterbayError):
    """A version is not vouched for. `reason` is NOT_SIGNED, UNKNOWN_KEY or BAD_SIGNATURE."""

    default_reason = "BAD_SIGNATURE"


class StaleAlias(AdapterbayError):
    """An alias moved since it was read."""

    default_reason = "STALE_ALIAS"


class Conflict(AdapterbayError):
    """The place holds something else than the caller thinks: a version number, or the head of a history."""

    default_reason = "CONFLICT"


class PromotionRefused(AdapterbayError):
    """A guarded alias may not point at this version. `unmet` are the demands that are not met, in words."""

    default_reason = "PROMOTION_REFUSED"

    def __init__(self, message: str, *, unmet: Sequence[str]) -> None:
        super().__init__(message, metadata={"unmet": "; ".join(unmet)})
        self.unmet = tuple(unmet)


class QueueFull(AdapterbayError):
    """No room. Nothing was started."""

    default_reason = "QUEUE_FULL"

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message, metadata={"retry_after_seconds": f"{retry_after_seconds:.3f}"})
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(AdapterbayError):
    """The caller's deadline passed."""

    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(AdapterbayError):
    """The caller went away, or the server is stopping."""

    default_reason = "CANCELLED"


class Unavailable(AdapterbayError):
    """The server does not take requests now."""

    default_reason = "UNAVAILABLE"


class StorageFull(AdapterbayError):
    """No space left on the device. What was being written was removed."""

    default_reason = "STORAGE_FULL"
    exit_code = 2


class MissingExtra(AdapterbayError):
    """An optional part of adapterbay is not installed."""

    default_reason = "MISSING_EXTRA"
    exit_code = 2


class EngineFault(AdapterbayError):
    """A step failed for a reason that no request caused. The log has the traceback; the engine goes on."""

    default_reason = "ENGINE_FAULT"
