"""Stores that earlier releases wrote open, keep what they hold, and can be written to."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry_tools import Draft, Tiny

from adapterbay.registry import Registry
from adapterbay.registry.errors import Unavailable
from adapterbay.registry.gate import Guard
from adapterbay.registry.local.migrations import MIGRATIONS
from adapterbay.registry.views import Listing, MetricBound

COLUMNS_1 = {
    "adapters": "name, next_version",
    "versions": "name, version, digest, created_at, size_bytes, task, peft_type, rank, base_reference, "
    "base_fingerprint, labels",
    "aliases": "name, alias, version",
    "blobs": "digest, size_bytes",
    "events": "sequence, kind, name, version, digest, alias, previous_version, at",
}
"""The tables of schema 1 (adapterbay 0.1.0)."""


def make_schema_1(root: Path) -> None:
    """Turns a store into what adapterbay 0.1.0 wrote: the same rows in its schema, its records and its alias logs."""
    new = sqlite3.connect(root / "index.sqlite")
    rows = {table: new.execute(f"SELECT {columns} FROM {table}").fetchall() for table, columns in COLUMNS_1.items()}
    new.close()
    for path in root.glob("index.sqlite*"):
        path.unlink()
    old = sqlite3.connect(root / "index.sqlite", isolation_level=None)
    old.execute("PRAGMA journal_mode = WAL")
    MIGRATIONS[0](old)
    for table, found in rows.items():
        marks = ", ".join("?" * len(COLUMNS_1[table].split(",")))
        old.executemany(f"INSERT INTO {table} VALUES ({marks})", found)
    old.execute("PRAGMA user_version = 1")
    old.close()
    for record in root.rglob("@*.json"):
        document = json.loads(record.read_text())
        del document["by"]
        record.chmod(0o644)
        record.write_text(json.dumps(document | {"record_version": 1}, sort_keys=True, separators=(",", ":")))
    for journal in root.rglob("@journal.jsonl"):
        lines = []
        for line in journal.read_text().splitlines():
            change = json.loads(line)
            change.setdefault("version", None)
            change.setdefault("previous_version", None)
            lines.append(json.dumps({key: change[key] for key in ALIAS_LINE_1}, sort_keys=True, separators=(",", ":")))
        journal.with_name("@aliases.jsonl").write_text("".join(f"{line}\n" for line in lines))
        journal.unlink()


ALIAS_LINE_1 = ("alias", "version", "previous_version", "at", "sequence")


@pytest.fixture
def old(registry: Registry, llama: Tiny, bert: Tiny, draft: Callable[[Tiny], Draft]) -> Registry:
    """A store of adapterbay 0.1.0, and the one that it was made from, which stays open."""
    trained = draft(llama)
    trained.write_training(metrics={"accuracy": 0.75})
    registry.push(trained.path, "team/x", aliases=["champion"])
    registry.push(bert.adapter, "team/x", aliases=["champion", "challenger"])
    registry.push(llama.adapter, "team/y")
    registry.set_alias("team/x", "champion", 1)
    registry.remove_alias("team/x", "challenger")
    registry.close()
    make_schema_1(registry.root)
    return registry


def facts(registry: Registry) -> Any:
    return (
        registry.adapters(),
        registry.versions("team/x"),
        registry.aliases("team/x"),
        [(event.sequence, event.kind, event.version, event.alias, event.at) for event in registry.events()],
        registry.snapshot("team/x@champion").manifest,
    )


def test_a_store_of_schema_1_opens_and_goes_on(old: Registry, bert: Tiny) -> None:
    registry = Registry.open(old.root, create=False)
    assert registry.verify().ok
    assert registry.aliases("team/x") == {"champion": 1}
    assert registry.version("team/x", 1).metrics == {"accuracy": 0.75}, "known from the manifest"
    bound = (MetricBound.parse("accuracy>=0.7"),)
    assert [found.version for found in registry.adapters(listing=Listing(metrics=bound))] == []
    assert [event.by for event in registry.history("team/x")] == [None] * 7
    assert registry.rollback("team/x", "champion").version == 2, "the old log says where it was before"
    registry.guard("team/x", "champion", Guard({"accuracy": 0.7}))
    registry.tag("team/x", 2, {"old": ""})
    registry.delete("team/y", 1)
    assert registry.push(bert.adapter, "team/x", aliases=["challenger"]).version == 3
    assert registry.verify().ok
    before = facts(registry)
    registry.rebuild_index()
    assert facts(registry) == before
    assert registry.verify().ok


def test_a_store_of_schema_1_that_lost_its_index(old: Registry) -> None:
    with_index = Registry.open(old.root, create=False)
    before = facts(with_index)
    with_index.close()
    for path in old.root.glob("index.sqlite*"):
        path.unlink()
    assert facts(Registry.open(old.root, create=False)) == before


def test_a_store_of_a_newer_release_is_left_alone(old: Registry) -> None:
    Registry.open(old.root).close()
    with sqlite3.connect(old.root / "index.sqlite") as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(Unavailable, match="newer adapterbay"):
        Registry.open(old.root)


def test_released_migrations_do_not_change() -> None:
    """A step that was released is never edited: a store that had the old text would differ for ever."""
    db = sqlite3.connect(":memory:")
    schemas = []
    for step in MIGRATIONS:
        step(db)
        rows = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchall()
        schemas.append(" ".join(" ".join(row[0].split()) for row in rows))
    import hashlib

    digests = [hashlib.sha256(schema.encode()).hexdigest()[:16] for schema in schemas]
    assert digests == RELEASED


RELEASED = ["ef0c7763e42a9b14", "0ab12222544d2e5f"]
