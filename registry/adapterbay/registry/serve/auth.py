"""Who asks, and what they may do. A token's name is the actor that the registry records."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from adapterbay.registry.serve.problems import Refusal
from adapterbay.registry.serve.settings import Anonymous
from adapterbay.registry.serve.tokens import Scope, Token, TokenFile

ANONYMOUS: Final = "anonymous"
TICKET_SECONDS: Final = 24 * 3600
_HOW: Final = (
    "The operator makes one with `registry token create NAME --scope read|write`; give it as HF_TOKEN, or by "
    "`hf auth login`."
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `scope` None: nobody yet known, who may see nothing."""

    name: str
    scope: Scope | None
    only: str | None = None
    token: Token | None = None

    def sees(self, name: str) -> bool:
        """Whether the adapter may be read."""
        if self.scope is None or self.only is None:
            return self.scope is not None
        return name == self.only or name.startswith(f"{self.only.removesuffix('/')}/")


class Gatekeeper:
    """Decides by the tokens and by what the operator lets anonymous callers do."""

    def __init__(self, tokens: TokenFile, anonymous: Anonymous) -> None:
        self._tokens = tokens
        self._anonymous = anonymous

    def caller(self, request: Request) -> Caller:
        """Who sent the request. Raises Refusal 401 for a token that is not known, even where none is needed."""
        header = request.headers.get("authorization")
        if header is None:
            return Caller(ANONYMOUS, None if self._anonymous == "none" else self._anonymous)
        scheme, _, presented = header.partition(" ")
        token = self._tokens.find(presented.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            raise _unauthorized(f"The token is not known to this registry, or was revoked. {_HOW}", "INVALID_TOKEN")
        request.scope["adapterbay.caller"] = token.name
        return Caller(token.name, token.scope, token.only, token)

    def reader(self, request: Request, name: str | None = None) -> Caller:
        """The caller, who may read (the adapter `name`, if one is given). Raises Refusal 401 or 404."""
        caller = self.caller(request)
        if caller.scope is None:
            raise _unauthorized(f"This registry asks for a token. {_HOW}", "TOKEN_REQUIRED")
        if name is not None and not caller.sees(name):
            raise Refusal(403, f"The token {caller.name} is good for {caller.only} only.")
        return caller

    def writer(self, request: Request, name: str | None = None) -> Caller:
        """The caller, who may write. Raises Refusal 401 or 403."""
        caller = self.reader(request, name)
        if caller.scope != "write":
            who = "Anonymous callers" if caller.token is None else f"The token {caller.name}"
            raise Refusal(403, f"{who} may only read here: a write needs a token with scope write. {_HOW}")
        return caller

    # Tickets: the clients upload large files without their token, to the address that they were given

    def ticket(self, caller: Caller, subject: str) -> str:
        """What the caller shows for `subject` alone, without its token, within a day. Survives a restart."""
        if caller.token is None:
            return ANONYMOUS
        expires = str(int(time.time()) + TICKET_SECONDS)
        return f"{caller.token.name}:{expires}:{_sign(caller.token, subject, expires)}"

    def holder(self, ticket: str, subject: str) -> Caller:
        """Who was given the ticket. Raises Refusal 403; a revoked token's tickets end with it."""
        if ticket == ANONYMOUS and self._anonymous == "write":
            return Caller(ANONYMOUS, "write")
        name, _, rest = ticket.partition(":")
        expires, _, signature = rest.partition(":")
        token = self._tokens.named(name)
        if (
            token is None
            or not hmac.compare_digest(_sign(token, subject, expires).encode(), signature.encode())
            or not expires.isdigit()
            or int(expires) < time.time()
        ):
            raise Refusal(403, "The address of this upload is not valid any more: start the upload again.")
        return Caller(token.name, token.scope, token.only, token)


def _sign(token: Token, subject: str, expires: str) -> str:
    return hmac.new(token.sha256.encode(), f"{subject}\n{expires}".encode(), hashlib.sha256).hexdigest()


def _unauthorized(message: str, reason: str) -> Refusal:
    return Refusal(401, message, reason=reason, headers={"WWW-Authenticate": 'Bearer realm="adapterbay"'})
