"""What the handlers of requests share: the store, who may do what, the sizes, and addresses."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote, urlencode

from anyio import CapacityLimiter
from starlette.requests import Request

from adapterbay.registry.local.store import Registry
from adapterbay.registry.serve.auth import Gatekeeper
from adapterbay.registry.serve.bases import Bases
from adapterbay.registry.serve.incoming import Committer
from adapterbay.registry.serve.problems import header_text
from adapterbay.registry.serve.recent import Recent
from adapterbay.registry.serve.repository import Repositories
from adapterbay.registry.serve.settings import ServeSettings
from adapterbay.registry.serve.tokens import TokenFile

WARNING_HEADER: Final = "X-HF-Warning"
CONCURRENT_COMMITS: Final = 8
"""Admissions at one time; those that wait leave the threads of readers alone."""


class Server:
    """One running server. Handlers reach it as `request.app.state.server`."""

    def __init__(self, settings: ServeSettings) -> None:
        """Opens the registry and locates the bases. Raises as `Registry.open` and `locate` do."""
        self.settings = settings
        self.repositories = Repositories(Registry.open(settings.registry, limits=settings.limits))
        self.repositories.log.sweep()
        self.bases = Bases(settings.bases)
        self.committer = Committer(self.repositories, self.bases)
        self.commits = CapacityLimiter(CONCURRENT_COMMITS)
        self.tokens = TokenFile(settings.tokens_path)
        self.gate = Gatekeeper(self.tokens, settings.anonymous)
        self.uploads: Recent[tuple[str, str], bool] = Recent(10_000)  # (adapter, digest) that came by LFS
        self.git_ids: Recent[str, str] = Recent(10_000)  # digest → git id of the plain file
        self.checked: Recent[str, tuple[int, int, int]] = Recent(100_000)  # digest → the file that was read whole

    @property
    def private(self) -> bool:
        """Whether reading needs a token."""
        return self.settings.anonymous == "none"

    def close(self) -> None:
        """Gives everything back."""
        self.repositories.close()


def of(request: Request) -> Server:
    """The server that a request came to."""
    server: Server = request.app.state.server
    return server


def parameter(request: Request, name: str) -> str:
    """A part of the address, unquoted once."""
    return unquote(request.path_params[name])


def flag(request: Request, name: str) -> bool:
    """A query parameter that is yes or no."""
    return request.query_params.get(name, "").lower() in ("1", "true")


def address(request: Request, path: str = "") -> str:
    """An absolute address on this server."""
    settings = of(request).settings
    root = settings.public_url.rstrip("/") if settings.public_url else str(request.base_url).rstrip("/")
    return f"{root}/{path}" if path else root


def next_page(request: Request, **query: str) -> dict[str, str]:
    """The Link header to the next page, with the query of this one."""
    kept = [(key, value) for key, value in request.query_params.multi_items() if key not in query]
    path = request.scope["raw_path"].decode("ascii").lstrip("/")
    return {"Link": f'<{address(request, path)}?{urlencode([*kept, *query.items()])}>; rel="next"'}


def warning(topic: str, text: str) -> dict[str, str]:
    """A header whose text the clients log as a warning."""
    return {WARNING_HEADER: header_text(f"{topic}; {text}")}
