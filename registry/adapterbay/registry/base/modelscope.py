"""Repositories on ModelScope, by its own client: the files of one commit, in the client's own cache.

The client is the package modelscope-hub, imported when it is needed. The larger package modelscope is not used:
importing it loads torch where torch is installed.

ModelScope answers a branch or tag with its files: path, sha256, size, and the commit that last changed each. The newest
of these commits is the one that is pinned, after it was asked for by itself and answered with the same files: a branch
with merges may have none. An unknown revision is answered with no files, not with an error.

    MODELSCOPE_CACHE/models/ORG--REPO/snapshots/COMMIT    the files of a commit: the client's own layout
    MODELSCOPE_CACHE/models/ORG--REPO/partial/COMMIT      a download under way, continued by the next one
    MODELSCOPE_CACHE/models/ORG--REPO/refs/REVISION       the commit that a branch or tag meant when it was last asked
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adapterbay.registry.errors import AdapterbayError, MissingExtra, NotFound, Rejected, StorageFull, Unavailable

if TYPE_CHECKING:
    from modelscope_hub import HubApi, HubConfig

DEFAULT_REVISION: Final = "master"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CANDIDATES: Final = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """Which files of a repository are wanted, and when a folder is good for use.

    `what` names it in messages, such as `base modelscope:org/repo`; `missing` is the error for what is not there.
    `reuse`: a good folder of a commit is taken as it is; else its files are compared with ModelScope's list.
    """

    repo: str
    revision: str | None
    what: str
    wanted: Callable[[str], bool]
    whole: Callable[[Path], bool]
    missing: type[NotFound]
    reuse: bool


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    sha256: str | None
    size: int
    commit: str
    committed_at: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _File:
        """One entry of ModelScope's list; not every file has a sha256 there."""
        sha256 = entry.get("Sha256")
        return cls(
            str(entry["Path"]),
            str(sha256) if sha256 else None,
            int(entry["Size"]),
            str(entry.get("Revision")),
            int(entry.get("CommittedDate") or 0),
        )

    @property
    def content(self) -> tuple[str, str | None, int]:
        return self.path, self.sha256, self.size


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which means the same files for ever."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def fetch(request: Request) -> Path:
    """The folder with the wanted files; its name is the commit.

    Without a connection, or with HF_HUB_OFFLINE set, the cache alone is used: what this function or the client itself
    put there (in the second case the folder's name is a branch or tag). Raises `request.missing`, Unavailable,
    StorageFull, MissingExtra, or Rejected (PATH_OUTSIDE) for a repository whose paths leave it.
    """
    from huggingface_hub import constants

    config = _config()
    cache = _Cache(config, request)
    if request.revision is not None and is_commit(request.revision):
        folder = cache.commit(request.revision)
        if request.reuse and request.whole(folder):
            return folder
    if constants.HF_HUB_OFFLINE:
        return cache.remembered("HF_HUB_OFFLINE is set")
    from modelscope_hub import NetworkError

    try:
        with _failures(request):
            return _fetch(config, request, cache)
    except Unavailable as error:
        if isinstance(error.__cause__, NetworkError):
            return cache.remembered(f"ModelScope cannot be reached at {config.endpoint}")
        raise


def _config() -> HubConfig:
    try:
        from modelscope_hub import HubConfig
    except ImportError as error:
        raise MissingExtra(f"ModelScope needs more: pip install 'adapterbay[modelscope]' ({error}).") from error
    if "MODELSCOPE_LOG_LEVEL" not in os.environ:
        # It logs to standard error what it then raises, and what it raises is told once, by us.
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    return HubConfig()  # one of our own: the client's default one keeps the environment of its first use


def _fetch(config: HubConfig, request: Request, cache: _Cache) -> Path:
    from modelscope_hub import HubApi, HubConfig

    endpoint = HubApi(config).resolve_endpoint_for_read(request.repo)
    api = HubApi(HubConfig(endpoint=endpoint))
    asked = request.revision or DEFAULT_REVISION
    files = _files(api, request, asked)
    commit = asked if is_commit(asked) else _pinned(api, request, files)
    folder = cache.commit(commit)
    if not (request.reuse and request.whole(folder)):
        _download(api, request, commit, files, cache)
    if asked != commit:
        cache.note(asked, commit)
    return folder


def _files(api: HubApi, request: Request, revision: str) -> dict[str, _File]:
    """The wanted files of a revision by path. Raises `request.missing` if there is no such revision."""
    listed = api.legacy.list_repo_files(request.repo, "model", revision)
    if not listed:
        known = [str(each.get("Revision")) for each in api.list_repo_revisions(request.repo, "model")]
        if revision in known:
            raise request.missing(f"The {request.what} has no files.")
        raise request.missing(f"The {request.what} has no revision {revision}.", near=known[:5])
    try:
        files = [_File.of(entry) for entry in listed if entry.get("Type") != "tree"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unavailable(f"ModelScope lists the files of the {request.what} in an unknown form.") from error
    wanted = {file.path: file for file in files if request.wanted(file.path)}
    if not wanted:
        raise request.missing(f"The {request.what} holds nothing that is fetched: no *.safetensors, no *.json.")
    for path in wanted:
        _check_inside(path, request)
    return wanted


def _check_inside(path: str, request: Request) -> None:
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise Rejected(f"The {request.what} names a path that leaves it: {path[:200]!r}.", reason="PATH_OUTSIDE")


def _pinned(api: HubApi, request: Request, files: Mapping[str, _File]) -> str:
    """The commit that holds exactly these files. Raises Unavailable if ModelScope names none."""
    from modelscope_hub import NotExistError

    newest = sorted(files.values(), key=lambda file: file.committed_at, reverse=True)
    candidates = list(dict.fromkeys(file.commit for file in newest if is_commit(file.commit)))
    for commit in candidates[:_CANDIDATES]:
        with contextlib.suppress(request.missing, NotExistError):
            there = _files(api, request, commit)
            if {file.content for file in there.values()} == {file.content for file in files.values()}:
                return commit
    raise Unavailable(
        f"ModelScope names no commit that holds what the {request.what} is now, so it cannot be pinned: name one with "
        "@COMMIT, or download it with `modelscope download` and name the folder."
    )


def _download(api: HubApi, request: Request, commit: str, files: Mapping[str, _File], cache: _Cache) -> None:
    target = cache.commit(commit)
    with cache.lock():
        if request.reuse and request.whole(target):
            return  # another process was faster
        # A folder that is there already is another tool's, and completed. A new one appears at once, when it is whole.
        place = target if target.is_dir() else cache.root / "partial" / commit
        api.download_repo(
            request.repo,
            "model",
            revision=commit,
            local_dir=place,
            file_list=[{"Path": file.path, "Sha256": file.sha256, "Size": file.size} for file in files.values()],
        )
        if place != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(target)


class _Cache:
    """Where the client's cache keeps a repository."""

    def __init__(self, config: HubConfig, request: Request) -> None:
        self._config = config
        self._request = request
        self.root = config.cache_dir / "models" / request.repo.replace("/", "--")

    def commit(self, commit: str) -> Path:
        """The folder of a commit, whether it is there or not."""
        return self.root / "snapshots" / commit

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One download at a time for a repository, over all processes; one that dies lets go."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def note(self, revision: str, commit: str) -> None:
        """Remembers what a branch or tag means."""
        ref = self.root / "refs" / revision
        try:
            ref.parent.mkdir(parents=True, exist_ok=True)
            part = ref.with_name(f".{ref.name}.{commit}")
            part.write_text(commit, encoding="ascii")
            part.replace(ref)
        except OSError as error:
            _log.warning("%s could not be written; the branch will have to be asked for again: %s", ref, error)

    def remembered(self, why: str) -> Path:
        """What the cache has of the revision. Raises `request.missing` if it has nothing whole."""
        for folder in self._folders():
            if self._request.whole(folder):
                _log.warning("The %s is taken from the cache as it is: %s.", self._request.what, why)
                return folder
        raise self._request.missing(
            f"The {self._request.what} is not in ModelScope's cache ({self._config.cache_dir}), and {why}: connect "
            "once, or name a folder."
        )

    def _folders(self) -> Iterator[Path]:
        from modelscope_hub import CacheNotFound, HubApi

        revision = self._request.revision
        ref = self.root / "refs" / (revision or DEFAULT_REVISION)
        if ref.is_file() and is_commit(commit := ref.read_text(encoding="ascii", errors="replace").strip()):
            yield self.commit(commit)
        if revision is not None:
            yield self.root / "snapshots" / revision
            return
        # What the client downloaded by itself, in the layout of this or of an earlier version of it.
        with contextlib.suppress(CacheNotFound):
            yield HubApi(self._config).download_repo(self._request.repo, "model", local_files_only=True)


@contextlib.contextmanager
def _failures(request: Request) -> Iterator[None]:
    """What the client raises, as our errors."""
    from modelscope_hub import APIError, AuthenticationError, FileDownloadError, HubError, NotExistError
    from modelscope_hub import PermissionDeniedError as Denied

    try:
        yield
    except AdapterbayError:
        raise
    except (NotExistError, AuthenticationError, Denied) as error:
        raise request.missing(
            f"ModelScope has no {request.what} that this account may read ({_line(error)}): check the "
            "name, or log in with `ms login` or MODELSCOPE_API_TOKEN if it is private."
        ) from error
    except FileDownloadError as error:
        first = next(iter(error.failed_files.values()), error)
        if _full([error, *error.failed_files.values()]):
            raise _no_space(request) from error
        raise Unavailable(
            f"{len(error.failed_files)} files of the {request.what} could not be fetched: {_line(first)}. Try again; "
            "what is there already is kept."
        ) from error
    except (APIError, HubError) as error:
        raise Unavailable(f"ModelScope failed for the {request.what}: {_line(error)}. Try again later.") from error
    except OSError as error:
        if _full([error]):
            raise _no_space(request) from error
        raise Unavailable(f"The {request.what} could not be fetched: {_line(error)}.") from error


def _full(errors: Iterable[BaseException]) -> bool:
    return any(isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) for error in errors)


def _no_space(request: Request) -> StorageFull:
    return StorageFull(f"No space left to fetch the {request.what}: free some, or set MODELSCOPE_CACHE.")


def _line(error: BaseException) -> str:
    """One line of an error; the client's own errors print requests and answers in full otherwise."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300].rstrip(".")
