"""What becomes of a version: history, rollback, tags, tombstones, guards, signatures, garbage collection."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from registry_tools import Draft, Tiny, tree
from signing_tools import make_keys

from adapterbay.registry import Registry
from adapterbay.registry.errors import (
    Conflict,
    InvalidArgument,
    NotFound,
    Rejected,
    Untrusted,
)
from adapterbay.registry.gate import Guard
from adapterbay.registry.local import collection
from adapterbay.registry.signing import sign
from adapterbay.registry.views import Listing, MetricBound

DraftOf = Callable[[Tiny], Draft]
Trained = Callable[..., Path]


def blobs(registry: Registry) -> set[str]:
    return {path for path, content in tree(registry.root / "blobs").items() if content is not None}


def test_history_says_who_did_what(trained: Trained, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "store", by="ann")
    registry.push(trained(), "team/x", aliases=["champion"])
    registry.acting_as("bob").push(trained(), "team/x")
    registry.acting_as("bob").set_alias("team/x", "champion", 2)
    registry.push(trained(), "team/y")
    events = registry.history("team/x")
    assert [(event.kind, event.version, event.by) for event in events] == [
        ("pushed", 1, "ann"),
        ("alias_set", 1, "ann"),
        ("pushed", 2, "bob"),
        ("alias_set", 2, "bob"),
    ]
    assert events[3].previous_version == 1
    assert [event.at for event in events] == sorted(event.at for event in events)
    with pytest.raises(NotFound, match="team/z"):
        registry.history("team/z")


def test_the_actor_comes_from_the_environment(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERBAY_ACTOR", "ci\n\x1b[31m job")
    registry = Registry.open(tmp_path / "store")
    registry.push(trained(), "x")
    assert registry.history("x")[0].by == "ci??[31m job"


def test_rollback_goes_back_one_move_at_a_time(trained: Trained, registry: Registry) -> None:
    for _ in range(4):
        registry.push(trained(), "x")
    for version in (1, 3, 2):
        registry.set_alias("x", "champion", version)
    assert registry.rollback("x", "champion").version == 3
    assert registry.rollback("x", "champion").version == 1
    with pytest.raises(NotFound, match="nothing to go back to"):
        registry.rollback("x", "champion")
    registry.set_alias("x", "champion", 4)
    assert registry.rollback("x", "champion").version == 1
    registry.remove_alias("x", "champion")
    back = registry.rollback("x", "champion")
    assert (back.previous, back.version) == (None, 1)
    with pytest.raises(NotFound, match="never set"):
        registry.rollback("x", "challenger")


def test_a_rollback_to_a_deleted_version_says_so(trained: Trained, registry: Registry) -> None:
    registry.push(trained(), "x", aliases=["champion"])
    registry.push(trained(), "x", aliases=["champion"])
    registry.delete("x", 1, "leaked data")
    with pytest.raises(NotFound, match=r"deleted.*leaked data"):
        registry.rollback("x", "champion")
    assert registry.aliases("x") == {"champion": 2}


def test_tags(trained: Trained, registry: Registry) -> None:
    registry.push(trained(), "x")
    assert registry.tag("x", 1, {"language": "zh", "reviewed": ""}) == {"language": "zh", "reviewed": ""}
    assert registry.tag("x", 1, {"language": "en"}, remove=["reviewed"]) == {"language": "en"}
    assert registry.version("x", 1).tags == {"language": "en"}
    last = registry.last_event()
    with pytest.raises(NotFound, match="no tag colour"):
        registry.tag("x", 1, {"new": "1"}, remove=["colour"])
    for key, value in (("", "x"), ("-a", "x"), ("a b", "x"), ("a" * 65, "x"), ("ok", "\x1b[31m"), ("ok", "v" * 5000)):
        with pytest.raises(InvalidArgument):
            registry.tag("x", 1, {key: value})
    with pytest.raises(InvalidArgument):
        registry.tag("x", 1)
    with pytest.raises(NotFound):
        registry.tag("x", 7, {"a": "b"})
    assert registry.last_event() == last, "nothing of a refused change is kept"


def test_deprecation_is_said_and_taken_back(trained: Trained, registry: Registry) -> None:
    registry.push(trained(), "x")
    registry.deprecate("x", 1, "use x@2")
    assert registry.version("x", 1).deprecated == "use x@2"
    assert registry.resolve("x@1").version == 1
    registry.deprecate("x", 1, None)
    assert registry.version("x", 1).deprecated is None
    last = registry.last_event()
    registry.deprecate("x", 1, None)
    assert registry.last_event() == last, "what changes nothing is no event"
    with pytest.raises(InvalidArgument):
        registry.deprecate("x", 1, " ")


def test_a_deleted_version_is_a_tombstone(trained: Trained, registry: Registry) -> None:
    folders = [trained() for _ in range(3)]
    digests = [registry.push(folder, "x").digest for folder in folders]
    registry.set_alias("x", "champion", 3)
    with pytest.raises(Conflict, match="champion") as aliased:
        registry.delete("x", 3)
    assert aliased.value.reason == "ALIASED"
    registry.remove_alias("x", "champion")
    registry.delete("x", 3, "wrong licence")
    assert registry.resolve("x").version == 2, "a bare name means the newest that is there"
    for reference in ("x@3", f"x@{digests[2]}"):
        with pytest.raises(NotFound, match=r"was deleted on .* wrong licence") as gone:
            registry.resolve(reference)
        assert gone.value.reason == "DELETED"
    for call in (registry.manifest, registry.open_snapshot):
        with pytest.raises(NotFound, match="was deleted"):
            call(digests[2])
    with pytest.raises(NotFound):
        registry.delete("x", 3)
    with pytest.raises(NotFound):
        registry.set_alias("x", "champion", 3)
    assert [record.version for record in registry.versions("x")] == [1, 2]
    assert registry.adapters()[0].versions == 2
    again = registry.push(folders[2], "x")
    assert (again.version, again.same_as, again.digest) == (4, None, digests[2]), "numbers are never used again"
    assert registry.resolve(f"x@{digests[2]}").version == 4
    for version in (1, 2, 4):
        registry.delete("x", version)
    assert registry.adapters() == []
    with pytest.raises(NotFound):
        registry.resolve("x")
    assert registry.push(folders[0], "x").version == 5
    assert registry.verify().ok


def test_gc_frees_what_only_deleted_versions_had(trained: Trained, registry: Registry) -> None:
    first, second = trained(), trained()
    registry.push(first, "x")
    registry.push(second, "x")
    registry.push(second, "y")
    registry.attach_signature("x", 1, b"signature of one")
    before = blobs(registry)
    registry.delete("x", 1)
    registry.delete("x", 2)  # y still needs its files
    assert registry.gc(grace_seconds=3600).removed_blobs == 0
    foreseen = registry.gc(grace_seconds=0, dry_run=True)
    assert blobs(registry) == before, "a dry run removes nothing"
    report = registry.gc(grace_seconds=0)
    assert (report.removed_blobs, report.freed_bytes) == (foreseen.removed_blobs, foreseen.freed_bytes)
    # The weights and the signature of x@1; its other files are those of y too, and its manifest stays.
    assert len(before - blobs(registry)) == report.removed_blobs == 2
    assert registry.gc(grace_seconds=0).removed_blobs == 0
    assert registry.verify().ok
    assert registry.snapshot("y").manifest.files
    again = registry.push(first, "x")
    assert registry.snapshot(f"x@{again.version}")
    registry.rebuild_index()
    assert registry.verify().ok


def test_gc_keeps_fresh_orphans_and_removes_old_ones(trained: Trained, registry: Registry) -> None:
    registry.push(trained(), "x")
    orphan = registry.blobs.path("sha256:" + "ab" * 32)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"of an upload that never became a version")
    os.utime(orphan, (0, 0))
    report = registry.gc()
    assert (report.removed_blobs, report.fresh) == (0, 1), "its inode is new, whatever its time says"
    assert registry.gc(grace_seconds=0).removed_blobs == 1
    assert not orphan.exists()


def test_gc_counts_the_grace_period_from_the_deletion(
    trained: Trained, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(trained(), "x")
    registry.attach_signature("x", 1, b"signature of one")
    registry.push(trained(), "x")
    pushed = time.time()
    registry.delete("x", 1)
    with monkeypatch.context() as patch:
        patch.setattr(collection, "time", SimpleNamespace(time=lambda: pushed))
        report = registry.gc(grace_seconds=0)  # older than the grace period are the files, not the deletion
    assert (report.removed_blobs, report.fresh) == (0, 2)
    assert registry.gc(grace_seconds=0).removed_blobs == 2


def test_gc_removes_nothing_if_a_manifest_is_damaged(trained: Trained, registry: Registry) -> None:
    receipt = registry.push(trained(), "x")
    registry.push(trained(), "x")
    registry.delete("x", 2)
    path = registry.blobs.path(receipt.digest)
    path.chmod(0o644)
    path.write_bytes(b"{}")
    before = blobs(registry)
    with pytest.raises(Exception, match="altered"):
        registry.gc(grace_seconds=0)
    assert blobs(registry) == before


def test_signatures_are_kept_with_the_digest(trained: Trained, registry: Registry, tmp_path: Path) -> None:
    receipt = registry.push(trained(), "x")
    assert registry.signature(receipt.digest) is None
    keys = make_keys(tmp_path, "release")
    bundle = sign(registry.snapshot("x"), keys.private)
    registry.attach_signature("x", 1, b"one", key="sha256:k")
    registry.attach_signature("x", 1, bundle, key=keys.fingerprint)
    assert registry.signature(receipt.digest) == bundle
    assert registry.version("x", 1).signed
    assert registry.snapshot("x").signature == bundle
    pulled = registry.pull("x", tmp_path / "pulled")
    assert (pulled / "adapterbay" / "model.sig").read_bytes() == bundle
    other = Registry.open(tmp_path / "other")
    assert other.push(pulled, "y").digest == receipt.digest
    assert other.signature(receipt.digest) == bundle
    assert other.history("y")[-1].detail["key"] == keys.fingerprint
    (pulled / "adapterbay" / "model.sig").write_bytes(b"no bundle")
    with pytest.raises(Untrusted):
        other.push(pulled, "y")


def test_a_signature_is_of_versions_to_come_too(trained: Trained, registry: Registry) -> None:
    folder = trained()
    registry.push(folder, "x")
    registry.attach_signature("x", 1, b"one")
    registry.push(folder, "x")
    registry.push(folder, "other", aliases=["first"])
    registry.guard("other", "champion", Guard(requires=("signature",)))
    assert registry.set_alias("other", "champion", 1).overruled == ()
    assert registry.version("x", 2).signed
    registry.rebuild_index()
    assert registry.version("x", 2).signed
    assert registry.verify().ok


def test_a_pulled_folder_is_the_same_version_again(trained: Trained, registry: Registry, tmp_path: Path) -> None:
    parent = registry.push(trained(accuracy=0.9), "parent")
    receipt = registry.push(trained(accuracy=0.9), "x", parents=[parent.digest])
    assert receipt.manifest.parents == (parent.digest,)
    assert registry.children(parent.digest) == [("x", 1, receipt.digest)]
    pulled = registry.pull("x", tmp_path / "pulled")
    again = Registry.open(tmp_path / "other").push(pulled, "z")
    assert again.digest == receipt.digest
    assert again.manifest.parents == (parent.digest,)
    readme = pulled / "README.md"
    readme.write_text(readme.read_text() + "\nedited\n")
    with pytest.raises(Rejected, match="Remove the folder adapterbay/") as refused:
        registry.push(pulled, "x")
    assert refused.value.reason == "MANIFEST_MISMATCH"
    with pytest.raises(Rejected):
        registry.push(registry.pull("x", tmp_path / "p2"), "x", task="feature-extraction")


def test_listing_by_what_versions_are(trained: Trained, bert: Tiny, registry: Registry) -> None:
    registry.push(trained(accuracy=0.7), "a")
    registry.push(trained(accuracy=0.9, nested={"f1": 0.5}, note="text", flag=True), "b")
    registry.push(bert.adapter, "c")
    registry.tag("b", 1, {"language": "zh"})
    assert registry.version("b", 1).metrics == {"accuracy": 0.9, "nested.f1": 0.5}

    def found(**asked: object) -> list[str]:
        return [adapter.name for adapter in registry.adapters(listing=Listing(**asked))]  # type: ignore[arg-type]

    base = registry.version("c", 1)
    assert found() == ["a", "b", "c"]
    assert found(task="causal-lm") == ["a", "b"]
    assert found(base=base.base_fingerprint) == found(base=base.base_reference) == ["c"]
    assert found(base=base.base_reference.removeprefix("folder:")) == ["c"]
    assert found(base="%") == []
    assert found(method="lora") == ["a", "b", "c"]
    assert found(method="IA3") == []
    assert found(tags={"language": None}) == found(tags={"language": "zh"}) == ["b"]
    assert found(tags={"language": "en"}) == []
    assert found(metrics=(MetricBound.parse("accuracy >= 0.8"),)) == ["b"]
    assert found(metrics=(MetricBound.parse("accuracy<0.8"),)) == ["a"]
    assert found(after="a", limit=1) == ["b"]
    for text in ("accuracy", "accuracy=0.8", "accuracy>=high", ">=0.8"):
        with pytest.raises(InvalidArgument):
            MetricBound.parse(text)


def test_a_version_number_can_be_asked_for(trained: Trained, registry: Registry) -> None:
    assert registry.push(trained(), "x", number=3).version == 3
    assert registry.push(trained(), "x").version == 4
    for number in (1, 3, 4):
        with pytest.raises(Conflict, match="never used again"):
            registry.push(trained(), "x", number=number)
    assert [record.version for record in registry.versions("x")] == [3, 4]
