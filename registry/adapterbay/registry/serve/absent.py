"""What the Hub has and a registry of adapters has not: each says so, with 501, instead of a puzzling 404."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from adapterbay.registry.serve.problems import Refusal, not_implemented
from adapterbay.registry.serve.server import of

XET_ADVICE: Final = (
    "Set HF_HUB_DISABLE_XET=1: then files over the size that travels inside a commit go by Git LFS, which this server "
    "has."
)
_KINDS: Final = {
    "datasets": "datasets are",
    "spaces": "Spaces are",
    "kernels": "kernels are",
    "buckets": "buckets are",
    "collections": "collections are",
    "papers": "papers are",
    "daily_papers": "papers are",
    "jobs": "jobs are",
    "scheduled-jobs": "jobs are",
    "discussions": "discussions are",
    "settings": "settings of users are",
    "users": "pages of users are",
    "organizations": "pages of organizations are",
    "repos": "moving and renaming repositories is",
    "models-tags-by-type": "the catalogue of tags is",
}
_PARTS: Final = {
    "discussions": "discussions and pull requests are",
    "settings": "settings of a repository are",
    "super-squash": "squashing the history is",
    "lfs-files": "managing LFS files is",
    "user-access-request": "access requests are",
    "likers": "likes are",
    "like": "likes are",
    "duplicate": "duplicating a repository is",
    "compare": "comparing revisions is",
    "safetensors-metadata": "metadata of safetensors files is",
    "treesize": "the size of a tree is",
    "scan": "a security scan is",
}


_PAGES: Final = frozenset({"raw", "blob", "tree", "edit", "upload", *_PARTS})
"""What follows the name of a repository in the addresses of the Hub's web pages."""


async def xet(request: Request) -> Response:
    """Xet storage: the clients ask for a token before they upload a large file."""
    of(request).gate.reader(request)
    raise not_implemented("Xet storage is", XET_ADVICE)


async def git(request: Request) -> Response:
    """Git's own protocol."""
    of(request).gate.reader(request)
    raise not_implemented("git over HTTP is", "Use `hf download` and `hf upload`, or huggingface_hub.")


async def anything(request: Request) -> Response:
    """The addresses that nothing else answers."""
    of(request).gate.reader(request)
    parts = [part for part in request.url.path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 1:
        if parts[1] == "models" and len(parts) > 3:
            what = next((words for part, words in _PARTS.items() if part in parts[3:5]), None)
        else:
            what = _KINDS.get(parts[1])
    elif parts and parts[0] in _KINDS:
        what = _KINDS[parts[0]]
    else:
        page = next((part for part in parts[1:3] if part in _PAGES), None)
        what = _PARTS.get(page, f"the web page {page!r} of a repository is") if page else None
    if what is not None:
        raise not_implemented(what)
    raise Refusal(404, f"There is nothing at {request.method} {request.url.path[:200]}.", reason="NO_SUCH_ADDRESS")
