"""The requests that a registry on the Hub makes, by way of huggingface_hub: its tokens, its cache, its retries.

Every method raises our errors (see `failures`). It knows nothing of versions, aliases or manifests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from adapterbay.registry.admission import check_path
from adapterbay.registry.admission.documents import read_bytes
from adapterbay.registry.errors import NotFound, Rejected
from adapterbay.registry.hub.failures import hub_errors
from adapterbay.registry.hub.names import MAIN

FETCHED_SUFFIXES: Final = (".safetensors", ".json", ".jsonl", ".md", ".sig")
"""What is ever fetched of a repository: no pickles and no code."""
MAX_FILES: Final = 10_000
MAX_TREES: Final = 256
DOWNLOADS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Refs:
    """The commit that main points at (None: there is none yet), and those of the tags."""

    head: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit on main. `message` is what follows its title."""

    sha: str
    at: datetime
    author: str | None
    title: str
    message: str


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit: `sha256` if it is kept as a large file, else `git_oid` says what it is."""

    size: int
    git_oid: str
    sha256: str | None

    def is_same(self, local: Path, digest: str, size: int) -> bool:
        """Whether it is the local file with this digest and size."""
        if self.size != size:
            return False
        return self.sha256 == digest.removeprefix("sha256:") if self.sha256 else self.git_oid == _git_oid(local, size)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository as a listing shows it."""

    name: str
    head: str | None
    at: datetime | None
    files: frozenset[str]


class HubClient:
    """Requests to one endpoint with one token; None means huggingface_hub's own settings."""

    def __init__(self, endpoint: str | None, token: str | None, cache: Path | None) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.token = token
        self._cache = None if cache is None else str(cache)
        self._api = HfApi(endpoint=self.endpoint, token=token, library_name="adapterbay")
        self._trees: dict[tuple[str, str], dict[str, RemoteFile]] = {}

    @property
    def offline(self) -> bool:
        """Whether huggingface_hub was told to stay offline."""
        return bool(constants.HF_HUB_OFFLINE)

    # Reading

    def refs(self, name: str) -> Refs:
        """The main branch and the tags of a repository, now."""
        with hub_errors(name):
            found = self._api.list_repo_refs(name)
        heads = [branch.target_commit for branch in found.branches if branch.name == MAIN]
        return Refs(heads[0] if heads else None, {tag.name: tag.target_commit for tag in found.tags})

    def commits(self, name: str, revision: str = MAIN) -> list[Commit]:
        """The commits of a branch, or up to a commit; the newest first."""
        with hub_errors(f"{name} at {revision}"):
            found = self._api.list_repo_commits(name, revision=revision)
        return [
            Commit(each.commit_id, each.created_at, each.authors[0] if each.authors else None, each.title, each.message)
            for each in found
        ]

    def files(self, name: str, commit: str) -> dict[str, RemoteFile]:
        """All files of a commit by path. Remembered: a commit never changes."""
        known = self._trees.get((name, commit))
        if known is not None:
            return known
        found: dict[str, RemoteFile] = {}
        with hub_errors(f"{name} at {commit}"):
            for each in self._api.list_repo_tree(name, recursive=True, revision=commit):
                size = getattr(each, "size", None)
                if size is None:  # a folder
                    continue
                lfs = getattr(each, "lfs", None)
                found[each.path] = RemoteFile(size, getattr(each, "blob_id", ""), lfs.sha256 if lfs else None)
                if len(found) > MAX_FILES:
                    raise Rejected(f"{name} has more than {MAX_FILES} files: it is no adapter.", reason="TOO_LARGE")
        if len(self._trees) >= MAX_TREES:
            self._trees.clear()
        self._trees[name, commit] = found
        return found

    def has_file(self, name: str, commit: str, path: str) -> bool:
        """Whether a commit has a file now, whatever the cache remembers."""
        with hub_errors(f"{path} of {name} at {commit}"):
            return self._api.file_exists(name, path, revision=commit)

    def fetch(self, name: str, commit: str, path: str, *, again: bool = False) -> Path:
        """A file of a commit, from the cache or by request. `again` replaces a damaged file of the cache.

        Raises Rejected for a file that is never fetched, NotFound if the commit does not have it.
        """
        check_path(path)
        if not path.endswith(FETCHED_SUFFIXES):
            raise Rejected(
                f"{path} of {name} is not fetched: only {', '.join(FETCHED_SUFFIXES)} are.", reason="BAD_MANIFEST"
            )
        with hub_errors(f"{path} of {name} at {commit}"):
            return Path(
                hf_hub_download(
                    name,
                    path,
                    revision=commit,
                    cache_dir=self._cache,
                    endpoint=self.endpoint,
                    token=self.token,
                    force_download=again,
                    library_name="adapterbay",
                )
            )

    def fetch_all(self, name: str, commit: str, paths: Iterable[str]) -> dict[str, Path]:
        """Several files of a commit by path, a few at a time."""
        wanted = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(lambda path: self.fetch(name, commit, path), wanted), strict=True))

    def document(self, name: str, commit: str, path: str, limit: int) -> bytes | None:
        """The bytes of a small file of a commit; None if the commit does not have it. Raises Rejected (TOO_LARGE)."""
        cached = try_to_load_from_cache(name, path, cache_dir=self._cache, revision=commit)
        if cached is not None and not isinstance(cached, str):  # known not to be there
            return None
        size = Path(cached).stat().st_size if cached else self.size(name, commit, path) or 0
        if size > limit:
            raise Rejected(f"{path} of {name} has {size} bytes, over {limit}.", reason="TOO_LARGE")
        try:
            return read_bytes(self.fetch(name, commit, path), f"{path} of {name}", limit)
        except NotFound as error:
            if isinstance(error.__cause__, EntryNotFoundError):  # from now on the cache knows it
                return None
            raise

    def size(self, name: str, commit: str, path: str) -> int | None:
        """The size in bytes of a file of a commit, before it is fetched; None if it is not there, or offline."""
        there = None if self.offline else self.files(name, commit).get(path)
        return None if there is None else there.size

    def is_cached(self, name: str, commit: str, path: str) -> bool:
        """Whether the cache has a file of a commit."""
        return isinstance(try_to_load_from_cache(name, path, cache_dir=self._cache, revision=commit), str)

    def snapshot_path(self, name: str, commit: str, path: str) -> Path:
        """Where the cache keeps a file of a commit, whether it is there or not."""
        folder = Path(self._cache or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
        return folder / "snapshots" / commit / path

    def cached_commit(self, name: str, revision: str, path: str) -> str | None:
        """The commit that a branch, tag or commit meant when it was last asked for, if the cache has `path` of it."""
        found = try_to_load_from_cache(name, path, cache_dir=self._cache, revision=revision)
        if not isinstance(found, str):
            return None
        place = Path(found)
        for _ in range(path.count("/") + 1):
            place = place.parent
        return place.name

    def cached_commits(self, name: str) -> list[str]:
        """The commits of a repository of which the cache has something."""
        place = self.snapshot_path(name, "", "")
        return sorted(entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []

    def remember(self, name: str, revision: str, path: str) -> None:
        """Has the cache note what a branch or tag means, so that it can be resolved offline later."""
        with hub_errors(f"{name} at {revision}"):
            hf_hub_download(
                name,
                path,
                revision=revision,
                cache_dir=self._cache,
                endpoint=self.endpoint,
                token=self.token,
                library_name="adapterbay",
            )

    def repositories(self, author: str) -> list[Repository]:
        """All model repositories of an organization or user."""
        with hub_errors(f"the repositories of {author}"):
            return [
                Repository(
                    each.id,
                    each.sha,
                    each.last_modified,
                    frozenset(sibling.rfilename for sibling in each.siblings or ()),
                )
                for each in self._api.list_models(author=author, full=True)
            ]

    # Writing

    def create_repository(self, name: str, *, private: bool | None) -> None:
        """Makes a repository if it is not there."""
        with hub_errors(name, writing=True):
            self._api.create_repo(name, private=private, exist_ok=True)

    def commit(
        self,
        name: str,
        *,
        parent: str | None,
        add: Mapping[str, Path | bytes],
        delete: Iterable[str] = (),
        title: str,
        message: str,
    ) -> str:
        """One commit on main, if main is at `parent` now. Returns its SHA. Raises Conflict if main moved."""
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
            for path, source in add.items()
        ]
        operations += [CommitOperationDelete(path) for path in delete]
        with hub_errors(name, writing=True):
            done = self._api.create_commit(
                name,
                operations,
                commit_message=title,
                commit_description=message,
                parent_commit=parent,
            )
        return done.oid

    def create_tag(self, name: str, tag: str, commit: str, message: str | None = None) -> None:
        """Makes a tag. Raises Conflict if there is one of that name."""
        with hub_errors(f"the tag {tag} of {name}", writing=True):
            self._api.create_tag(name, tag=tag, tag_message=message, revision=commit)

    def delete_tag(self, name: str, tag: str) -> None:
        """Removes a tag. Raises NotFound."""
        with hub_errors(f"the tag {tag} of {name}", writing=True):
            self._api.delete_tag(name, tag=tag)


def _git_oid(path: Path, size: int) -> str:
    """The name that git gives to a file's bytes (gitformat-pack: sha1 of 'blob', its size, a NUL and the bytes)."""
    hasher = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
