"""Errors as the Hub's clients read them: a status, `X-Error-Code`, `X-Error-Message`, and {"error": …} with the reason.

The clients make their exceptions of the code (RepoNotFound, RevisionNotFound, EntryNotFound), retry 429, 500, 502, 503
and 504, and show both messages. Nothing that a user did wrong is answered with one of those.
"""

from __future__ import annotations

from typing import Final

from starlette.responses import JSONResponse, Response

from adapterbay.registry.errors import (
    AdapterbayError,
    BaseMismatch,
    BaseNotFound,
    Conflict,
    Corrupted,
    InvalidArgument,
    NoEffect,
    NotFound,
    PromotionRefused,
    Rejected,
    StaleAlias,
    StorageFull,
    TaskMismatch,
    Unavailable,
    UnsupportedMethod,
    Untrusted,
)

CODE_HEADER: Final = "X-Error-Code"
MESSAGE_HEADER: Final = "X-Error-Message"
COMMIT_HEADER: Final = "X-Repo-Commit"
MAX_HEADER: Final = 1000

_STATUS: Final[tuple[tuple[type[AdapterbayError], int], ...]] = (
    (BaseNotFound, 422),
    (NotFound, 404),
    (InvalidArgument, 400),
    (Rejected, 422),
    (BaseMismatch, 422),
    (UnsupportedMethod, 422),
    (NoEffect, 422),
    (TaskMismatch, 422),
    (Untrusted, 422),
    (StaleAlias, 409),
    (Conflict, 409),
    (PromotionRefused, 403),
    (StorageFull, 507),
    (Unavailable, 503),
    (Corrupted, 500),
)


class Refusal(AdapterbayError):
    """An answer of this protocol that no other error stands for. `code` is what the clients' exceptions are made of."""

    default_reason = "REFUSED"

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        reason: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason or code)
        self.status = status
        self.code = code
        self.headers = headers or {}


def repository_not_found(message: str) -> Refusal:
    """No such adapter, or none that this caller may see."""
    return Refusal(404, message, code="RepoNotFound")


def revision_not_found(message: str) -> Refusal:
    """The adapter is there; the revision is not."""
    return Refusal(404, message, code="RevisionNotFound")


def entry_not_found(message: str, sha: str) -> Refusal:
    """The commit `sha` is there; the file is not. The clients remember this for the commit."""
    return Refusal(404, message, code="EntryNotFound", headers={COMMIT_HEADER: sha})


def not_implemented(what: str, instead: str = "") -> Refusal:
    """A part of the Hub that a registry of adapters does not have. 501 is not retried."""
    return Refusal(
        501,
        f"This is a registry of adapters, not the whole Hub: {what} not implemented.{f' {instead}' if instead else ''}",
        code="NotImplemented",
    )


def answer(error: AdapterbayError) -> Response:
    """The response for an error."""
    status, code, headers = 500, None, {}
    if isinstance(error, Refusal):
        status, code, headers = error.status, error.code, dict(error.headers)
    else:
        status = next((number for kind, number in _STATUS if isinstance(error, kind)), 500)
    if code:
        headers[CODE_HEADER] = code
    headers[MESSAGE_HEADER] = header_text(error.message)
    return JSONResponse({"error": error.message, "reason": error.reason}, status, headers)


def header_text(text: str) -> str:
    """Text as it can stand in a header: one line of printable ASCII."""
    line = " ".join(text.split()).encode("ascii", "replace").decode()
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= MAX_HEADER else f"{line[: MAX_HEADER - 3]}..."
