"""What a registry on the Hub answers with: records, summaries and events of what a repository holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any, Final

from adapterbay.registry.admission.origins import PEFT_TASKS
from adapterbay.registry.digest import parse_json_object
from adapterbay.registry.errors import NotFound, Rejected
from adapterbay.registry.hub.aliases import current_versions
from adapterbay.registry.hub.client import Commit, HubClient, Repository
from adapterbay.registry.hub.fetch import manifest_of, own_manifest
from adapterbay.registry.hub.ledger import LoggedMove
from adapterbay.registry.hub.names import MAIN
from adapterbay.registry.hub.repository import RepositoryState
from adapterbay.registry.hub.resolution import of_version
from adapterbay.registry.manifest import CONFIG_FILE
from adapterbay.registry.metrics import metrics_of
from adapterbay.registry.portable import MAX_DOCUMENT_BYTES, SIGNATURE_PATH
from adapterbay.registry.views import AdapterSummary, RegistryEvent, VersionRecord

UNKNOWN: Final = ""
"""What stands in a summary for a fact of an adapter by others that is only known once its files were fetched."""


def records(state: RepositoryState) -> list[VersionRecord]:
    """All versions of a repository, the oldest first. Raises NotFound if there is none."""
    pointing = current_versions(state)
    found = [record(state, version, pointing) for version in state.numbers()]
    if not found:
        raise NotFound(f"{state.name} has no version: nothing was pushed to it.")
    return found


def record(state: RepositoryState, version: int, pointing: Mapping[str, int]) -> VersionRecord:
    """One version. `pointing` are the aliases of the repository. Raises NotFound, Corrupted or Rejected."""
    found = of_version(state, version)
    manifest = manifest_of(state.client, found.name, found.commit)
    signature = state.client.document(found.name, found.commit, SIGNATURE_PATH, MAX_DOCUMENT_BYTES)
    return VersionRecord(
        name=found.name,
        version=version,
        digest=found.digest,
        created_at=commit_of(state, found.commit).at,
        size_bytes=manifest.size_bytes,
        aliases=tuple(alias for alias, number in pointing.items() if number == version),
        task=manifest.task,
        peft_type=manifest.peft_type,
        rank=manifest.rank,
        base_reference=manifest.base_reference,
        base_fingerprint=manifest.base_fingerprint,
        labels=manifest.labels,
        tags={},
        metrics=metrics_of(manifest),
        deprecated=None,
        signed=signature is not None,
    )


def commit_of(state: RepositoryState, sha: str) -> Commit:
    """A commit with its time and author. Raises NotFound if it went away (a squashed history)."""
    for commit in state.commits:
        if commit.sha == sha:
            return commit
    return state.client.commits(state.name, sha)[0]


def summary(client: HubClient, repository: Repository) -> AdapterSummary | None:
    """An adapter in a listing; None for a repository without a version. Raises Corrupted or Rejected."""
    state = RepositoryState.read(client, repository.name)
    numbers = state.numbers()
    if not numbers:
        return None
    if own_manifest(client, state.name, state.commit_of(numbers[-1])) is None:
        return _of_others(state, repository, numbers[-1], len(numbers))
    pointing = current_versions(state)
    newest = record(state, numbers[-1], pointing)
    content = {field.name: getattr(newest, field.name) for field in fields(newest)}
    return AdapterSummary(**content, versions=len(numbers), alias_versions=pointing)


def _of_others(state: RepositoryState, repository: Repository, newest: int, count: int) -> AdapterSummary:
    """An adapter pushed with plain PEFT, by its adapter_config.json alone: its weights are not fetched for a list."""
    config = _config(state)
    rank = config.get("r")
    base = config.get("base_model_name_or_path")
    pointing = current_versions(state)
    return AdapterSummary(
        name=state.name,
        version=newest,
        digest=UNKNOWN,
        created_at=repository.at or datetime.fromtimestamp(0, UTC),
        size_bytes=sum(file.size for file in state.client.files(state.name, state.commit_of(newest)).values()),
        aliases=tuple(alias for alias, number in pointing.items() if number == newest),
        task=PEFT_TASKS.get(str(config.get("task_type")), UNKNOWN),
        peft_type=str(config.get("peft_type", UNKNOWN))[:40],
        rank=rank if isinstance(rank, int) else 0,
        base_reference=str(base)[:300] if base else UNKNOWN,
        base_fingerprint=UNKNOWN,
        labels=(),
        tags={},
        metrics={},
        deprecated=None,
        signed=False,
        versions=count,
        alias_versions=pointing,
    )


def _config(state: RepositoryState) -> dict[str, Any]:
    data = state.client.document(state.name, state.head or MAIN, CONFIG_FILE, MAX_DOCUMENT_BYTES)
    try:
        return parse_json_object(data or b"{}", f"{CONFIG_FILE} of {state.name}")
    except Rejected:  # listed all the same: what is wrong with it is said when it is asked for
        return {}


def events(state: RepositoryState) -> list[RegistryEvent]:
    """Pushes, by the commits of the versions; moves of aliases, by the log. The oldest first, counted from 1."""
    happened: list[RegistryEvent] = []
    digests: dict[int, str] = {}
    moves = list(state.alias_log)
    for version in state.numbers():
        while moves and moves[0].newest < version:
            happened.append(_moved(state.name, moves.pop(0), digests))
        found = of_version(state, version)
        commit = commit_of(state, found.commit)
        digests[version] = found.digest
        happened.append(
            RegistryEvent(0, "pushed", state.name, version, found.digest, None, None, commit.at, commit.author)
        )
    happened += [_moved(state.name, move, digests) for move in moves]
    last = datetime.fromtimestamp(0, UTC)
    for index, event in enumerate(happened):
        last = max(last, event.at)  # commits have whole seconds, and clocks differ
        happened[index] = replace(event, sequence=index + 1, at=last)
    return happened


def _moved(name: str, move: LoggedMove, digests: Mapping[int, str]) -> RegistryEvent:
    subject = move.version if move.version is not None else (move.previous or 0)
    return RegistryEvent(
        sequence=0,
        kind="alias_removed" if move.version is None else "alias_set",
        name=name,
        version=subject,
        digest=digests.get(subject, UNKNOWN),
        alias=move.alias,
        previous_version=move.previous,
        at=datetime.fromisoformat(move.at).astimezone(UTC),
        by=move.by,
        detail={"rollback": True} if move.rollback else {},
    )
