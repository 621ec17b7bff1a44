"""What the Hub and the network answer, in the words of our error tree.

    401, 404, gated            NotFound      with what to do: the name, `hf auth login`, the licence
    403                        Unavailable   the account or its token may not do that
    400, 413, 422              Rejected      what the server refused, with its reason
    409, 412                   Conflict      somebody else was faster
    429, 5xx, no connection    Unavailable   after huggingface_hub's own retries
    offline mode, not cached   Unavailable
    no space left              StorageFull

What `registry serve` refuses keeps its kind: PromotionRefused, UnsupportedMethod, NoEffect, TaskMismatch, BaseNotFound.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import huggingface_hub.errors
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapterbay.registry.errors import (
    AdapterbayError,
    BaseNotFound,
    Conflict,
    InvalidReference,
    NoEffect,
    NotFound,
    PromotionRefused,
    Rejected,
    StorageFull,
    TaskMismatch,
    Unavailable,
    UnsupportedMethod,
)

LOGIN: Final = "log in with `hf auth login` or set HF_TOKEN"

_REASON = re.compile(r"[A-Z][A-Z_]{2,40}")
_NO_XET = re.compile(r"\b501\b.*/xet-write-token/", re.DOTALL)
_REFUSALS: Final[Mapping[str, Callable[[str], AdapterbayError]]] = {
    "PROMOTION_REFUSED": lambda said: PromotionRefused(said, unmet=()),
    "UNSUPPORTED_METHOD": UnsupportedMethod,
    "NO_EFFECT": NoEffect,
    "TASK_MISMATCH": TaskMismatch,
    "BASE_NOT_FOUND": BaseNotFound,
}
"""What `registry serve` refuses, by the reason in its answer."""
HTTPError: Final[type[Exception]] = huggingface_hub.errors.__dict__["HTTPError"]
"""That of the HTTP library which this huggingface_hub uses (httpx or httpx2)."""

_TRANSPORT: tuple[type[BaseException], ...] = (HTTPError, ConnectionError, TimeoutError)


@contextlib.contextmanager
def hub_errors(what: str, *, writing: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises into our errors. `what` says what was asked for, such as `acme/x at v3`."""
    try:
        yield
    except AdapterbayError:
        raise
    except (HFValidationError, HTTPError, OSError) as error:
        raise _translated(error, what, writing) from error


def _translated(error: Exception, what: str, writing: bool) -> AdapterbayError:
    if isinstance(error, LocalEntryNotFoundError):
        return _not_fetched(error, what, writing)
    if isinstance(error, OfflineModeIsEnabled):
        return Unavailable(f"{what} is not in the cache and HF_HUB_OFFLINE is set: connect once without it.")
    if isinstance(error, HFValidationError):
        return InvalidReference(f"{what} cannot be on the Hub: {_line(error)}.", field="adapter")
    if isinstance(error, HfHubHTTPError):
        return _answered(error, what, writing)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"No space left to fetch {what} into {constants.HF_HUB_CACHE}.")
    if isinstance(error, _TRANSPORT) and _NO_XET.search(str(error)):
        return Unavailable(
            f"This server has no Xet storage, by which huggingface_hub sends the large files of {what}: set "
            "HF_HUB_DISABLE_XET=1 and push again.",
            reason="NOT_IMPLEMENTED",
        )
    if isinstance(error, _TRANSPORT):
        return Unavailable(f"The Hub cannot be reached for {what}: {_line(error)}. Check the network and the endpoint.")
    return Unavailable(f"{what} could not be read or written: {_line(error)}.")


def _not_fetched(error: Exception, what: str, writing: bool) -> AdapterbayError:
    """A file that is neither cached nor fetched: huggingface_hub hides why in the cause."""
    cause = error.__cause__
    if isinstance(cause, HTTPError | OSError) and not isinstance(cause, LocalEntryNotFoundError):
        return _translated(cause, what, writing)
    if constants.HF_HUB_OFFLINE:
        return Unavailable(f"{what} is not in the cache and HF_HUB_OFFLINE is set: connect once without it.")
    return Unavailable(f"{what} is not in the cache and could not be fetched: {_line(error)}.")


def _answered(error: HfHubHTTPError, what: str, writing: bool) -> AdapterbayError:
    status = error.response.status_code
    said = _line(error.server_message or "")
    if isinstance(error, GatedRepoError):
        return NotFound(
            f"{what} is gated: accept its licence on the Hub with your account, then {LOGIN}.", reason="GATED"
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(
            f"There is no repository for {what} that this account may read: check the name; if it is private, {LOGIN}."
        )
    if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        return NotFound(f"The Hub has no such revision or file: {what}.")
    if status == 404:
        return NotFound(f"The Hub does not know {what}{_because(said)}.")
    if status == 401:
        return NotFound(f"The token was not accepted for {what}{_because(said)}: {LOGIN}.", reason="UNAUTHENTICATED")
    refusal = _REFUSALS.get(_reason(error.response))
    if refusal is not None:
        return refusal(said or f"The server refused {what}.")
    if status == 403:
        advice = f"use a token that may write there ({LOGIN})" if writing else f"{LOGIN} with an account that may"
        return Unavailable(f"{what} is forbidden for this account{_because(said)}: {advice}.", reason="FORBIDDEN")
    if status in (409, 412):
        return Conflict(f"Somebody else changed {what} at the same time{_because(said)}: try again.")
    if status in (400, 413, 422):
        return Rejected(f"The Hub refused {what}{_because(said)}.", reason=_reason(error.response) or None)
    if status == 501:
        return Unavailable(f"This server does not do that for {what}{_because(said)}.", reason="NOT_IMPLEMENTED")
    return Unavailable(f"The Hub failed for {what} (HTTP {status}{_because(said)}): try again later.")


def _reason(response: Any) -> str:
    """The reason in the answer of `registry serve`, which is one of ours; empty for any other server."""
    try:
        document = response.json()
    except ValueError:
        return ""
    reason = document.get("reason") if isinstance(document, dict) else None
    return reason if isinstance(reason, str) and _REASON.fullmatch(reason) else ""


def _because(said: str) -> str:
    return f": {said}" if said else ""


def _line(error: object) -> str:
    return " ".join(str(error).split())[:400].rstrip(".")
