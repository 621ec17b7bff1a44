"""A push: admission here, before any request; then one commit whose parent is checked; then its tag.

The commit is the instant of the push: it has the files, the manifest, the card and the ledger with the new version. A
push that is killed before it leaves nothing; one that is killed after it leaves a version without its tag: readers find
it all the same, and the next push or `verify` tags it. Of two pushers on one parent one gets its commit, the other is
told (412), reads the head again, and follows. If the answer to the commit is lost, the head tells whether it came.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adapterbay.registry.admission import Limits
from adapterbay.registry.admission.candidate import Candidate, Wishes, examine
from adapterbay.registry.admission.folder import STORED_FILES, read_folder
from adapterbay.registry.card import render_card
from adapterbay.registry.errors import AdapterbayError, Conflict, NotFound, Rejected, Unavailable
from adapterbay.registry.hub.aliases import attempts, busy, carried_out, is_moving, move_tag, new_move
from adapterbay.registry.hub.client import HubClient, RemoteFile
from adapterbay.registry.hub.fetch import check_pinned, own_manifest
from adapterbay.registry.hub.ledger import ALIAS_LOG_PATH, Ledger, LedgerEntry, LoggedMove, alias_log_bytes
from adapterbay.registry.hub.names import tagged_version, version_tag
from adapterbay.registry.hub.repository import RepositoryState
from adapterbay.registry.local.blobs import BlobStore, Staged
from adapterbay.registry.manifest import README_FILE, Manifest
from adapterbay.registry.portable import (
    LEDGER_PATH,
    MANIFEST_PATH,
    OWN_README_PATH,
    SIGNATURE_PATH,
    read_claim,
)

_OURS: Final = (OWN_README_PATH, SIGNATURE_PATH)
_IGNORE_FILE: Final = ".gitignore"


@dataclass(frozen=True, slots=True)
class Prepared:
    """An admitted folder: copies of its files by path, and the signature that it brought."""

    candidate: Candidate
    files: Mapping[str, Staged]
    signature: bytes | None

    @property
    def manifest(self) -> Manifest:
        """What the folder is."""
        return self.candidate.manifest


@dataclass(frozen=True, slots=True)
class Pushed:
    """A committed push. `tagged` says why its tag could not be set; None: it is."""

    version: int
    commit: str
    same_as: int | None
    new_bytes: int
    untagged: str | None


@contextlib.contextmanager
def prepared(folder: str | Path, wishes: Wishes) -> Iterator[Prepared]:
    """Admits a folder on copies of its files, as a local push does. No network but for the base.

    Raises what `Registry.push` raises.
    """
    source = read_folder(folder)
    claim = read_claim(source.portable)
    wishes = Wishes(wishes.base, wishes.task, wishes.labels, claim.manifest if claim else None, wishes.parents)
    with tempfile.TemporaryDirectory(prefix="adapterbay-push-") as place:
        blobs = BlobStore(Path(place))
        blobs.create()
        with blobs.staging() as staging:
            files = dict(claim.files) if claim else source.files
            _check_sizes(files)
            staged = {path: staging.add_file(real) for path, real in files.items()}
            candidate = examine(source, staged, wishes)
            check_pinned(candidate.manifest, str(folder))
            yield Prepared(candidate, staged, claim.signature if claim else None)


def push(
    client: HubClient,
    name: str,
    folder: Prepared,
    *,
    aliases: tuple[str, ...],
    number: int | None,
    private: bool | None,
    by: str,
) -> Pushed:
    """Makes a commit of an admitted folder, and tags it. Raises Conflict, Unavailable or StaleAlias."""
    mark = f"adapterbay-push-{secrets.token_hex(8)}"
    for _ in attempts():
        state = _read_or_create(client, name, private)
        if any(is_moving(state, alias) for alias in aliases):
            continue
        version = _next_version(state, number)
        there = client.files(name, state.head) if state.head else {}
        if _IGNORE_FILE in there:
            raise Rejected(
                f"{name} has a {_IGNORE_FILE}, by which the Hub could leave files of a push out: remove it there.",
                reason="BAD_COMMIT",
            )
        moves = [new_move(state, alias, version, by, newest=version) for alias in aliases]
        add = _contents(state, folder, version, moves)
        try:
            commit = client.commit(
                name,
                parent=state.head,
                add=add,
                delete=_stale(state, there, add),
                title=f"Version {version}",
                message=f"{folder.manifest.digest}\npushed by {by}\n{mark}",
            )
        except Conflict:
            continue
        except Unavailable as error:
            commit = _landed(client, name, mark, error)
        _tag_previous(state)
        version, untagged = _tag(client, name, version, commit)
        while moves:
            with carried_out(client, name, moves):
                move_tag(client, name, moves[0].alias, commit, before=state.tags.get(moves[0].alias))
            del moves[0]
        same = [entry.version for entry in state.entries if entry.digest == folder.manifest.digest]
        sent = [file.size for path, file in folder.files.items() if not _is_there(there.get(path), file)]
        return Pushed(version, commit, same[-1] if same else None, sum(sent), untagged)
    raise busy(name)


def tag_version(client: HubClient, name: str, version: int, commit: str) -> None:
    """Sets the tag that a killed push left unset. Raises Conflict if it was set elsewhere, or Unavailable."""
    client.create_tag(name, version_tag(version), commit)


def _check_sizes(files: Mapping[str, Path]) -> None:
    limits = Limits()
    for path, real in files.items():
        limit = limits.weights_bytes if path.endswith(".safetensors") else limits.document_bytes
        size = real.stat().st_size
        if size > limit:
            raise Rejected(f"{path} has {size} bytes, over the limit of {limit}.", reason="TOO_LARGE")


def _read_or_create(client: HubClient, name: str, private: bool | None) -> RepositoryState:
    try:
        return RepositoryState.read(client, name)
    except NotFound:
        client.create_repository(name, private=private)
        return RepositoryState.read(client, name)


def _next_version(state: RepositoryState, number: int | None) -> int:
    following = state.next_number()
    if number is None:
        return following
    if number < following:
        raise Conflict(
            f"{state.name}@{number} cannot be made: the next version there is {following}, and numbers are never "
            "reused.",
            reason="VERSION_TAKEN",
        )
    return number


def _contents(
    state: RepositoryState, folder: Prepared, version: int, moves: Sequence[LoggedMove]
) -> dict[str, Path | bytes]:
    """The files of the commit, by path."""
    manifest = folder.manifest
    add: dict[str, Path | bytes] = {path: file.path for path, file in folder.files.items()}
    own = folder.files.get(README_FILE)
    own_readme = own.path.read_bytes() if own else None
    card = render_card(manifest, name=state.name, own_readme=own_readme, version=version)
    add[README_FILE] = card
    if own_readme is not None and own_readme != card:
        add[OWN_README_PATH] = own_readme
    add[MANIFEST_PATH] = manifest.to_bytes()
    if folder.signature is not None:
        add[SIGNATURE_PATH] = folder.signature
    add[LEDGER_PATH] = _ledger(state, version, manifest.digest).to_bytes()
    if moves:
        add[ALIAS_LOG_PATH] = alias_log_bytes([*state.alias_log, *moves])
    return add


def _ledger(state: RepositoryState, version: int, digest: str) -> Ledger:
    """The ledger with one more version; the entry that was the newest gets its commit."""
    older = [
        entry if entry.commit else entry.model_copy(update={"commit": state.commit_of(entry.version)})
        for entry in state.entries
    ]
    return Ledger(versions=(*older, LedgerEntry(version=version, digest=digest, commit=None)))


def _stale(state: RepositoryState, there: Mapping[str, RemoteFile], add: Mapping[str, object]) -> list[str]:
    """The files of the version before that this one does not have. Files of others stay."""
    before = own_manifest(state.client, state.name, state.head) if state.head else None
    paths = STORED_FILES if before is None else tuple(entry.path for entry in before.files)
    return sorted(path for path in {*paths, *_OURS} if path in there and path not in add)


def _is_there(remote: RemoteFile | None, file: Staged) -> bool:
    return remote is not None and remote.is_same(file.path, file.digest, file.size)


def _landed(client: HubClient, name: str, mark: str, error: Unavailable) -> str:
    """The commit of ours whose answer was lost. Raises `error` if it did not come to be, or if nobody can tell."""
    try:
        commits = client.commits(name)
    except AdapterbayError:
        raise error from None
    for commit in commits:
        if mark in commit.message or mark in commit.title:
            return commit.sha
    raise error


def _tag_previous(state: RepositoryState) -> None:
    """Sets the tag of the newest version before this push, if its pusher was killed before it could."""
    previous = state.entries[-1] if state.entries else None
    if previous is not None and previous.version not in state.version_tags:
        with contextlib.suppress(AdapterbayError):  # `verify` says what is left of it
            tag_version(state.client, state.name, previous.version, state.commit_of(previous.version))


def _tag(client: HubClient, name: str, version: int, commit: str) -> tuple[int, str | None]:
    """The number of a commit and why it has no tag. A server that tags by itself decides on the number."""
    try:
        tag_version(client, name, version, commit)
    except AdapterbayError as error:
        try:
            tags = client.refs(name).tags
        except AdapterbayError:
            return version, error.message
        numbers = [number for tag, sha in tags.items() if sha == commit and (number := tagged_version(tag))]
        return (max(numbers), None) if numbers else (version, error.message)
    return version, None
