"""Altered blobs, contradicting records, leftovers of killed pushes, and the index built again."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registry_tools import Draft, Tiny

from adapterbay.registry import Manifest, Registry
from adapterbay.registry.digest import canonical_json
from adapterbay.registry.errors import (
    Corrupted,
    NotFound,
    RegistryNotFound,
    Rejected,
    Unavailable,
)
from adapterbay.registry.gate import Comparison, Guard
from adapterbay.registry.local.checks import TABLES

DraftOf = Callable[[Tiny], Draft]


@pytest.fixture
def another(llama: Tiny, draft: DraftOf) -> Callable[[], Path]:
    """Adapters that differ in one value."""
    count = 0

    def make() -> Path:
        nonlocal count
        count += 1
        made = draft(llama)
        made.edit_tensors(lambda tensors: next(iter(tensors.values())).flat.__setitem__(0, float(count)))
        return made.path

    return make


def blob_of(registry: Registry, digest: str, path: str) -> Path:
    return registry.open_snapshot(digest).files[path]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "altered": lambda blob: blob.write_bytes(blob.read_bytes()[:-1] + b"?"),
    "truncated": lambda blob: blob.write_bytes(blob.read_bytes()[:-1]),
    "emptied": lambda blob: blob.write_bytes(b""),
    "missing": lambda blob: blob.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_an_altered_blob_is_refused_at_load_and_others_are_unharmed(
    llama: Tiny, registry: Registry, another: Callable[[], Path], damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    registry.push(llama.adapter, "good")
    folder = another()
    bad = registry.push(folder, "bad")
    blob = blob_of(registry, bad.digest, "adapter_model.safetensors")
    blob.chmod(0o644)
    damage(blob)
    with pytest.raises(Corrupted, match=r"adapter_model\.safetensors") as caught:
        registry.open_snapshot(bad.digest)
    assert caught.value.metadata["digest"] == f"sha256:{blob.name}"
    with pytest.raises(Corrupted):
        registry.pull("bad", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    registry.open_snapshot(registry.resolve("good").digest)
    report = registry.verify()
    assert [problem.subject for problem in report.problems] == ["bad@1"]
    assert registry.verify("good").ok
    # Pushing the same files again repairs it.
    assert registry.push(folder, "bad").same_as == 1
    assert registry.verify().ok
    registry.open_snapshot(bad.digest)


def test_a_manifest_whose_digest_lies(llama: Tiny, registry: Registry) -> None:
    receipt = registry.push(llama.adapter, "x")
    blob = registry.root / "blobs" / "sha256" / receipt.digest[7:9] / receipt.digest[7:]
    blob.chmod(0o644)
    blob.write_bytes(canonical_json(receipt.manifest.model_dump(mode="json") | {"rank": 5}))
    with pytest.raises(Corrupted, match="The manifest"):
        registry.manifest(receipt.digest)
    assert [problem.kind for problem in registry.verify().problems] == ["manifest"]


def test_a_snapshot_reads_checked_bytes(llama: Tiny, registry: Registry) -> None:
    snapshot = registry.open_snapshot(registry.push(llama.adapter, "x").digest)
    expected = (llama.adapter / "adapter_config.json").read_bytes()
    assert snapshot.read("adapter_config.json") == expected
    with pytest.raises(NotFound):
        snapshot.read("../x")
    blob = snapshot.files["adapter_config.json"]
    blob.chmod(0o644)
    blob.write_bytes(expected + b" ")
    with pytest.raises(Corrupted):
        snapshot.read("adapter_config.json")


def test_verify_sees_records_that_contradict(llama: Tiny, registry: Registry) -> None:
    registry.push(llama.adapter, "x", aliases=["a"])
    registry.push(llama.adapter, "x")
    registry.push(llama.adapter, "y")
    record = registry.root / "adapters" / "x" / "@1.json"
    record.chmod(0o644)
    record.write_text(record.read_text().replace('"sequence":1', '"sequence":9'))
    (registry.root / "adapters" / "x" / "@2.json").unlink()
    (registry.root / "adapters" / "x" / "@journal.jsonl").unlink()
    kinds = sorted((problem.kind, problem.subject) for problem in registry.verify().problems)
    assert kinds == [("journal", "x"), ("record", "x@1"), ("record", "x@2")]
    assert registry.verify("y").ok


def everything(registry: Registry) -> Any:
    names = [adapter.name for adapter in registry.adapters()]
    return (
        registry.adapters(),
        [registry.versions(name) for name in names],
        [registry.aliases(name) for name in names],
        registry.events(),
        _rows(registry),
    )


def _rows(registry: Registry) -> Any:
    with sqlite3.connect(registry.root / "index.sqlite") as connection:
        return [connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES]


def fill(registry: Registry, llama: Tiny, bert: Tiny) -> None:
    for name in ("a", "a/b", "a/b/c", "z"):
        registry.push(llama.adapter, name, aliases=["champion"])
        registry.push(bert.adapter, name, aliases=["champion", "challenger"])
    registry.set_alias("a/b", "champion", 1)
    registry.remove_alias("a", "challenger")
    registry.rollback("a/b", "champion")
    registry.tag("a/b", 2, {"language": "zh", "quality": ""})
    registry.tag("a/b", 2, remove=["quality"])
    registry.deprecate("a/b", 1, "use 2")
    registry.guard("z", "champion", Guard({"accuracy": 0.8}, {"loss": 1.0}, ("comparison",)))
    registry.guard("z", "challenger", Guard(requires=("signature",)))
    registry.guard("z", "challenger", None)
    against = registry.resolve("z@1").digest
    registry.record_comparison("z", 2, Comparison(against, "accuracy", 0.9, 0.8, 100, "better", "mcnemar", 0.01))
    registry.attach_signature("z", 2, b"a bundle", key="sha256:key")
    registry.delete("a", 1, "trained on the wrong data")
    registry.delete("a/b/c", 1)


def test_the_index_built_again_is_equal(llama: Tiny, bert: Tiny, registry: Registry) -> None:
    fill(registry, llama, bert)
    before = everything(registry)
    registry.rebuild_index()
    assert everything(registry) == before


def test_a_lost_index_is_built_at_open(llama: Tiny, bert: Tiny, registry: Registry) -> None:
    fill(registry, llama, bert)
    before = everything(registry)
    registry.close()
    for path in registry.root.glob("index.sqlite*"):
        path.unlink()
    opened = Registry.open(registry.root, create=False)
    assert everything(opened) == before
    assert opened.verify().ok
    assert (opened.root / "adapters" / "a" / "@1.json").is_file(), "a tombstone keeps its record"
    assert opened.push(llama.adapter, "a").version == 3


def test_an_index_is_filled_whole_or_not_at_all(
    llama: Tiny, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dying while a lost index is built must not leave an empty one that looks complete."""
    registry.push(llama.adapter, "x")
    registry.close()
    for path in registry.root.glob("index.sqlite*"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("adapterbay.registry.local.checks.changes.insert_version", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Registry.open(registry.root)
    assert Registry.open(registry.root).resolve("x").version == 1


def test_a_damaged_index_is_told_in_one_sentence(llama: Tiny, registry: Registry) -> None:
    registry.push(llama.adapter, "x")
    registry.close()
    for path in registry.root.glob("index.sqlite-*"):
        path.unlink()
    (registry.root / "index.sqlite").write_bytes(os.urandom(8192))
    with pytest.raises(Corrupted, match="Move it away"):
        Registry.open(registry.root)


def test_records_of_killed_pushes_do_not_come_alive(llama: Tiny, registry: Registry) -> None:
    """Leftovers as a kill before the commit makes them: a record, an alias line, a torn alias line, blobs."""
    registry.push(llama.adapter, "x", aliases=["a"])
    before = everything(registry)
    record = json.loads((registry.root / "adapters" / "x" / "@1.json").read_text())
    leftover = record | {"version": 2, "sequence": 3, "digest": "sha256:" + "0" * 64}
    (registry.root / "adapters" / "x" / "@2.json").write_text(json.dumps(leftover))
    log = registry.root / "adapters" / "x" / "@journal.jsonl"
    with log.open("a") as file:
        file.write(
            '{"kind":"alias_set","alias":"a","version":2,"previous_version":1,"at":"2026-01-01T00:00:00+00:00","sequence":4}\n{"al'
        )
    report = registry.verify()
    assert (report.ok, report.leftovers) == (True, 1)
    assert everything(registry) == before
    assert registry.push(llama.adapter, "x", aliases=["a"]).version == 2
    assert registry.verify().leftovers == 0
    assert len(log.read_text().splitlines()) == 2
    after = everything(registry)
    registry.rebuild_index()
    assert everything(registry) == after


def test_leftovers_that_lost_their_sequence_stay_dead_in_a_rebuild(llama: Tiny, registry: Registry) -> None:
    registry.push(llama.adapter, "x")
    record = json.loads((registry.root / "adapters" / "x" / "@1.json").read_text())
    leftover = record | {"version": 2, "sequence": 2, "created_at": "2020-01-01T00:00:00.000000+00:00"}
    (registry.root / "adapters" / "x" / "@2.json").write_text(json.dumps(leftover))
    (registry.root / "adapters" / "x" / "@journal.jsonl").write_text(
        '{"kind":"alias_set","alias":"a","version":2,"at":"2020-01-01T00:00:00.000000+00:00","sequence":3}\n'
    )
    registry.push(llama.adapter, "y")  # takes sequence 2
    before = everything(registry)
    registry.rebuild_index()
    assert everything(registry) == before


def test_staging_of_dead_pushes_is_swept(llama: Tiny, registry: Registry) -> None:
    import socket

    dead = registry.root / "tmp" / f"{socket.gethostname()}-{2**22 + 1}-abc"
    foreign = registry.root / "tmp" / "another-host-1-abc"
    old = registry.root / "tmp" / "another-host-2-abc"
    alive = registry.root / "tmp" / f"{socket.gethostname()}-{os.getpid()}-abc"
    for folder in (dead, foreign, old, alive):
        folder.mkdir()
        (folder / "blob-0").write_bytes(b"x")
    os.utime(old, (0, 0))
    registry.push(llama.adapter, "x")
    assert {path.name for path in (registry.root / "tmp").iterdir()} == {foreign.name, alive.name}


def test_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryNotFound, match="no registry at") as caught:
        Registry.open(tmp_path / "none", create=False)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(Unavailable, match="not a registry"):
        Registry.open(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    monkeypatch.setenv("ADAPTERBAY_REGISTRY", str(tmp_path / "default"))
    assert Registry.open().root == tmp_path / "default"
    marker = tmp_path / "default" / "registry.json"
    marker.write_text('{"layout": 2}')
    with pytest.raises(Unavailable, match="update adapterbay"):
        Registry.open()


def test_a_newer_schema_is_left_alone(registry: Registry) -> None:
    registry.close()
    with sqlite3.connect(registry.root / "index.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(Unavailable, match="newer adapterbay"):
        Registry.open(registry.root)


def test_canonical_json() -> None:
    assert canonical_json({"b": 1, "a": ["é", None, 1.5]}) == '{"a":["é",null,1.5],"b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float(np.nan))


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"path": "../x", "digest": "sha256:" + "0" * 64, "size": 1}]},
        {"files": [{"path": "/x", "digest": "sha256:" + "0" * 64, "size": 1}]},
        {"files": [{"path": "x", "digest": "md5:0", "size": 1}]},
        {"files": [{"path": "x", "digest": "sha256:" + "0" * 64, "size": -1}]},
        {"files": [{"path": "x", "digest": "sha256:" + "0" * 64, "size": 1}] * 2},
        {"schema_version": 2},
        {"name": "x"},
        {"task": "poetry"},
        {"base_fingerprint": "x"},
        {"signature": "x"},
    ],
    ids=str,
)
def test_manifests_that_are_not_valid(llama: Tiny, registry: Registry, change: dict[str, Any]) -> None:
    document = registry.push(llama.adapter, "x").manifest.model_dump(mode="json")
    with pytest.raises(Rejected) as caught:
        Manifest.from_bytes(canonical_json(document | change))
    assert caught.value.reason == "BAD_MANIFEST"
