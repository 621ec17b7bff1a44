"""Resolving for callers that must not wait: the same answers, or none."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from registry_tools import Tiny

from adapterbay.registry import Registry
from adapterbay.registry.local import reading
from adapterbay.registry.local.index import BUSY_SECONDS


@pytest.fixture
def store(tmp_path: Path, llama: Tiny) -> Registry:
    store = Registry.open(tmp_path / "store")
    store.push(llama.adapter, "tales", base=f"folder:{llama.base}", aliases=["champion"])
    return store


def test_the_same_answers_as_resolve(store: Registry) -> None:
    digest = store.resolve("tales").digest
    for reference in ("tales", "tales@1", "tales@champion", f"tales@{digest}"):
        assert store.resolve_at_once(reference) == store.resolve(reference), reference


@pytest.mark.parametrize("reference", ["tails", "tales@2", "tales@nobody", "hub:org/repo", "no//name", ""])
def test_what_resolve_refuses_is_left_to_it(store: Registry, reference: str) -> None:
    assert store.resolve_at_once(reference) is None


def test_what_changed_is_seen(store: Registry) -> None:
    assert store.resolve_at_once("tales@new") is None
    store.set_alias("tales", "new", 1)
    assert store.resolve_at_once("tales@new") == store.resolve("tales@new")
    store.remove_alias("tales", "new")
    assert store.resolve_at_once("tales@new") is None


def test_a_busy_index_is_not_waited_for(store: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of a write-ahead log wait for nobody but who recovers it; a test cannot hold it in that moment."""

    def busy_seconds(db: sqlite3.Connection) -> float:
        found: int = db.execute("PRAGMA busy_timeout").fetchone()[0]
        return found / 1000

    def busy(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    with store.index.read_at_once() as db:
        assert db is not None
        assert busy_seconds(db) == 0
    with store.index.read() as again:
        assert again is db
        assert busy_seconds(again) == BUSY_SECONDS
    monkeypatch.setattr(reading, "_find", busy)
    assert store.resolve_at_once("tales") is None


def test_without_an_open_connection_nothing_is_opened(store: Registry) -> None:
    store.index.close()
    assert store.resolve_at_once("tales") is None
    assert store.resolve("tales").version == 1
    assert store.resolve_at_once("tales") is not None
