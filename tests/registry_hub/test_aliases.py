"""Aliases as tags: on a Hub that cannot move one at one instant, and on our server, which can."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_tools import ServerProcess
from plain_hub import Failure, PlainHub

from adapterbay.registry import Registry
from adapterbay.registry.errors import Conflict, InvalidReference, NotFound, Unavailable
from adapterbay.registry.hub import aliases as alias_moves
from adapterbay.registry.hub.backend import HubRegistry

Content = Callable[[int], Path]
NAME = "team/tales"


@pytest.fixture
def registry(plain: PlainHub, tmp_path: Path) -> HubRegistry:
    return HubRegistry("hub:team", endpoint=plain.endpoint, cache=tmp_path / "hub-cache")


def test_aliases_moved_in_the_store_of_our_server(
    server: ServerProcess, hub: Callable[[], HubRegistry], content: Content
) -> None:
    registry = hub()
    for number in (1, 2, 3):
        registry.push(content(number), "tales", aliases=["champion"] if number < 3 else [])
    store = Registry.open(server.store)
    store.set_alias(NAME, "champion", 3)
    store.push(content(4), NAME)
    assert registry.aliases("tales") == {"champion": 3}
    assert registry.rollback("tales", "champion").version == 2
    assert store.aliases(NAME) == {"champion": 2}
    moves = [event for event in store.history(NAME) if event.alias == "champion"]
    assert [(event.kind, event.previous_version, event.version) for event in moves] == [
        ("alias_set", None, 1),
        ("alias_set", 1, 2),
        ("alias_set", 2, 3),
        ("alias_set", 3, 2),
    ], "each at one instant: never removed on the way"
    assert registry.verify().ok
    store.close()


def test_a_tag_at_no_version_is_no_alias(plain: PlainHub, registry: HubRegistry, content: Content) -> None:
    registry.push(content(1), "tales")
    repo = plain.repos[NAME]
    repo.tags["champion"] = repo.commits[0].sha
    assert registry.aliases("tales") == {}
    assert [problem.kind for problem in registry.verify().problems] == ["alias"]
    with pytest.raises(NotFound):
        registry.resolve("tales@champion")
    repo.add({**repo.head.tree, "adapterbay/aliases.jsonl": b"{}\n"}, "by hand")
    assert {problem.kind for problem in registry.verify().problems} == {"alias", "journal"}


def test_an_alias_on_the_move_is_still_there(
    plain: PlainHub, registry: HubRegistry, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(content(1), "tales")
    registry.push(content(2), "tales", aliases=["champion"])
    del plain.repos[NAME].tags["champion"]  # a mover between its two requests
    assert registry.resolve("tales@champion").version == 2
    monkeypatch.setattr(alias_moves, "SETTLE_SECONDS", 0.0)
    with pytest.raises(NotFound):
        registry.resolve("tales@champion")
    assert registry.set_alias("tales", "champion", 1).previous is None
    assert registry.verify().ok


def test_a_mover_waits_for_the_one_before(
    plain: PlainHub, registry: HubRegistry, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(content(1), "tales", aliases=["champion"])
    registry.push(content(2), "tales")
    registry.set_alias("tales", "champion", 2)
    repo = plain.repos[NAME]
    repo.tags["champion"] = repo.tags["v1"]  # as if the mover to 2 had not come to its tag yet
    threading.Timer(1.0, lambda: repo.tags.update(champion=repo.tags["v2"])).start()
    move = registry.set_alias("tales", "champion", 1)
    assert (move.previous, move.version) == (2, 1)
    repo.tags["champion"] = repo.tags["v2"]
    monkeypatch.setattr(alias_moves, "MAX_ATTEMPTS", 2)
    with pytest.raises(Conflict):
        registry.set_alias("tales", "champion", 1)
    monkeypatch.setattr(alias_moves, "SETTLE_SECONDS", 0.0)
    assert registry.set_alias("tales", "champion", 1).previous == 2


def test_a_move_that_the_server_refuses_leaves_the_alias(
    plain: PlainHub, registry: HubRegistry, content: Content
) -> None:
    registry.push(content(1), "tales", aliases=["champion"])
    registry.push(content(2), "tales")
    plain.failures.append(Failure("POST /api/models/team/tales/tag/", 409))
    plain.failures.append(Failure("POST /api/models/team/tales/tag/", 500))
    with pytest.raises(Unavailable):
        registry.set_alias("tales", "champion", 2)
    assert plain.repos[NAME].tags["champion"] == plain.repos[NAME].tags["v1"]


@pytest.mark.parametrize("alias", ["v3", "main"])
def test_names_of_the_hub_are_no_aliases(registry: HubRegistry, content: Content, alias: str) -> None:
    registry.push(content(1), "tales")
    with pytest.raises(InvalidReference):
        registry.set_alias("tales", alias, 1)
