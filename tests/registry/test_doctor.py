"""The doctor: what it sees of a damaged store, and what it mends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from registry_tools import Tiny, tree

from adapterbay.registry import Registry
from adapterbay.registry.errors import Corrupted, RegistryNotFound
from adapterbay.registry.local.doctor import diagnose


@pytest.fixture
def store(registry: Registry, llama: Tiny, bert: Tiny) -> Registry:
    registry.push(llama.adapter, "x", aliases=["champion"])
    registry.push(bert.adapter, "team/y")
    return registry


def said(root: Path) -> list[tuple[str, str]]:
    return [(finding.severity, finding.subject) for finding in diagnose(root).findings]


def test_a_healthy_store(store: Registry) -> None:
    before = tree(store.root)
    diagnosis = diagnose(store.root)
    assert (diagnosis.ok, diagnosis.findings, diagnosis.rebuilt) == (True, (), False)
    assert tree(store.root) == before


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(RegistryNotFound):
        diagnose(tmp_path / "nothing")


def test_what_is_missing_is_named(store: Registry) -> None:
    weights = next(entry for entry in store.snapshot("x").manifest.files if entry.path.endswith(".safetensors"))
    store.blobs.path(weights.digest).unlink()
    (store.root / "adapters" / "team" / "y" / "@1.json").unlink()
    (store.root / "adapters" / "x" / "@journal.jsonl").unlink()
    orphan = store.blobs.path("sha256:" + "ab" * 32)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"orphan")
    assert sorted(said(store.root)) == [("error", "team/y@1"), ("error", "x"), ("error", "x@1"), ("note", "blobs")]
    assert not diagnose(store.root).ok


def test_leftovers_are_only_noted(store: Registry) -> None:
    folder = store.root / "adapters" / "x"
    (folder / "@2.json").write_bytes((folder / "@1.json").read_bytes())
    with (folder / "@journal.jsonl").open("ab") as log:
        log.write((folder / "@journal.jsonl").read_bytes())
    assert said(store.root) == [("note", "@2.json"), ("note", "x")]
    assert diagnose(store.root).ok


def test_a_damaged_index_is_moved_aside_and_built_anew(store: Registry) -> None:
    resolved = store.resolve("x@champion")
    store.close()
    for path in store.root.glob("index.sqlite-*"):
        path.unlink()
    garbage = os.urandom(8192)
    (store.root / "index.sqlite").write_bytes(garbage)
    diagnosis = diagnose(store.root)
    assert [(finding.severity, finding.subject) for finding in diagnosis.findings] == [("error", "index")]
    with pytest.raises(Corrupted):
        Registry.open(store.root)
    mended = diagnose(store.root, rebuild=True)
    assert (mended.ok, mended.rebuilt) == (True, True)
    (aside,) = store.root.glob("index.sqlite.damaged-*")
    assert aside.read_bytes() == garbage
    assert Registry.open(store.root, create=False).resolve("x@champion") == resolved


def test_an_index_that_contradicts_the_records_is_built_anew(store: Registry) -> None:
    resolved = store.resolve("x")
    with store.index.write() as db:
        db.execute("UPDATE versions SET digest = ? WHERE name = 'x'", ("sha256:" + "0" * 64,))
    assert ("error", "x@1") in said(store.root)
    assert diagnose(store.root, rebuild=True).ok
    assert store.resolve("x") == resolved
