"""Aliases as tags, moved by compare-and-swap as far as the Hub allows.

The Hub cannot move a tag at one instant: it is deleted and made again. So a move is written down first, as one line of
adapterbay/aliases.jsonl in a commit whose parent is checked. Of two movers one gets that commit; the other is told
(412), reads again, and waits until the first one's tag stands where its line says; then it compares and writes its own.

    read main, tags and log → the alias must point at `expected` → commit the line → delete the tag → make it

What this gives, and what it does not:
- Two movers that both use this package never both succeed from one `expected`. Each move is in the log: who, and when.
- Between delete and make the tag is not there: plain clients (`revision="champion"`) fail for that moment. Readers of
  this package take the line in the log, as long as it is younger than SETTLE_SECONDS.
- Somebody who moves the tag by other means is not held up. If that happens between reading and deleting, the move is
  lost; if between deleting and making, the Hub says so (409), and the mover here fails with StaleAlias.
- A mover that dies after its line and before its tag leaves the tag where it was, or away: the tag counts, and after
  SETTLE_SECONDS the next mover goes by it.
- `registry serve` moves a tag at one instant, by compare-and-swap: there is no moment without it, and no lost move.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

from adapterbay.registry.errors import AdapterbayError, Conflict, Corrupted, NotFound, Rejected, StaleAlias
from adapterbay.registry.hub.client import HubClient
from adapterbay.registry.hub.ledger import ALIAS_LOG_PATH, LoggedMove, alias_log_bytes
from adapterbay.registry.hub.names import move_message
from adapterbay.registry.hub.repository import RepositoryState, version_of_commit
from adapterbay.registry.nearest import nearest_words
from adapterbay.registry.swap import check_expected
from adapterbay.registry.views import AliasMove, AnyVersion

SETTLE_SECONDS: Final = 30.0
"""So long a move that is written down may take until its tag stands. Clocks must agree to about this."""
MAX_ATTEMPTS: Final = 40
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 3.0


def attempts() -> Iterator[int]:
    """Counts attempts at a write, with a growing and jittered pause between them."""
    for attempt in range(MAX_ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**attempt)))
        yield attempt


def new_move(
    state: RepositoryState,
    alias: str,
    version: int | None,
    by: str,
    *,
    newest: int | None = None,
    rollback: bool = False,
) -> LoggedMove:
    """The line for a move that is made now. `newest` is the version that the same commit makes, if it makes one."""
    return LoggedMove(
        alias=alias,
        version=version,
        previous=current_version(state, alias),
        newest=newest or max(state.numbers(), default=0),
        by=by,
        at=datetime.now(UTC).isoformat(timespec="microseconds"),
        rollback=rollback,
    )


def alias_commit(state: RepositoryState, alias: str) -> str | None:
    """The commit that an alias or any other tag means; None if there is none. See above for a tag on the move."""
    commit = state.tags.get(alias)
    if commit is not None or state.ledger is None:
        return commit
    move = _last_move(state, alias)
    return state.commit_of(move.version) if move and move.version is not None and _is_fresh(move) else None


def current_versions(state: RepositoryState) -> dict[str, int]:
    """The aliases and the versions that they point at. A tag that points at no version is none."""
    found = {}
    for alias in state.alias_tags:
        version = current_version(state, alias)
        if version is not None:
            found[alias] = version
    return found


def set_alias(
    client: HubClient,
    name: str,
    alias: str,
    version: int,
    expected: int | AnyVersion | None,
    by: str,
    *,
    rollback: bool = False,
) -> AliasMove:
    """See `Backend.set_alias`. Raises StaleAlias, NotFound, Conflict if the repository does not come to rest."""
    for _ in attempts():
        state = RepositoryState.read(client, name)
        commit = state.commit_of(version)
        if is_moving(state, alias):
            continue
        current = current_version(state, alias)
        check_expected(name, alias, expected, current)
        if current == version:
            return AliasMove(alias, current, version)
        move = new_move(state, alias, version, by, rollback=rollback)
        if _write(state, move):
            with carried_out(client, name, [move]):
                move_tag(client, name, alias, commit, before=state.tags.get(alias))
            return AliasMove(alias, current, version)
    raise busy(name)


def remove_alias(client: HubClient, name: str, alias: str, expected: int | AnyVersion | None, by: str) -> AliasMove:
    """See `Backend.remove_alias`. Raises StaleAlias, NotFound, Conflict."""
    for _ in attempts():
        state = RepositoryState.read(client, name)
        if is_moving(state, alias):
            continue
        if alias not in state.tags:
            raise NotFound(f"{name} has no alias {alias}.", near=nearest_words(alias, state.alias_tags))
        current = current_version(state, alias)
        check_expected(name, alias, expected, current)
        move = new_move(state, alias, None, by)
        if _write(state, move):
            with carried_out(client, name, [move]):
                client.delete_tag(name, alias)
            return AliasMove(alias, current, None)
    raise busy(name)


def rollback(client: HubClient, name: str, alias: str, by: str) -> AliasMove:
    """See `Backend.rollback`: the move before is what the log knows. Raises NotFound or StaleAlias."""
    state = RepositoryState.read(client, name)
    current = current_version(state, alias)
    places: list[int | None] = []
    for move in state.alias_log:
        if move.alias != alias:
            continue
        if move.rollback and len(places) > 1:
            places.pop()
        else:
            places.append(move.version)
    if places and places[-1] == current:
        places.pop()
    earlier = [place for place in places if place is not None]
    if not earlier:
        what = f"was never set on {name}" if current is None else f"is at {current}, where it was first set"
        raise NotFound(f"There is nothing to go back to: {alias} {what}, as far as {ALIAS_LOG_PATH} knows.")
    return set_alias(client, name, alias, earlier[-1], current, by, rollback=True)


def move_tag(client: HubClient, name: str, alias: str, commit: str, *, before: str | None) -> None:
    """Points a tag at a commit. Raises StaleAlias if somebody else makes it meanwhile.

    `registry serve` moves a tag at one instant, if the message says where it was; the Hub answers 409: it is there.
    """
    message = None if before is None else move_message(before)
    try:
        client.create_tag(name, alias, commit, message)
        return
    except Conflict:
        if before is None:
            raise _overtaken(name, alias) from None
    with contextlib.suppress(NotFound):  # somebody else deleted it
        client.delete_tag(name, alias)
    try:
        client.create_tag(name, alias, commit, message)
    except Conflict as error:
        raise _overtaken(name, alias) from error
    except AdapterbayError:
        with contextlib.suppress(AdapterbayError):  # the error to report is the first
            client.create_tag(name, alias, before)
        raise


def is_moving(state: RepositoryState, alias: str) -> bool:
    """Whether somebody wrote a move down a moment ago whose tag does not stand yet."""
    move = _last_move(state, alias)
    return move is not None and _is_fresh(move) and move.version != current_version(state, alias)


def busy(name: str) -> Conflict:
    """The error for a repository that others change faster than we can."""
    return Conflict(
        f"{name} was changed by others {MAX_ATTEMPTS} times while this waited for its turn: try again later."
    )


def _overtaken(name: str, alias: str) -> StaleAlias:
    return StaleAlias(f"Somebody else moved {name}@{alias} at the same time: read it again and decide anew.")


def _write(state: RepositoryState, move: LoggedMove) -> bool:
    """Appends a line to the log, if nobody was faster. Without a ledger no log is kept: a commit would be a version."""
    if state.ledger is None:
        return True
    where = "removed" if move.version is None else f"→ v{move.version}"
    try:
        state.client.commit(
            state.name,
            parent=state.head,
            add={ALIAS_LOG_PATH: alias_log_bytes([*state.alias_log, move])},
            title=f"Alias {move.alias} {where}",
            message=f"by {move.by}",
        )
    except Conflict:
        return False
    return True


@contextlib.contextmanager
def carried_out(client: HubClient, name: str, moves: Iterable[LoggedMove]) -> Iterator[None]:
    """Around the moves of tags whose lines are written: those that do not come about are taken back."""
    try:
        yield
    except AdapterbayError:
        for move in moves:
            with contextlib.suppress(AdapterbayError):  # the error to report is the first
                _take_back(client, name, move)
        raise


def _take_back(client: HubClient, name: str, move: LoggedMove) -> None:
    """Writes down that a move did not come about, unless somebody wrote another one since."""
    for _ in attempts():
        state = RepositoryState.read(client, name)
        if state.ledger is None or _last_move(state, move.alias) != move:
            return
        if _write(state, new_move(state, move.alias, current_version(state, move.alias), move.by, rollback=True)):
            return


def _last_move(state: RepositoryState, alias: str) -> LoggedMove | None:
    return next((move for move in reversed(state.alias_log) if move.alias == alias), None)


def _is_fresh(move: LoggedMove) -> bool:
    return datetime.now(UTC) - datetime.fromisoformat(move.at) < timedelta(seconds=SETTLE_SECONDS)


def current_version(state: RepositoryState, alias: str) -> int | None:
    """The version that the tag points at; None if there is no tag, or if it points at no version."""
    commit = state.tags.get(alias)
    if commit is None:
        return None
    try:
        return version_of_commit(state, commit)
    except (Corrupted, NotFound, Rejected):
        return None
